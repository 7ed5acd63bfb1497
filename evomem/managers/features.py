"""Manager: named features of slots, standardised within a head, for scorers that are to work on any model.

A feature is an *observation*, or a neighbourhood of one: ``mean:7:keydiff`` is the average of ``keydiff`` over the 7
slots around each slot, ``max:7:keydiff`` the largest. The observations:

=====================  ============================================================  ===================================
name                   what                                                          the cache must record
=====================  ============================================================  ===================================
keydiff                -cos(k_i, mean of the normalised keys), larger is rarer        -
valuediff              the same of the values                                         -
key_norm, value_norm   log of the Euclidean norm                                      -
key_step, value_step   1 - cos to the slot before: how sharply the text turns         -
age                    log(1 + tokens since)                                          -
position               log(1 + index within the row)                                  -
sink                   1 for the row's first 4 tokens                                 -
attention              log of the attention of all queries so far                     attention_sum
attention_per_query    the same divided by the number of queries that saw the key     attention_sum
window:W               log of the mean attention of the last W queries, max pool 5    window_attention:W
last:W                 the same, a sum and not pooled                                window_attention:W
block_max:W            log of the largest attention of the last W queries            window_statistics:W
block_min:W            of the smallest                                               window_statistics:W
block_sum:W            of the sum                                                    window_statistics:W
block_decayed:W        of the sum in which the n-th query from the end counts .9^n   window_statistics:W
spectrum:B             log of bin B (0-16) of the attention spectrogram's average     attention_spectrum
tri_attention          worth to the model's mean query from some distances on        tri_attention
recency                log(1 + tokens since the slot was last read, or written)      recency
frequency              log(1 + reads received, the attention paid so far)            frequency
frequency_decayed:H    the same, a read of n tokens ago counting 2^(-n/H)            frequency_decayed:H
relevance:W            mean cosine of the key with the last W queries                relevance:W
novelty                1 - the largest cosine of the key with another slot's         -
surprise               error of what the memory predicted when the slot was written  surprise
ghost_frequency        log(1 + reads of the name, before it left and while away too)  ghost_frequency
backward_distance:W    log(1 + tokens since the last read but one, at most W)         backward_distance:W
change                 size of the latest update beside what was there                change
agreement              cosine of the latest update with what was there                agreement
updates                log of the updates that the slot was offered so far            updates
surprise_ratio         log(1 + the token's surprise over its running mean)            surprise_ratio
forget_gate            log-odds of the token's own α, momentum_gate of its η,         gates
                       rate_gate of its θ
=====================  ============================================================  ===================================

From ``recency`` to ``backward_distance``, and ``age``, they mean the same in a KV cache and in an explicit memory
(`evomem.memory.explicit`). Only explicit memories have a ``surprise``, only those that are read by name the two after
it; feedback memory, whose slots are rewritten, and neural memory, whose weights learn tokens, have a ``change`` and an
``agreement``, only the former ``updates``, only the latter what follows. Depth is no feature of a slot: weights vary
with it.

No feature depends on head size, head count, depth or vocabulary, so a scorer over them can move to other models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from evomem.bounds import NEIGHBOURS
from evomem.errors import ConfigError
from evomem.managers.options import ManagerOptions
from evomem.memory import LayerView, masked_mean
from evomem.memory.observations.spectrum import BINS

TINY = 1e-6
"""Added before a logarithm of attention: less than the attention of one query to one of a million keys."""


def _away_from_mean(x: Tensor, valid: Tensor) -> Tensor:
    """-cos(x_i, mean of the normalised x): x (batch, kv_heads, slots, head_dim) -> (batch, kv_heads, slots)."""
    directions = F.normalize(x.float(), dim=-1)
    total = torch.where(valid[..., None], directions, 0.0).sum(-2, keepdim=True)
    return -(directions * F.normalize(total, dim=-1)).sum(-1)


def _step(x: Tensor, valid: Tensor) -> Tensor:
    """1 - cos(x_i, x_{i-1}); 0 for the first slot that holds a token, whatever empty ones come before it."""
    directions = F.normalize(x.float(), dim=-1)
    cosine = (directions[..., 1:, :] * directions[..., :-1, :]).sum(-1)
    return F.pad(torch.where(valid[..., :-1], 1 - cosine, 0.0), (1, 0))


_NEIGHBOURS_AT_ONCE = 256
"""Slots whose distances to all others are computed at a time."""


def _novelty(view: LayerView) -> Tensor:
    """1 - the largest cosine of a slot's key with another one's: (batch, kv_heads, slots); 1 where it is alone."""
    keys = F.normalize(view.keys.float(), dim=-1)
    number = torch.arange(keys.shape[2], device=keys.device)
    nearest = []
    for begin in range(0, keys.shape[2], _NEIGHBOURS_AT_ONCE):
        part = number[begin : begin + _NEIGHBOURS_AT_ONCE]
        cosine = torch.matmul(keys.index_select(2, part), keys.transpose(-1, -2))
        others = view.valid[:, :, None] & (part[:, None] != number)
        nearest.append(torch.where(others, cosine, -1.0).amax(-1))
    closest = torch.cat(nearest, -1) if nearest else keys[..., 0]
    alone = view.valid.sum(-1, keepdim=True) < 2
    return torch.where(alone, 1.0, 1 - closest)


def _window(view: LayerView, argument: str) -> Tensor:
    attention = view.recorded[f"window_attention:{argument}"]
    return torch.log(pool(attention, view.valid, 5, "max") + TINY)


def _last(view: LayerView, argument: str) -> Tensor:
    return torch.log(view.recorded[f"window_attention:{argument}"] * int(argument) + TINY)


def _window_statistic(index: int) -> Callable[[LayerView, str], Tensor]:
    def compute(view: LayerView, argument: str) -> Tensor:
        return torch.log(view.recorded[f"window_statistics:{argument}"][..., index] + TINY)

    return compute


def _per_query(view: LayerView, argument: str) -> Tensor:
    return torch.log(view.recorded["attention_sum"] / (view.age + 1).float() + TINY)


@dataclass(frozen=True)
class Feature:
    """An observation with a transformation: one number a slot.

    Attributes
    ----------
    compute : function of (view, argument) that returns (batch, kv_heads, slots) fp32.
    needs : what the cache must record for it, ``{}`` standing for the argument; empty: nothing.
    takes : its argument, the text behind the colon: none, a number of ``queries``, or a ``bin`` of the spectrum.
    from_slots : it follows from the slots' indices alone, so that traces need not hold it.
    """

    compute: Callable[[LayerView, str], Tensor]
    needs: str = ""
    takes: Literal["", "queries", "bin"] = ""
    from_slots: bool = False

    def check(self, name: str, label: str, argument: str) -> None:
        """Raise `ConfigError` about the feature ``label`` unless the argument is what ``name`` takes."""
        if self.takes == "queries" and not _number(argument):
            raise ConfigError(
                f"feature {label!r}: {name} wants a number of queries, at most {NEIGHBOURS}, as in {name}:32"
            )
        if self.takes == "bin" and argument not in {str(number) for number in range(BINS)}:
            raise ConfigError(f"feature {label!r}: {name} wants a bin from 0 to {BINS - 1}, as in {name}:4")
        if argument and not self.takes:
            raise ConfigError(f"feature {label!r}: {name} takes no argument")


FEATURES: dict[str, Feature] = {
    "keydiff": Feature(lambda view, _: _away_from_mean(view.keys, view.valid)),
    "valuediff": Feature(lambda view, _: _away_from_mean(view.values, view.valid)),
    "key_norm": Feature(lambda view, _: torch.log(view.keys.float().norm(dim=-1) + TINY)),
    "value_norm": Feature(lambda view, _: torch.log(view.values.float().norm(dim=-1) + TINY)),
    "key_step": Feature(lambda view, _: _step(view.keys, view.valid)),
    "value_step": Feature(lambda view, _: _step(view.values, view.valid)),
    "age": Feature(lambda view, _: torch.log1p(view.age.float()), from_slots=True),
    "position": Feature(lambda view, _: torch.log1p(view.position.clamp(min=0).float()), from_slots=True),
    "sink": Feature(lambda view, _: (view.position < 4).float(), from_slots=True),
    "attention": Feature(lambda view, _: torch.log(view.recorded["attention_sum"] + TINY), "attention_sum"),
    "attention_per_query": Feature(_per_query, "attention_sum"),
    "window": Feature(_window, "window_attention:{}", "queries"),
    "last": Feature(_last, "window_attention:{}", "queries"),
    "block_max": Feature(_window_statistic(0), "window_statistics:{}", "queries"),
    "block_min": Feature(_window_statistic(1), "window_statistics:{}", "queries"),
    "block_sum": Feature(_window_statistic(2), "window_statistics:{}", "queries"),
    "block_decayed": Feature(_window_statistic(3), "window_statistics:{}", "queries"),
    "spectrum": Feature(
        lambda view, argument: torch.log(view.recorded["attention_spectrum"][..., int(argument)] + TINY),
        "attention_spectrum",
        "bin",
    ),
    "tri_attention": Feature(lambda view, _: view.recorded["tri_attention"], "tri_attention"),
    "recency": Feature(lambda view, _: torch.log1p(view.recorded["recency"].float()), "recency"),
    "frequency": Feature(lambda view, _: torch.log1p(view.recorded["frequency"]), "frequency"),
    "frequency_decayed": Feature(
        lambda view, argument: torch.log1p(view.recorded[f"frequency_decayed:{argument}"]),
        "frequency_decayed:{}",
        "queries",
    ),
    "relevance": Feature(lambda view, argument: view.recorded[f"relevance:{argument}"], "relevance:{}", "queries"),
    "novelty": Feature(lambda view, _: _novelty(view)),
    "surprise": Feature(lambda view, _: view.recorded["surprise"], "surprise"),
    "ghost_frequency": Feature(lambda view, _: torch.log1p(view.recorded["ghost_frequency"]), "ghost_frequency"),
    "backward_distance": Feature(
        lambda view, argument: torch.log1p(view.recorded[f"backward_distance:{argument}"].float()),
        "backward_distance:{}",
        "queries",
    ),
    "change": Feature(lambda view, _: view.recorded["change"], "change"),
    "agreement": Feature(lambda view, _: view.recorded["agreement"], "agreement"),
    "updates": Feature(lambda view, _: torch.log(view.recorded["updates"].clamp(min=1)), "updates"),
    "surprise_ratio": Feature(lambda view, _: torch.log1p(view.recorded["surprise_ratio"]), "surprise_ratio"),
    "forget_gate": Feature(lambda view, _: view.recorded["gates"][..., 0], "gates"),
    "momentum_gate": Feature(lambda view, _: view.recorded["gates"][..., 1], "gates"),
    "rate_gate": Feature(lambda view, _: view.recorded["gates"][..., 2], "gates"),
}
"""Features without a neighbourhood, by name."""

FROM_SLOTS = frozenset(name for name, feature in FEATURES.items() if feature.from_slots)
"""Features that follow from the slots' indices alone."""

