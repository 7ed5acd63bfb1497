"""Evaluation: contexts that were read once, kept within a number of bytes; what does not fit goes to disk."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from evomem.devices import CPU, free_bytes
from evomem.errors import EvomemError
from evomem.files.atomic import replacing
from evomem.files.scratch import Scratch, sweep
from evomem.memory import LayerView
from evomem.memory.view import TensorName

logger = logging.getLogger("evomem")


@dataclass(frozen=True)
class Reading:
    """A context as the frozen model read it: one view a layer (batch 1), nothing evicted.

    Attributes
    ----------
    views : one a layer.
    tokens : tokens that were read.
    """

    views: tuple[LayerView, ...]
    tokens: int

    def nbytes(self) -> int:
        """Return the bytes of all tensors, also of those that managers computed from the views (`LayerView.memo`)."""
        tensors = [tensor for view in self.views for tensor in view.tensors(memo=True).values()]
        return sum(t.numel() * t.element_size() for t in tensors)


class Readings(Protocol):
    """Contexts that were read, by key: what an evaluator needs of a store.

    Attributes
    ----------
    misses : how often a context had to be read.
    """

    misses: int

    def get(self, key: str, read: Callable[[], Reading]) -> Reading:
        """Return the reading called ``key``, by reading now if it is nowhere."""
        ...

    def close(self) -> None:
        """Forget everything."""
        ...


class PrefillStore:
    """Readings by key, least recently used first to leave memory.

    Parameters
    ----------
    limit : bytes of memory for readings; the newest one stays even if it alone is larger. None: `room_for_readings`, on
        the devices of the first one.
    folder : where readings go that do not fit; if None a temporary folder, which is removed with the store, or by the
        next process if this one is killed.
    """

    swept = False
    """Whether this process has removed what killed ones have left."""

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self.limit = limit
        if folder is None and not PrefillStore.swept:
            PrefillStore.swept = True
            sweep("prefill")
        self._temporary: Scratch | None = None
        self._folder = folder
        self._memory: OrderedDict[str, Reading] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._warned = False
        self.hits = self.misses = self.spills = 0

    def get(self, key: str, read: Callable[[], Reading]) -> Reading:
        """Return the reading called ``key``: from memory, from disk, or by reading now."""
        reading = self._memory.pop(key, None)
        if reading is not None:
            self.hits += 1
        else:
            reading = self._recovered(key)
            if reading is not None:
                self.hits += 1
            else:
                self.misses += 1
                reading = read()
        self._memory[key] = reading
        if self.limit is None:
            self.limit = room_for_readings({view.keys.device for view in reading.views})
        for newest in list(self._memory)[-2:]:  # the one used before has been looked at since, and may have grown
            self._sizes[newest] = self._memory[newest].nbytes()
        if self._sizes[key] > self.limit and not self._warned:
            self._warned = True
            logger.warning(
                "one context of %s tokens takes %s bytes, and there is room for %s (store_bytes): wherever several are "
                "used in turn, each goes to disk and back. Give store_bytes more, or take shorter contexts",
                f"{reading.tokens:,}", f"{self._sizes[key]:,}", f"{self.limit:,}",
            )  # fmt: skip
        while self.bytes_in_memory > self.limit and len(self._memory) > 1:
            oldest, leaving = self._memory.popitem(last=False)
            del self._sizes[oldest]
            self._spill(oldest, leaving)
        return reading

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of memory in use by readings."""
        return sum(self._sizes.values())

    def _path(self, key: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def _recovered(self, key: str) -> Reading | None:
        """Return the reading from disk; None if it is not there, or damaged, and so must be read anew."""
        path = self._path(key)
        if path is None or not path.exists():
            return None
        try:
            return _load(path)
        except Exception as error:  # safetensors has its own classes
            logger.warning("%s is damaged (%s); the context is read again", path, error)
            path.unlink(missing_ok=True)
            return None

    def _spill(self, key: str, reading: Reading) -> None:
        try:
            if self._folder is None:
                self._temporary = Scratch("prefill")
                self._folder = self._temporary.path
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvomemError(
                f"no folder for contexts that do not fit in memory: {error}; free some disk space, set TMPDIR to "
                f"another disk, or give the store more memory (store_bytes is {self.limit:,})"
            ) from error
        path = self._path(key)
        if path is None or path.exists():
            return
        named = {".".join((str(v.layer), *map(str, n))): t for v in reading.views for n, t in v.tensors().items()}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in named.items()}
        facts = {"tokens": str(reading.tokens), "views": json.dumps([view.facts() for view in reading.views])}
        facts["devices"] = json.dumps([str(view.keys.device) for view in reading.views])  # where they go back to
        try:
            with replacing(path, durable=False) as temporary:  # it lasts no longer than its process
                save_file(tensors, temporary, metadata=facts)
            self.spills += 1
        except Exception as error:
            raise EvomemError(
                f"a context that was read could not be moved to {path.parent}: {error}; free some disk space, or give "
                f"the store more memory (store_bytes is {self.limit:,})"
            ) from error

    def close(self) -> None:
        """Forget everything and remove a temporary folder."""
        self._memory.clear()
        self._sizes.clear()
        if self._temporary is not None:
            self._temporary.close()
            self._temporary = self._folder = None


def room_for_readings(devices: Iterable[torch.device]) -> int:
    """Return how many bytes of readings to keep in the memory of some devices: a quarter of what is free there.

    The rest is for the candidates' caches, which are what a search is about. On the processor it is at least 2 GiB and
    at most 64 GiB.
    """
    free = {device: free_bytes(device) for device in devices}
    accelerators = [room for device, room in free.items() if device.type != "cpu" and room is not None]
    if accelerators:
        return max(256 << 20, sum(accelerators) // 4)
    return min(64 << 30, max(2 << 30, (free.get(CPU) or 0) // 4))


def _load(path: Path) -> Reading:
    views = []
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
        every, devices = json.loads(facts["views"]), json.loads(facts["devices"])
        names: dict[int, list[str]] = {}
        for name in file.keys():  # noqa: SIM118 - not a mapping
            names.setdefault(int(name.split(".", 1)[0]), []).append(name)
        for fields, device in zip(every, devices, strict=True):
            tensors: dict[TensorName, Tensor] = {
                tuple(name.split(".", 2)[1:]): file.get_tensor(name).to(device)  # type: ignore[misc]
                for name in names[fields["layer"]]
            }
            views.append(LayerView.of(fields, tensors))
    return Reading(tuple(views), int(facts["tokens"]))


def token_key(tokens: Tensor) -> str:
    """Stable name of a token sequence."""
    return sha256(tokens.to(torch.int64).cpu().numpy().tobytes()).hexdigest()[:24]
