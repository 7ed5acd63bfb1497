"""Memory: models whose heads are split over processes (tensor parallel), and managers that decide right in each."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evomem.errors import UnsupportedModelError
from evomem.memory.kv.due import needs_all_layers
from evomem.memory.observations import Wanted, axes_of
from evomem.memory.view import Decision, LayerView

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from evomem.memory.kv.policy import CachePolicy

_SLOTS = 1 << 14
"""Slots of a head of the probe, at most."""


def degree(model: Any) -> int:
    """Return over how many processes a model's heads are split; 1: it is whole."""
    size = getattr(model, "_tp_size", None)
    if size is None:
        mesh = next((p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")), None)
        shards = mesh is not None and any(
            getattr(place, "is_shard", lambda: False)()
            for p in model.parameters()
            for place in getattr(p, "placements", ())
        )
        size = mesh.size() if mesh is not None and shards else 1
    return int(size)


def check_parallel(model: PreTrainedModel, policy: CachePolicy, layers: int) -> None:
    """Raise `UnsupportedModelError` where a model is split and the manager would decide otherwise than on a whole one.

    Every process sees its own KV heads, numbered from 0. What judges a head by itself decides the same there; what
    compares heads, or knows them by number, does not. Which of the two a manager is, is tried out on random numbers.
    """
    parts = degree(model)
    if parts <= 1:
        return
    text = model.config.get_text_config(decoder=True)
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    if not _by_head(policy, heads, parts, size, layers):
        name = getattr(policy, "name", type(policy).__name__)
        raise UnsupportedModelError(
            f"{type(model).__name__} is split over {parts} processes (tensor parallel), each with "
            f"{heads / parts:g} of {heads} KV heads, and manager {name!r} decides about a head by looking at others, "
            "or by its number: every process would keep other slots than one for all. Take a manager that judges every "
            "head by itself, or spread the model by layers (device_map)"
        )


@torch.no_grad()
def _by_head(policy: CachePolicy, heads: int, parts: int, size: int, layers: int) -> bool:
    """Whether decisions about some of the heads are those that are made about all of them at once."""
    if heads % parts or needs_all_layers(policy):  # heads of all layers share one budget
        return False
    budget = getattr(getattr(policy, "options", None), "budget", None)
    slots = min(_SLOTS, 2 * budget) if isinstance(budget, int) else 64
    whole = _random_view(policy.observes, heads, max(slots, 64), size)
    for layer in range(layers):
        here = replace(whole, layer=layer, layers=layers, memo={})
        try:
            together = policy.decide(here)
            apart = [
                policy.decide(_of_heads(here, slice(at, at + heads // parts))) for at in range(0, heads, heads // parts)
            ]
        except RuntimeError:  # shapes that only a certain number of heads has
            return False
        if not _equal(together, apart):
            return False
    return True


def _equal(together: Decision, apart: list[Decision]) -> bool:
    if not torch.equal(together.keep, torch.cat([one.keep for one in apart], 1)):
        return False
    if (
        together.keys is not None
    ):  # means over many tokens differ in their last bits; what is written cannot be compared
        return False
    decays = [one.decay for one in apart if one.decay is not None]
    if together.decay is None or len(decays) < len(apart):
        return together.decay is None and not decays
    return torch.equal(together.decay, torch.cat(decays, 1))


def _random_view(observes: frozenset[str], heads: int, slots: int, size: int) -> LayerView:
    """Return a view of random numbers with everything recorded that is wanted."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(1, heads, *shape, generator=generator)

    sizes = {"batch": 1, "kv_heads": heads, "query_heads": heads, "slots": slots, "head_dim": size}
    recorded: dict[str, Tensor] = {}
    for observation in Wanted.parse(observes).observations:
        recorded |= observation.example(sizes, generator)
    index = torch.arange(slots).expand(1, heads, slots)
    start = torch.zeros(1, dtype=torch.int64)
    return LayerView(numbers(slots, size), numbers(slots, size), index, start, slots, slots, 0, 1, recorded)


def _of_heads(view: LayerView, heads: slice) -> LayerView:
    """Return the view of some of the heads, as the process sees them that has these."""
    by_head = (("kv_heads",), ("query_heads",))
    recorded = {
        name: tensor[:, heads] if (axes := axes_of(name)) is None or axes[1:2] in by_head else tensor
        for name, tensor in view.recorded.items()
    }
    parts = {name: getattr(view, name)[:, heads] for name in ("keys", "values", "slots")}
    return replace(view, **parts, recorded=recorded, memo={})
