"""Memory: everything that a cache holds as plain numbers and tensors, and a cache made of them again, to the bit.

A snapshot says nothing about manager and model; who writes it into a file adds both (`evomem.plugins.saved_cache`).
Numbers and tensors are checked against each other when a cache is made of them: a file may come from anybody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.kv.cache import SlotCache
from evomem.memory.kv.evicted import count_evicted
from evomem.memory.kv.layer import SlotLayer
from evomem.memory.kv.ragged import RaggedLayout
from evomem.memory.observations import Recorder, Sizes, Wanted
from evomem.memory.observations.base import State

COUNTS = ("seen", "decided", "bytes_peak", "_read")
NUMBERS = ("scale", "_byte_tokens")
MAYBE = ("softcap", "window")
TENSORS = ("start", "turned", "evicted")
"""Attributes of a `SlotLayer` that are its state: whole numbers, numbers, numbers or none, tensors.

``starts`` follows from ``start``, ``is_initialized`` from ``seen``; ``pending`` and ``ahead`` exist within a pass only.
"""
FLAGS = ("dense", "aligned")
"""Truths about its `SlotStorage`. Its tensors are those of ``even`` by their names, those of ``flat`` with ``flat.``
before them, and ``lengths`` of the layout; what is recorded has ``slotwise.``, ``flat.slotwise.`` and ``rowwise.``.
"""
EVEN = ("keys", "values", "slots", "decays")
_LARGEST = 2**53
"""Whole numbers up to which JSON and floats are exact."""


@dataclass(frozen=True)
class Snapshot:
    """What a cache holds.

    Attributes
    ----------
    facts : JSON-serialisable.
    tensors : by ``LAYER.NAME``; those of the cache, not copies.
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor]


def take(cache: SlotCache) -> Snapshot:
    """Return what a cache holds between two forward passes.

    Raises
    ------
    CacheError : a forward pass over it was cut short; or it is the cache of a model with a memory of its own.
    """
    if not isinstance(cache, SlotCache):
        raise CacheError(
            f"{type(cache).__name__} belongs to a model with a memory of its own; files of slots have no place for it: "
            "cache.state() returns what it holds, and load_state() of a new one goes on from there"
        )
    cache.require_whole()
    if cache.awaiting is not None or any(layer.pending is not None or layer.ahead for layer in cache.layers):
        raise CacheError("a forward pass over this cache was cut short; reset() it and read the context again")
    layers, tensors = [], dict[str, Tensor]()
    for layer in cache.layers:
        recorder, storage = layer.recorder, layer.storage
        facts = {name: getattr(layer, name) for name in (*COUNTS, *NUMBERS, *MAYBE)}
        facts |= {name: getattr(storage, name) for name in FLAGS}
        recorded = {"recorded_window": recorder.window, "recorded_from": recorder.begin}
        layers.append(facts | {"observing": recorder.wanted == cache.wanted} | recorded)
        named = {name: getattr(layer, name) for name in TENSORS if getattr(layer, name) is not None}
        groups = {
            "": storage.even, "flat.": storage.flat, "flat.slotwise.": recorder.flat,
            "slotwise.": recorder.slotwise, "rowwise.": recorder.rowwise,
        }  # fmt: skip
        for group, parts in groups.items():
            named |= {f"{group}{name}": tensor for name, tensor in parts.items()}
        if storage.layout is not None:
            named["lengths"] = storage.layout.lengths
        tensors |= {f"{layer.index}.{name}": tensor for name, tensor in named.items()}
    return Snapshot(
        {
            "decides_after_forward": cache.decides_after_forward,
            "undecided": cache.undecided,
            "bytes_peak": cache.bytes_peak,
            "layers": layers,
        },
        tensors,
    )


def put(snapshot: Snapshot, cache: SlotCache, devices: Sequence[torch.device]) -> None:
    """Let an empty cache hold what a snapshot says; it goes on as the one that the snapshot was taken of.

    Parameters
    ----------
    cache : empty, with the manager and for the model of the snapshot's.
    devices : where every layer's slots are to lie.

    Raises
    ------
    CacheError : see `check`.
    """
    facts, layers, named = snapshot.facts, snapshot.facts["layers"], check(snapshot, cache)
    for name in ("decides_after_forward", "undecided", "bytes_peak"):
        setattr(cache, name, facts[name])
    for layer, own, tensors, device in zip(cache.layers, layers, named, devices, strict=True):
        _fill(layer, own, {name: tensor.to(device) for name, tensor in tensors.items()}, cache.wanted)
    if getattr(cache.policy, "counts_evicted", False) and all(layer.evicted is None for layer in cache.layers):
        count_evicted(cache.layers)  # written before decisions counted


