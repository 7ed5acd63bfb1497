"""Workers: contexts that were read, handed from one worker to another without reading them again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from evomem.evaluation.store import Reading
from evomem.memory import LayerView
from evomem.models.sharing import to_array, to_tensor

HELD = 1
"""Readings that a worker keeps as its own; all others are in the memory that all workers share."""


class SharedReadings:
    """A worker's store for contexts: what it was offered it fetches, what nobody has read it reads and gives away.

    Parameters
    ----------
    fetch : returns the arrays behind an offer; raises if they are lost (their machine has died).
    """

    def __init__(self, fetch: Callable[[Any], Mapping[str, Any]]) -> None:
        self._fetch = fetch
        self._offers: dict[str, Any] = {}
        self._held: OrderedDict[str, Reading] = OrderedDict()
        self._fresh: dict[str, Reading] = {}
        self.misses = self.lost = 0

    def offer(self, offers: Mapping[str, Any]) -> None:
        """Take in where readings can be fetched, by key; it replaces what was offered before."""
        self._offers = dict(offers)

    def get(self, key: str, read: Callable[[], Reading]) -> Reading:
        """Return the reading called ``key``: its own, an offered one, or by reading now."""
        reading = self._held.pop(key, None)
        if reading is None:
            reading = self._offered(key)
        if reading is None:
            self.misses += 1
            reading = self._fresh[key] = read()
        self._held[key] = reading
        while len(self._held) > HELD:
            self._held.popitem(last=False)
        return reading

    def _offered(self, key: str) -> Reading | None:
        if key not in self._offers:
            return None
        try:
            return to_reading(self._fetch(self._offers[key]))
        except Exception:  # whatever happened to it on the way, it can be read again
            self.lost += 1
            return None

    def give(self) -> dict[str, dict[str, Any]]:
        """Return as arrays, by key, what was read since the last call."""
        fresh, self._fresh = self._fresh, {}
        return {key: to_arrays(reading) for key, reading in fresh.items()}

    def close(self) -> None:
        """Forget everything."""
        self._held.clear()
        self._fresh.clear()
        self._offers.clear()


def to_arrays(reading: Reading) -> dict[str, Any]:
    """Return a reading as arrays: with what was computed from it once for all candidates."""
    return {"tokens": reading.tokens, "views": [_view_arrays(view) for view in reading.views]}


def to_reading(arrays: Mapping[str, Any]) -> Reading:
    """Undo `to_arrays`, without copying where tensors are on the processor; they must never be written to."""
    return Reading(tuple(_view(parts) for parts in arrays["views"]), arrays["tokens"])


def nbytes(arrays: Mapping[str, Any]) -> int:
    """Bytes of all arrays of a reading."""
    return sum(array.nbytes for parts in arrays["views"] for array, _ in parts["tensors"].values())


def _view_arrays(view: LayerView) -> dict[str, Any]:
    arrays = {name: to_array(tensor) for name, tensor in view.tensors(memo=True).items()}
    return {"tensors": arrays, "facts": view.facts(), "device": str(view.keys.device)}


def _view(parts: Mapping[str, Any]) -> LayerView:
    tensors = {name: to_tensor(array, dtype).to(parts["device"]) for name, (array, dtype) in parts["tensors"].items()}
    return LayerView.of(parts["facts"], tensors)


class Directory:
    """Where the readings of every sample are, in the order of their last use; the pool's side of the exchange.

    Parameters
    ----------
    limit : bytes of readings at most; those that were not used longest are dropped first.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[str, dict[str, tuple[Any, int]]] = OrderedDict()
        self.size = 0

    def offers(self, affinity: str) -> dict[str, Any]:
        """Return where the readings of a sample are, by key."""
        entries = self._entries.get(affinity)
        if entries is None:
            return {}
        self._entries.move_to_end(affinity)
        return {key: where for key, (where, _) in entries.items()}

    def add(self, affinity: str, key: str, where: Any, size: int) -> bool:
        """Note where a reading is; return whether the sample can be offered now: it is not if it is too large.

        What was known of the key is replaced: who had to read it again did not find it there.
        """
        entries = self._entries.setdefault(affinity, {})
        self._entries.move_to_end(affinity)
        _, before = entries.get(key, (None, 0))
        entries[key] = (where, size)
        self.size += size - before
        while self.size > self._limit and self._entries:
            _, dropped = self._entries.popitem(last=False)
            self.size -= sum(size for _, size in dropped.values())
        return affinity in self._entries

    def forget(self, affinity: str) -> None:
        """Drop the readings of a sample."""
        dropped = self._entries.pop(affinity, {})
        self.size -= sum(size for _, size in dropped.values())
