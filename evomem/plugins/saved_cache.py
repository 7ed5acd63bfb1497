"""Plug-in: a context that was read, as one safetensors file that goes on in another process as if it were the first.

::

    tensors              keys, values, slots, decays and recorded observations per layer; the manager's own
    metadata "evomem"    JSON: schema_version, digest, model, manager (as in a plug-in's config.json), cache

The file is read with suspicion: its header and every size in it are checked before memory is taken, nothing in it is
executed, and its digest must be that of its content. (A digest finds damage; it does not say who made the file.) It is
loaded only onto the model that read it: the same class, configuration, type and weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from evomem.errors import CacheError, PluginError
from evomem.files.atomic import replacing
from evomem.files.reading import user_path
from evomem.files.strict_json import NotStrictError, parse_strict, shown
from evomem.managers import MemoryManager, build
from evomem.modes import outside_inference_mode
from evomem.plugins.folder import to_manager
from evomem.plugins.schema import describe_manager, parse_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from evomem.memory import SlotCache
    from evomem.memory.explicit import ExplicitCache

SCHEMA_VERSION = 1
HEADER = 8 << 20
"""Bytes of its header."""
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_MANAGER, _KEY = "manager.", "evomem"


def save_cache(cache: SlotCache | ExplicitCache, path: str | Path, *, model: PreTrainedModel | None = None) -> None:
    """Write a cache, between two forward passes, into one file from which `load_cache` goes on, to the bit.

    The file appears whole: it is written beside its place, flushed, and renamed. A saved cache that is there is
    replaced.

    Parameters
    ----------
    cache : of a manager that a plug-in can hold; what it observes and when it decides next are saved with it. Of a
        model with a memory of its own (`evomem.memory.explicit`): that memory; ``model`` must be given.
    path : of the file, e.g. ``context.safetensors``; its folder is made.
    model : the model that read; None: the one that the cache was made for.

    Raises
    ------
    CacheError : a forward pass was cut short; the cache has no manager of its own (an evaluator's), or its manager
        was exchanged; the model is gone, or has no such memory; another file is there; the disk is full.
    PluginError : the manager cannot be saved, see `evomem.plugins.save`.
    """
    from evomem.models.identity import identity

    path = user_path(path)
    manager = cache.policy
    if not isinstance(manager, MemoryManager) or cache.wanted != type(cache.wanted).parse(manager.observes):
        raise CacheError(
            f"{path}: a cache can be saved that a manager was attached with; this one is decided about by "
            f"{type(manager).__name__}, which no file can hold, or not from the beginning"
        )
    model = model if model is not None else cache.model
    if model is None:
        raise CacheError(
            f"{path}: the model that this cache was made for is gone; give it: save_cache(..., model=model)"
        )
    _require_reader(path, cache, model)
    held, tensors = _state(path, cache)
    tensors |= {f"{_MANAGER}{name}": value for name, value in manager.state_dict().items()}
    config = describe_manager(manager)
    tensors = _plain(tensors)
    _manager(path, config, tensors)
    facts = {
        "schema_version": SCHEMA_VERSION,
        "model": identity(model),
        "manager": config,
        "cache": held,
    }
    facts["digest"] = _digest(facts, {name: _sum(tensor) for name, tensor in tensors.items()})
    if path.exists() or path.is_symlink():
        _require_saved_cache(path)
    _write(path, tensors, json.dumps(facts, sort_keys=True))


def load_cache(path: str | Path, model: PreTrainedModel, *, limit: int | None = None) -> SlotCache:
    """Return the cache of a file: use it as the one that was saved, while the model is attached.

    >>> cache = load_cache("context.safetensors", model)               # doctest: +SKIP
    >>> with cache.policy.attach(model):                               # doctest: +SKIP
    ...     model.generate(**question, past_key_values=cache)

    Parameters
    ----------
    model : the one that read the context; each layer's slots come onto its device.
    limit : bytes that the file may have at most; None: what this machine has as memory.

    Raises
    ------
    CacheError : there is no such file, it is damaged, too large, of an unknown version, or of another model.
    PluginError : its manager cannot be built here (of a package that is not installed, for example).
    """
    from evomem.memory import SlotCache
    from evomem.models.identity import identity

    path = user_path(path)
    facts, tensors = _read(path, limit)
    _check_model(path, facts["model"], identity(model))
    manager_tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(_MANAGER)}
    manager = _manager(path, facts["manager"], manager_tensors)
    with outside_inference_mode():
        cache = SlotCache.for_model(model, manager)
        try:
            rest = {name: tensor for name, tensor in tensors.items() if name not in manager_tensors}
            _go_on(cache, facts["cache"], rest, model)
        except CacheError as error:
            raise CacheError(f"{path}: {error}") from None
    return cache


def _require_reader(path: Path, cache: SlotCache | ExplicitCache, model: PreTrainedModel) -> None:
    """Raise `CacheError` where a memory is none of the model's that is said to have read it."""
    from evomem.memory import SlotCache

    make = getattr(model, "decided_cache", None)
    if isinstance(cache, SlotCache):
        return
    fresh = None if make is None else make(build("full"))
    if type(fresh) is not type(cache) or fresh.depth != cache.depth:
        said = "none" if fresh is None else f"{type(fresh).__name__} of {fresh.depth} layers"
        raise CacheError(
            f"{path}: this is a {type(cache).__name__} of {cache.depth} layers, and the memory of "
            f"{type(model).__name__} is {said}; give the model that has read it: save_cache(..., model=model)"
        )


def _state(path: Path, cache: SlotCache | ExplicitCache) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a cache holds: JSON-serialisable, and tensors."""
    from evomem.memory.explicit import ExplicitCache
    from evomem.memory.kv.snapshot import check, take

    if isinstance(cache, ExplicitCache):
        layers, tensors = cache.state()
        return {"memories": layers}, tensors
    taken = take(cache)
    try:  # what could not be loaded is not saved
        check(taken, cache)
    except CacheError as error:
        raise CacheError(f"{path}: this cache cannot be saved: {error}") from None
    return taken.facts, dict(taken.tensors)


def _go_on(cache: Any, facts: Any, tensors: dict[str, Tensor], model: PreTrainedModel) -> None:
    """Let an empty cache hold what a file says; raises `CacheError` where that is of no such cache."""
    from evomem.memory.explicit import ExplicitCache
    from evomem.memory.kv.snapshot import Snapshot, put

    if isinstance(cache, ExplicitCache) != (isinstance(facts, dict) and set(facts) == {"memories"}):
        raise CacheError("cache: is none of this kind of memory; save it again")
    if isinstance(cache, ExplicitCache):  # lengths of heads are read by the processor
        there = {n: t if n.endswith(".lengths") else t.to(model.device) for n, t in tensors.items()}
        cache.load_state(facts["memories"], there)
        return
    put(Snapshot(facts, tensors), cache, _devices(model, cache.depth))


# ---- the model -------------------------------------------------------------------------------------------------------


def _check_model(path: Path, saved: Any, expected: Mapping[str, Any]) -> None:
    if not isinstance(saved, dict) or set(saved) != set(expected) or not isinstance(saved["weights"], dict):
        raise CacheError(f"{path}: model: is not what a saved cache says about its model")
    for field, what in (("class", "class"), ("config", "configuration"), ("dtype", "type")):
        if saved[field] != expected[field]:
            raise CacheError(
                f"{path}: model.{field}: was read by a model of another {what} ({shown(saved[field])}, this one has "
                f"{expected[field]}); load it onto the model that read it, or read the context again"
            )
    other = [name for name, digest in expected["weights"].items() if saved["weights"].get(name, digest) != digest]
    if other:
        raise CacheError(
            f"{path}: model.weights: was read by a model with other weights ({other[0]} and {len(other) - 1} more "
            "differ); load it onto the model that read it, or read the context again"
        )


def _devices(model: PreTrainedModel, layers: int) -> list[torch.device]:
    """Return where each layer attends; for weights that are brought in for each call, where they are brought to."""
    from evomem.memory.kv.attach import attention_modules

    devices = []
    for module in attention_modules(model)[:layers]:
        device = next((p.device for p in module.parameters()), model.device)
        if device.type == "meta":
            hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
            places = (getattr(hook, "execution_device", None) for hook in hooks)
            device = torch.device(next((place for place in places if place is not None), "cpu"))
        devices.append(device)
    return devices


# ---- the manager -----------------------------------------------------------------------------------------------------


def _manager(path: Path, config: Any, tensors: Mapping[str, Tensor]) -> MemoryManager:
    if not isinstance(config, dict):
        raise PluginError(f"{path}: manager: is no description of a manager")
    manager_tensors = {n.removeprefix(_MANAGER): t for n, t in tensors.items() if n.startswith(_MANAGER)}
    again = json.loads(json.dumps(config))
    return to_manager(path, parse_config(path, again), path, lambda: manager_tensors).requires_grad_(False)


# ---- the file --------------------------------------------------------------------------------------------------------


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the processor, contiguous, none a part of another."""
    copies, storages = {}, set[int]()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        part = plain.untyped_storage().nbytes() != plain.numel() * plain.element_size()
        # One number counts as contiguous whatever its stride is, and then its bytes cannot be looked at.
        if place in storages or part or plain.reshape(-1).stride() != (1,):
            plain = plain.clone(memory_format=torch.contiguous_format)
        storages.add(plain.untyped_storage().data_ptr())
        copies[name] = plain
    return copies


def _sum(tensor: Tensor) -> list[Any]:
    digest = hashlib.sha256(memoryview(_bytes(tensor)))
    return [str(tensor.dtype), list(tensor.shape), digest.hexdigest()]


def _bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor, which can be read and written to."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _digest(facts: Mapping[str, Any], sums: Mapping[str, list[Any]]) -> str:
    said = {name: value for name, value in facts.items() if name != "digest"}
    return hashlib.sha256(json.dumps([said, sums], sort_keys=True).encode()).hexdigest()


def _write(path: Path, tensors: dict[str, Tensor], facts: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file(tensors, partial, {_KEY: facts})
    except (OSError, SafetensorError) as error:
        raise CacheError(
            f"{path}: cannot be written: {getattr(error, 'strerror', None) or shown(str(error))}"
        ) from error


def _require_saved_cache(path: Path) -> None:
    """Raise `CacheError` unless a saved cache, of whatever version, is in the place of the new one."""
    try:
        with _opened(path, None) as (file, size):
            _header(path, file, size)
    except CacheError as error:
        raise CacheError(f"{path}: exists and is no saved cache; choose another place ({error})") from None


class _opened:
    """A regular file that is open for reading, and its size; bounded, and never waited for."""

    def __init__(self, path: Path, limit: int | None) -> None:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.path, self.limit = path, memory if limit is None else limit

    def __enter__(self) -> tuple[Any, int]:
        try:
            # Opening a pipe would wait for somebody to write into it.
            descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except (OSError, ValueError) as error:
            said = getattr(error, "strerror", None) or error
            raise CacheError(f"{shown(str(self.path))}: cannot be read: {said}") from None
        status = os.fstat(descriptor)
        trouble = ""
        if not stat.S_ISREG(status.st_mode):
            trouble = "is no regular file; give the file that save_cache wrote"
        elif status.st_size > self.limit:
            trouble = f"has {status.st_size:,} bytes; at most {self.limit:,} are read (load_cache: limit)"
        if trouble:
            os.close(descriptor)
            raise CacheError(f"{self.path}: {trouble}")
        self.file = open(descriptor, "rb")
        return self.file, status.st_size

    def __exit__(self, *error: object) -> None:
        self.file.close()


def _read(path: Path, limit: int | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a file says and holds: sizes checked before memory is taken, and the digest at the end."""
    with _opened(path, limit) as (file, size):
        try:
            facts, entries = _header(path, file, size)
            if facts.get("schema_version") != SCHEMA_VERSION or isinstance(facts["schema_version"], bool):
                raise CacheError(
                    f"{path}: schema_version: {shown(facts.get('schema_version'))} is unknown; this evomem reads "
                    f"version {SCHEMA_VERSION}"
                )
            if set(facts) != {"schema_version", "digest", "model", "manager", "cache"}:
                raise CacheError(f"{path}: has other fields than a saved cache")
            tensors, sums = {}, {}
            with outside_inference_mode():
                for name, dtype, shape in entries:
                    # Read and not mapped: a mapped file that shrinks would end the process.
                    tensor = torch.empty(shape, dtype=dtype, device="cpu")
                    view = memoryview(_bytes(tensor))
                    while len(view):  # a system reads no more than two gigabytes at once
                        count = file.readinto(view)
                        if not count:
                            raise CacheError(f"{path}: is damaged: it ends within {shown(name)}")
                        view = view[count:]
                    tensors[name], sums[name] = tensor, _sum(tensor)
        except (MemoryError, RuntimeError) as error:  # RuntimeError: PyTorch's own for no memory
            if isinstance(error, CacheError):
                raise
            raise CacheError(f"{path}: does not fit into memory ({size:,} bytes)") from None
        except OSError as error:
            raise CacheError(f"{path}: cannot be read: {error.strerror or error}") from None
    if _digest(facts, sums) != facts["digest"]:
        raise CacheError(f"{path}: is damaged: its digest is not that of its content; save the cache again")
    return facts, tensors


def _header(path: Path, file: Any, size: int) -> tuple[dict[str, Any], list[tuple[str, torch.dtype, tuple[int, ...]]]]:
    """Return what a safetensors file says about its cache, and its tensors in the order in which they lie there."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8 or length > HEADER:
        raise CacheError(f"{path}: is no saved cache: a header of {length:,} bytes in a file of {size:,}")
    try:
        header = parse_strict(file.read(length).decode("utf-8"))
        metadata = header.pop("__metadata__")
        facts = parse_strict(metadata[_KEY])
        entries = sorted(header.items(), key=lambda entry: int(entry[1]["data_offsets"][0]))
        at, tensors = 0, []
        for name, entry in entries:
            shape, (begin, end), dtype = tuple(entry["shape"]), entry["data_offsets"], _TYPES[entry["dtype"]]
            count = 1
            for axis in shape:
                if not isinstance(axis, int) or isinstance(axis, bool) or not 0 <= axis <= size:
                    raise ValueError(f"{shown(name)}: an axis of {shown(axis)}")
                count *= axis
            if begin != at or end != at + count * dtype.itemsize or end > size:
                raise ValueError(f"{shown(name)}: {shown(entry)} does not follow what is before it")
            tensors.append((name, dtype, shape))
            at = end
        if at != size - 8 - length or not isinstance(facts, dict):
            raise ValueError(f"{size - 8 - length:,} bytes of numbers, of which {at:,} are spoken for")
    except (NotStrictError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CacheError(f"{path}: is no saved cache, or damaged: {shown(str(error), 200)}") from None
    return facts, tensors