def check(snapshot: Snapshot, cache: SlotCache) -> list[dict[str, Tensor]]:
    """Return the tensors of every layer by name, after checking that a snapshot can be one of such a cache.

    Raises
    ------
    CacheError : numbers and tensors contradict each other, or are not those of a cache of this manager.
    """
    facts = snapshot.facts
    names = {"decides_after_forward", "undecided", "bytes_peak", "layers"}
    _require(set(facts) == names, "cache", "has other fields")
    for name in ("decides_after_forward", "undecided"):
        _require(isinstance(facts[name], bool), name, "is no truth value")
    _require(_is_count(facts["bytes_peak"]), "bytes_peak", "is no number of bytes")
    layers = facts["layers"]
    _require(isinstance(layers, list) and len(layers) == cache.depth, "layers", f"are not {cache.depth}")
    named: list[dict[str, Tensor]] = [{} for _ in range(cache.depth)]
    for name, tensor in snapshot.tensors.items():
        number, _, rest = name.partition(".")
        _require(number.isdecimal() and number.isascii() and len(number) < 9, name, "is no tensor of a cache")
        _require(int(number) < cache.depth, name, f"is of none of the {cache.depth} layers")
        named[int(number)][rest] = tensor
    for layer, own, tensors in zip(cache.layers, layers, named, strict=True):
        _check_facts(layer.index, own)
        wanted = cache.wanted if own["observing"] else Wanted()
        _check_tensors(layer.index, own, tensors, wanted, cache.depth)
    first = (layers[0]["seen"], None if "keys" not in named[0] else named[0]["keys"].shape[0])
    for index, (own, tensors) in enumerate(zip(layers, named, strict=True)):
        here = (own["seen"], None if "keys" not in tensors else tensors["keys"].shape[0])
        _require(here == first, f"layer {index}", "has read other tokens or rows than layer 0")
    return named


def _fill(layer: SlotLayer, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], wanted: Wanted) -> None:
    for name in (*COUNTS, *NUMBERS, *MAYBE):
        setattr(layer, name, facts[name])
    for name in TENSORS:
        if name in tensors:
            setattr(layer, name, tensors[name])
    layer.is_initialized = layer.seen > 0
    layer.starts = tuple(layer.start.tolist()) if layer.seen else ()
    storage = layer.storage
    storage.dense = facts["dense"]
    storage.even = {name: tensors[name] for name in EVEN if name in tensors}
    storage.flat = {name: tensors[f"flat.{name}"] for name in EVEN if f"flat.{name}" in tensors}
    if "lengths" in tensors:
        storage.layout = RaggedLayout(tensors["lengths"].cpu(), tensors["slots"].device)
    storage.padded = bool(storage.even) and not bool((storage.even["slots"] >= 0).all())
    slotwise, rowwise, flat = (
        {name.removeprefix(group): tensor for name, tensor in tensors.items() if name.startswith(group)}
        for group in ("slotwise.", "rowwise.", "flat.slotwise.")
    )
    layer.recorder = Recorder(wanted, slotwise, rowwise, facts["recorded_window"], facts["recorded_from"], flat)
    if not facts["observing"]:
        layer.recorder.stop()
        layer.recorder.window = facts["recorded_window"]
    storage.settle(layer.recorder)  # a file of a version that padded shorter heads


# ---- checks ----------------------------------------------------------------------------------------------------------


