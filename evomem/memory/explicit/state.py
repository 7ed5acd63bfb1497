"""Memory: an explicit memory made again of its state, which may come from a file that anybody has written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.kv.ragged import RaggedLayout
from evomem.memory.kv.storage import SlotStorage
from evomem.memory.observations import Recorder, Sizes

if TYPE_CHECKING:
    from evomem.memory.explicit.layer import ExplicitLayer

COUNTS = ("seen", "decided", "bytes_peak", "_read", "begin")
_LARGEST = 2**53
"""Whole numbers up to which JSON and floats are exact."""


def fill(layer: ExplicitLayer, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Let a memory go on as the one whose state this is; see `ExplicitLayer.load_state`.

    Raises
    ------
    CacheError : numbers and tensors contradict each other, or are of a memory that records something else.
    """
    observed = sorted(layer.observes)
    if facts.get("observes") != observed:
        raise CacheError(
            f"state of {layer.title}: it records {facts.get('observes')!r}, this one {observed!r}; load it for the "
            "manager that it was saved with"
        )
    for name in COUNTS:
        number = facts.get(name)
        _require(isinstance(number, int) and not isinstance(number, bool) and 0 <= number < _LARGEST, layer, name)
    total: Any = facts.get("_byte_tokens")
    _require(isinstance(total, int | float) and math.isfinite(total) and total >= 0, layer, "_byte_tokens")
    for name in ("dense", "padded"):
        _require(isinstance(facts.get(name), bool), layer, name)
    groups: dict[str, dict[str, Tensor]] = {
        name: {} for name in ("even", "flat", "slotwise", "flat_recorded", "rowwise")
    }
    single: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        group, dot, rest = name.partition(".")
        if dot and group in groups:
            groups[group][rest] = tensor
        else:
            single[name] = tensor
    _require(set(single) <= {"start", "evicted", "lengths"}, layer, ", ".join(sorted(single)))
    if facts["seen"]:
        _check_tensors(layer, facts, groups, single)
    else:
        _require(not tensors, layer, "tensors, for nothing was read")
    layer.reset()
    for name in COUNTS[:4]:
        setattr(layer, name, facts[name])
    layer._byte_tokens = float(total)
    storage = SlotStorage()
    storage.even, storage.flat = groups["even"], groups["flat"]
    storage.dense, storage.padded = facts["dense"], facts["padded"]
    if "lengths" in single:
        storage.layout = RaggedLayout(single["lengths"], storage.even["slots"].device)
    layer.storage = storage
    layer.recorder = Recorder(
        layer.wanted, groups["slotwise"], groups["rowwise"], begin=facts["begin"], flat=groups["flat_recorded"]
    )
    if facts["seen"]:
        layer.start, layer.evicted = single["start"], single.get("evicted")
        layer.starts = tuple(layer.start.tolist())
        layer.is_initialized = True


def _check_tensors(
    layer: ExplicitLayer, facts: Mapping[str, Any], groups: dict[str, dict[str, Tensor]], single: dict[str, Tensor]
) -> None:
    even, flat = groups["even"], groups["flat"]
    names = {"keys", "values", "slots"} | layer.slot_marks
    _require(even.keys() in (names, names | {"decays"}) and "start" in single, layer, "a tensor of the slots, or start")
    _require(all(even[name].dim() == 4 for name in ("keys", "values")), layer, "even.keys, even.values")
    for where, part in (("even", even), ("flat", flat)):
        for name in {"keys", "values"} & part.keys():
            numbers = part[name]
            right = numbers.is_floating_point() and bool(torch.isfinite(numbers).all())
            _require(right, layer, f"{where}.{name} of numbers")
    _require(facts["decided"] <= facts["seen"], layer, "decided, at most seen,")
    _require(all(even[name].dtype == torch.int64 for name in layer.slot_marks), layer, "a mark of the slots")
    slots = even["slots"]
    _require(slots.dim() == 3 and slots.dtype == torch.int64, layer, "even.slots")
    _require(bool(((slots >= -1) & (slots < facts["seen"])).all()), layer, "even.slots")
    batch = slots.shape[0]
    _require(single["start"].shape == (batch,), layer, "start")
    if "evicted" in single:
        _require(single["evicted"].shape == (batch, layer.layers), layer, "evicted")
    for name, tensor in [*even.items(), *groups["slotwise"].items()]:
        _require(tensor.shape[:3] == slots.shape, layer, name)
    for name, tensor in groups["rowwise"].items():
        _require(tensor.shape[:1] == (batch,), layer, name)
    sizes = Sizes(batch, slots.shape[1], slots.shape[2], even["keys"].shape[-1], facts["seen"], (0,) * batch)
    recorded = {f"slotwise.{name}": tensor for name, tensor in groups["slotwise"].items()}
    recorded |= {f"rowwise.{name}": tensor for name, tensor in groups["rowwise"].items()}
    for one in layer.wanted.observations:
        for name, (shape, dtype) in one.state(recorded, sizes).items():
            held = recorded.get(name)
            _require(held is not None and (tuple(held.shape), held.dtype) == (shape, dtype), layer, name)
    _require(not layer.wanted.queries or "queries" in groups["rowwise"], layer, "rowwise.queries")
    ragged = "lengths" in single
    _require(bool(flat) == ragged, layer, "lengths")
    for mine, whole in ((flat, even), (groups["flat_recorded"], groups["slotwise"])):
        _require(mine.keys() == (whole.keys() if ragged else set()), layer, "the parts of slots")
        for name, tensor in mine.items():
            same = tensor.shape[1:] == whole[name].shape[3:] and tensor.dtype == whole[name].dtype
            _require(same, layer, f"flat.{name}")
    if ragged:
        lengths = single["lengths"]
        _require(lengths.shape == slots.shape[:2] and lengths.dtype == torch.int64, layer, "lengths")
        _require(lengths.device.type == "cpu" and bool((lengths >= 0).all()), layer, "lengths")
        for name, tensor in [*flat.items(), *groups["flat_recorded"].items()]:
            _require(tensor.shape[0] == int(lengths.sum()), layer, f"flat.{name}")


def _require(right: bool, layer: ExplicitLayer, what: str) -> None:
    if not right:
        raise CacheError(f"state of {layer.title}: {what}: is missing, or no part of such a memory; save it again")
