"""Memory: whether a model family computes the same under the managed attention, tried before it is relied on.

A family is accepted by what its classes look like. Whether it really hands its keys, values and masks on as the
managed attention expects shows only when it runs. So the first `attached` of a model class and configuration runs a
small random copy of the decoder (`evomem.memory.kv.narrow`) twice, over the stock cache and over a slot cache that
evicts
nothing, and compares the outputs: for an input longer than its windows, a left-padded one, and tokens after each.
"""

from __future__ import annotations

import os
import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor

from evomem.errors import EvomemError, UnsupportedModelError
from evomem.memory.kv.narrow import VOCABULARY, WINDOW, narrow, random_model
from evomem.memory.kv.versions import passed
from evomem.memory.view import Decision, LayerView

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VARIABLE = "EVOMEM_SELF_CHECK"
"""Environment variable; 0 switches the self-check off."""
KNOWN_GOOD = frozenset(
    {"decision_transformer", "gemma", "gpt2", "gpt_neox", "llama", "mistral", "phi", "qwen2", "qwen3"}
)
"""Model types that evomem's own tests hold to the stock model; transformers' own classes of them are not checked."""
TOLERANCE = 1e-3
"""Largest difference that is put down to rounding, relative to the largest output (at least 1)."""
MOST_PARAMETERS = 60_000_000
"""A copy larger than this would take seconds; it is not made."""
TOKENS, FURTHER, PADDED = 4 * WINDOW, 2, 7

_done: dict[tuple[type, str], str | None] = {}
"""What came out per decoder class and configuration: None, or why the model is refused."""
_checked: WeakSet[PreTrainedModel] = WeakSet()
"""Models that passed, so that attaching them again costs nothing."""
_lock = threading.RLock()


@dataclass(frozen=True)
class _KeepAll:
    """A policy that evicts nothing."""

    every: int | None = None
    observes: frozenset[str] = frozenset()

    @property
    def schedule(self) -> _KeepAll:
        return self

    def decide(self, view: LayerView) -> Decision:
        return Decision(view.valid)


class SelfCheckWarning(UserWarning):
    """A model could not be checked before it was attached."""


def self_check(model: PreTrainedModel) -> None:
    """Compare a small random copy of ``model`` under the managed attention with the stock model.

    Done once per process for a decoder class and configuration. A model that cannot be copied small is warned about,
    once, and not refused.

    Raises
    ------
    UnsupportedModelError : outputs differ, or the managed attention refuses the model.
    """
    from evomem.memory.kv.attach import attention_modules

    if model in _checked:
        return
    if os.environ.get(VARIABLE, "1").strip().lower() in ("0", "false", "no", "off"):
        return
    decoder = decoder_of(model)
    ours = all(type(m).__module__.startswith("transformers.models.") for m in (decoder, *attention_modules(model)))
    if ours and getattr(decoder.config, "model_type", None) in KNOWN_GOOD:
        _checked.add(model)
        return
    key = type(decoder), repr(decoder.config)
    with _lock:
        if key not in _done:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                _done[key] = _outcome(model, decoder)
        if (refusal := _done[key]) is not None:
            raise UnsupportedModelError(refusal)
    _checked.add(model)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the innermost part of a model that holds all its self-attention: the text decoder of a larger model."""
    from transformers import PreTrainedModel

    from evomem.memory.kv.attach import attention_modules

    wanted = {id(module) for module in attention_modules(model)}
    holding = [
        part
        for part in model.modules()
        if isinstance(part, PreTrainedModel) and wanted <= {id(module) for module in part.modules()}
    ]
    return holding[-1]


def _outcome(model: PreTrainedModel, decoder: PreTrainedModel) -> str | None:
    family = type(model).__name__
    try:
        copy = small_copy(decoder)
        stock = [_read(copy, None, padded) for padded in (0, PADDED)]
    except Exception as error:  # whatever a stranger's classes raise
        warnings.warn(
            f"{family} was not compared with the stock model before it was attached, because no small copy of it could "
            f"be made and run ({type(error).__name__}: {str(error)[:200]}); compare it yourself once with nothing "
            "evicted: evomem.testing.conformance.check_keep_everything",
            SelfCheckWarning,
            stacklevel=5,
        )
        return None
    try:
        managed = [_managed(copy, padded) for padded in (0, PADDED)]
    except Exception as error:  # the stock model ran on the same inputs
        reason = str(error) if isinstance(error, EvomemError) else f"{type(error).__name__}: {str(error)[:300]}"
        return f"{family} cannot be managed, as a self-check on a small copy of it shows: {reason}"
    for name, got, wanted in zip(("an input", "a left-padded input"), managed, stock, strict=True):
        scale = max(1.0, float(wanted.abs().max()))
        worst = float((got - wanted).abs().nan_to_num(nan=torch.inf).max())
        if not worst <= TOLERANCE * scale:
            return (
                f"{family} computes something else under evomem's attention, so evomem refuses it: on a small random "
                f"copy, with nothing evicted, outputs for {name} of {TOKENS} tokens differ by {worst:.3g}, where the "
                f"largest is {scale:.3g}. attach(model, self_check=False) or {VARIABLE}=0 switches this check off"
            )
    return None


def small_copy(decoder: PreTrainedModel) -> PreTrainedModel:
    """Return a random decoder of the same class with a narrow copy of the configuration, running eager attention."""
    from evomem.memory.kv.attach import attention_modules

    config = narrow(decoder.config)
    config._attn_implementation_internal = None
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in type(decoder)(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"the smallest copy has {size:,} parameters")
    copy: PreTrainedModel = random_model(type(decoder), config)
    missing = {type(m) for m in attention_modules(decoder)} - {type(m) for m in attention_modules(copy)}
    if missing:
        raise ValueError(f"the copy has no {', '.join(sorted(kind.__name__ for kind in missing))}")
    copy.set_attn_implementation("eager")
    return copy


@torch.no_grad()
def _read(copy: PreTrainedModel, cache: Any, padded: int) -> Tensor:
    """Outputs for the real tokens of two rows, of which the second has ``padded`` tokens of padding; in two passes."""
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(1)
    vocabulary = min(VOCABULARY, int(copy.config.vocab_size))
    count = TOKENS + FURTHER
    ids = torch.randint(vocabulary // 4, vocabulary - 8, (2, count), generator=generator)
    real = torch.ones(2, count, dtype=torch.bool)
    real[1, :padded] = False
    cache = DynamicCache(config=copy.config) if cache is None else cache
    outputs = []
    for piece in (slice(0, TOKENS), slice(TOKENS, count)):
        mask = {"attention_mask": real[:, : piece.stop].long()} if padded else {}
        outputs.append(copy(input_ids=ids[:, piece], use_cache=True, **passed(cache, copy), **mask)[0])
    return torch.cat(outputs, 1)[real].float()


def _managed(copy: PreTrainedModel, padded: int) -> Tensor:
    from evomem.memory.kv.attach import attached
    from evomem.memory.kv.cache import SlotCache

    with attached(copy, self_check=False):
        cache = SlotCache.for_model(copy, _KeepAll())
        outputs = _read(copy, cache, padded)
    if {layer.seen for layer in cache.layers} != {TOKENS + FURTHER}:
        raise UnsupportedModelError(f"{type(copy).__name__} does not read the cache that it is given")
    return outputs