def _require(right: bool, where: str, trouble: str) -> None:
    if not right:
        raise CacheError(f"{where}: {trouble}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_facts(index: int, facts: Any) -> None:
    where = f"layer {index}"
    names = {*COUNTS, *FLAGS, *NUMBERS, *MAYBE, "observing", "recorded_window", "recorded_from"}
    _require(isinstance(facts, dict) and set(facts) == names, where, "has other fields than a layer's")
    for name in COUNTS:
        _require(_is_count(facts[name]), f"{where}: {name}", "is no count")
    for name in (*FLAGS, "observing"):
        _require(isinstance(facts[name], bool), f"{where}: {name}", "is no truth value")
    for name in NUMBERS:
        _require(_is_number(facts[name]), f"{where}: {name}", "is no finite number")
    _require(facts["softcap"] is None or _is_number(facts["softcap"]), f"{where}: softcap", "is no number")
    for name in ("window", "recorded_window"):
        _require(facts[name] is None or _is_count(facts[name]), f"{where}: {name}", "is no number of tokens")
    for name in ("decided", "recorded_from"):
        _require(_is_count(facts[name]), f"{where}: {name}", "is no count")
        _require(facts[name] <= facts["seen"], f"{where}: {name}", "is after the last token that was read")


def _check_tensors(
    index: int, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], wanted: Wanted, layers: int
) -> None:
    """Check a layer's tensors: their names, types and shapes, and that the slots are those of so many tokens."""
    seen = facts["seen"]
    if not seen:
        _require(not tensors, f"layer {index}", "has read nothing and holds tensors")
        return
    for name in ("keys", "values", "slots", "start"):
        _require(name in tensors, f"{index}.{name}", "is missing")
    keys, slots, start = tensors["keys"], tensors["slots"], tensors["start"]
    _require(keys.dim() == 4 and keys.is_floating_point(), f"{index}.keys", "is no (batch, kv_heads, slots, head_dim)")
    batch, heads, count, size = keys.shape
    _require(batch > 0 and heads > 0, f"{index}.keys", "has no row or no head")
    values = tensors["values"]
    _require(values.dim() == 4 and values.is_floating_point(), f"{index}.values", "has shape or type of no values")
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "keys": ((batch, heads, count, size), keys.dtype),
        "values": ((batch, heads, count, values.shape[-1]), values.dtype),  # under autocast another type than keys
        "slots": ((batch, heads, count), torch.int64),
        "start": ((batch,), torch.int64),
        "decays": ((batch, heads, count), torch.float32),
        "turned": ((batch,), torch.int64),
        "evicted": ((batch, layers), torch.int64),
    }
    flat = {name: tensors[name] for name in tensors if name == "lengths" or name.startswith("flat.")}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in flat}
    _check_shape(f"{index}.slots", slots, *shapes["slots"])
    _check_shape(f"{index}.start", start, *shapes["start"])
    _require(bool(((start >= 0) & (start <= seen)).all()), f"{index}.start", "is outside of what was read")
    turned = tensors.get("turned")
    if turned is not None:
        _check_shape(f"{index}.turned", turned, *shapes["turned"])
        _require(bool(((turned >= 0) & (turned <= seen)).all()), f"{index}.turned", "is outside of what was read")
    shapes |= _recorded_shapes(index, wanted, tensors, batch, heads, count, size, seen, _since(start, facts))
    for name, tensor in tensors.items():
        _require(name in shapes, f"{index}.{name}", "is nothing that this manager's cache holds")
        _check_shape(f"{index}.{name}", tensor, *shapes[name])
    evicted = tensors.get("evicted")
    if evicted is not None:
        _check_shape(f"{index}.evicted", evicted, *shapes["evicted"])
        _require(bool(((evicted >= 0) & (evicted <= seen)).all()), f"{index}.evicted", "is outside of what was read")
    for name in shapes.keys() - tensors.keys() - {"decays", "turned", "evicted"}:
        raise CacheError(f"{index}.{name}: is missing")
    if flat:
        _check_flat(index, facts, flat, tensors)
    rising = (slots[..., 1:] > slots[..., :-1]) | (slots[..., :-1] == -1)
    within = bool(((slots >= -1) & (slots < seen)).all()) and bool(rising.all())
    _require(within, f"{index}.slots", "are not the ascending indices of tokens that were read")
    aligned = not flat and bool((slots >= 0).all())
    _require(not facts["aligned"] or aligned, f"{index}.slots", "have empty ones, and aligned says no")
    whole = not flat and count == seen and bool((slots == torch.arange(count, device=slots.device)).all())
    _require(not facts["dense"] or whole, f"{index}.slots", "are not all tokens, and dense says so")