LINEAR_20 = (
    "keydiff", "key_norm", "value_norm", "attention", "attention_per_query", "window:32", "age",
    "spectrum:0", "spectrum:1", "spectrum:2", "spectrum:4", "spectrum:8", "spectrum:16",
    "mean:7:keydiff", "mean:7:key_norm", "mean:7:value_norm", "mean:7:attention", "mean:7:attention_per_query",
    "mean:7:window:32", "mean:7:age",
)  # fmt: skip
"""The twenty features of the first trial."""


def parse(name: str) -> tuple[str, int, str, str]:
    """Split ``pool:width:observation:argument`` into its parts; raise `ConfigError` naming what is wrong."""
    parts = name.split(":")
    how, width = "", 0
    if parts[0] in ("mean", "max"):
        how = parts.pop(0)
        if not parts or _number(parts[0]) % 2 == 0:
            raise ConfigError(
                f"feature {name!r}: {how} wants an odd number of slots, at most {NEIGHBOURS}, as in {how}:7:keydiff"
            )
        width = int(parts.pop(0))
    observation = parts.pop(0) if parts else ""
    argument = parts.pop(0) if parts else ""
    if observation not in FEATURES or parts:
        raise ConfigError(f"feature {name!r}: unknown observation {observation!r}; known: {', '.join(FEATURES)}")
    FEATURES[observation].check(observation, name, argument)
    return how, width, observation, argument