def _check_flat(index: int, facts: Mapping[str, Any], flat: Mapping[str, Tensor], even: Mapping[str, Tensor]) -> None:
    """Check the older slots of heads of different lengths: there are so many, and they come before the even ones."""
    shared = {name: tensor for name, tensor in even.items() if name in EVEN or name.startswith("slotwise.")}
    for name in sorted({"lengths", *(f"flat.{name}" for name in shared)} ^ set(flat)):
        trouble = "is nothing that this manager's cache holds" if name in flat else "is missing"
        raise CacheError(f"{index}.{name}: {trouble}")
    lengths, slots = flat["lengths"], flat["flat.slots"].cpu()
    _check_shape(f"{index}.lengths", lengths, tuple(even["slots"].shape[:2]), torch.int64)
    within = bool(((lengths >= 0) & (lengths <= facts["seen"])).all())
    _require(within, f"{index}.lengths", "are not those of tokens that were read")
    layout = RaggedLayout(lengths.cpu(), torch.device("cpu"))
    for name, like in shared.items():
        _check_shape(f"{index}.flat.{name}", flat[f"flat.{name}"], (layout.total, *like.shape[3:]), like.dtype)
    _require(
        bool(((slots >= 0) & (slots < facts["seen"])).all()), f"{index}.flat.slots", "are of no token that was read"
    )
    first = torch.zeros(layout.total + 1, dtype=torch.bool)
    first[layout.bounds] = True  # where a head begins, what comes before is another head's
    rising = bool(((slots[1:] > slots[:-1]) | first[1:-1]).all())
    _require(rising, f"{index}.flat.slots", "are not the ascending indices of tokens that were read")
    if even["slots"].shape[2] and layout.total:
        some = lengths.flatten() > 0
        last = slots[layout.bounds[1:][some] - 1]
        following = even["slots"].flatten(0, 1)[some.to(even["slots"].device), 0].cpu()
        _require(bool((last < following).all()), f"{index}.slots", "are not the ascending indices after the flat ones")


def _recorded_shapes(
    index: int, wanted: Wanted, tensors: Mapping[str, Tensor], batch: int, heads: int, slots: int, size: int, seen: int,
    starts: list[int],
) -> dict[str, State]:  # fmt: skip
    """Return shapes and types of what a recorder holds after ``seen`` tokens."""
    shapes: dict[str, State] = {}
    sizes = Sizes(batch, heads, slots, size, seen, tuple(starts))
    for observation in wanted.observations:
        try:
            shapes |= observation.state(tensors, sizes)
        except CacheError as error:
            raise CacheError(f"{index}.{error}") from None
    queries = tensors.get("rowwise.queries")
    if wanted.queries and queries is not None:
        _require(queries.dim() == 4 and queries.is_floating_point(), f"{index}.rowwise.queries", "are no queries")
        count = queries.shape[2]
        fits = 0 < count <= min(wanted.queries, seen) and queries.shape[1] % heads == 0
        _require(fits, f"{index}.rowwise.queries", "are not the newest queries of this manager's window")
        shapes["rowwise.queries"] = (batch, queries.shape[1], count, size), queries.dtype
        visible = tensors.get("rowwise.visible")
        if visible is not None:
            _require(visible.dim() == 4, f"{index}.rowwise.visible", "is no mask")
            shape = batch, visible.shape[1], visible.shape[2], visible.shape[3]
            fits = visible.shape[1] in (1, heads) and visible.shape[2] <= wanted.queries and visible.shape[3] <= seen
            kind = visible.dtype == torch.bool or visible.is_floating_point()
            _require(fits and kind, f"{index}.rowwise.visible", "is no mask of the newest queries")
            shapes["rowwise.visible"] = shape, visible.dtype
    elif wanted.queries:
        shapes["rowwise.queries"] = (), torch.float32  # missing, which is said
    return shapes


def _since(start: Tensor, facts: Mapping[str, Any]) -> list[int]:
    """Token of every row that recording began with."""
    return [max(first, int(facts["recorded_from"])) for first in start.tolist()]


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _require(
        tuple(tensor.shape) == shape and tensor.dtype == dtype,
        name,
        f"has shape {tuple(tensor.shape)} and type {tensor.dtype}; {shape} and {dtype} are expected",
    )