def _number(text: str) -> int:
    """Return a number from 1 to `NEIGHBOURS`; 0 for any other text."""
    small = text.isascii() and text.isdecimal() and len(text) <= len(str(NEIGHBOURS))
    return int(text) if small and int(text) <= NEIGHBOURS else 0


def required(names: tuple[str, ...]) -> frozenset[str]:
    """Return what the cache must record for these features."""
    needs = set()
    for name in names:
        _, _, observation, argument = parse(name)
        needs.add(FEATURES[observation].needs.format(argument))
    return frozenset(needs - {""})


def pool(x: Tensor, valid: Tensor, width: int, how: str) -> Tensor:
    """Neighbourhood mean or maximum over ``width`` slots (odd), empty slots left out: (batch, kv_heads, slots)."""
    shape = x.shape
    x, valid = x.reshape(-1, 1, shape[-1]), valid.expand(shape).reshape(-1, 1, shape[-1])
    if how == "max":
        low = torch.where(valid, x, -torch.inf)
        pooled = F.max_pool1d(low, width, 1, width // 2)
    else:
        total = F.avg_pool1d(torch.where(valid, x, 0.0), width, 1, width // 2)
        pooled = total / F.avg_pool1d(valid.float(), width, 1, width // 2).clamp(min=TINY)
    return pooled.reshape(shape)


def standardise(x: Tensor, valid: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the slots of each head; a constant becomes 0, and so do empty slots."""
    x = torch.where(valid, x, 0.0)
    centred = torch.where(valid, x - masked_mean(x, valid), 0.0)
    deviation = masked_mean(centred.square(), valid).sqrt()
    return centred / deviation.clamp(min=1e-4)


def column(view: LayerView, name: str) -> Tensor:
    """Return an observation (batch, kv_heads, slots) fp32 as it is measured, neither pooled nor standardised.

    A view that is made from a trace has no keys and values, but these columns (`LayerView.columns`).

    Raises
    ------
    ConfigError : the view is a trace's, which does not hold this one.
    """
    known = view.columns.get(name)
    if known is not None:
        return known
    if view.source and name not in FROM_SLOTS:
        have = ", ".join(sorted(view.columns.keys() | FROM_SLOTS))
        raise ConfigError(
            f"feature {name!r} is not in the traces {view.source}; they have {have}. Record traces with --features, or "
            "leave the feature out"
        )
    _, _, observation, argument = parse(name)
    return FEATURES[observation].compute(view, argument)


def columns(view: LayerView, names: tuple[str, ...]) -> list[Tensor]:
    """Return the features, pooled where their names say so, not standardised: (batch, kv_heads, slots) fp32 each."""
    base: dict[str, Tensor] = {}
    pooled = []
    for name in names:
        how, width, observation, argument = parse(name)
        plain = f"{observation}:{argument}" if argument else observation
        if plain not in base:
            base[plain] = column(view, plain)
        pooled.append(pool(base[plain], view.valid, width, how) if how else base[plain])
    return pooled


def base_columns(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the features without neighbourhoods from which all of these can be computed, sorted."""
    parts = (parse(name) for name in names)
    return tuple(sorted({f"{name}:{argument}" if argument else name for _, _, name, argument in parts}))


def features(view: LayerView, names: tuple[str, ...]) -> Tensor:
    """Return the features (batch, kv_heads, slots, len(names)) fp32 of every slot, standardised within each head."""
    return torch.stack([standardise(column, view.valid) for column in columns(view, names)], dim=-1)


def different(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of features as they are.

    Raises
    ------
    ConfigError : one of them is unknown.
    ValueError : two of them are one and the same.
    """
    described: dict[tuple[str, int, str, str], str] = {}
    for name in names:
        how, width, observation, argument = parse(name)
        # A neighbourhood of one slot is the slot itself.
        key = (how, width, observation, argument) if width > 1 else ("", 0, observation, argument)
        if key in described:
            raise ValueError(
                f"features {described[key]!r} and {name!r} are one and the same: it would have two weights and be "
                "searched twice; leave one out"
            )
        described[key] = name
    return names


class FeatureOptions(ManagerOptions):
    """Options of managers that look at features of slots."""

    features: tuple[str, ...] = Field(
        LINEAR_20, max_length=1024, description="what each slot is described by; see `evomem list`"
    )
    layers: int = Field(0, ge=0, le=4096, description="layers with weights of their own per head; 0: none")
    heads: int = Field(0, ge=0, le=4096, description="KV heads with weights of their own per layer; 0: none")

    @field_validator("features")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("give at least one feature")
        return different(names)

    @model_validator(mode="after")
    def _both(self) -> Self:
        if bool(self.layers) != bool(self.heads):
            raise ValueError("weights per head need both layers and heads")
        return self
