"""Manager: what every KV head of a model does on synthetic text, measured once per model in seconds.

| probe | what is measured, in [0, 1] |
|---|---|
| ``induction`` | attention from a token's second occurrence to the token after its first (arXiv 2209.11895) |
| ``echo`` | attention from a token's second occurrence to its first |
| ``retrieval`` | attention from a key's second occurrence to its value, where pairs come again in another order |
| ``beyond_window`` | attention to tokens that are neither sinks nor among the `WINDOW` newest |
| ``sinks`` | attention to the first `SINKS` tokens of the text |
| ``entropy`` | entropy of the attention over the logarithm of the number of tokens read |

Texts are random tokens, the same for every model with the same number of embeddings; nothing of a tokenizer is needed.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evomem.errors import ModelError, UnsupportedModelError
from evomem.memory import attached
from evomem.memory.kv.attach import has_own_memory
from evomem.memory.kv.attention import full_precision
from evomem.memory.kv.keep_all import KeepAll
from evomem.memory.kv.positions import position_limit
from evomem.memory.kv.switch import uncounted
from evomem.memory.kv.versions import passed
from evomem.memory.observations import Wanted, Window
from evomem.memory.observations.windows import WindowObservation
from evomem.modes import evaluating, outside_inference_mode

if TYPE_CHECKING:  # seconds to import; whoever has a model has done so
    from transformers import PreTrainedModel

PROBES = ("induction", "echo", "retrieval", "beyond_window", "sinks", "entropy")
"""Names of the probes, in the order of the last axis of `HeadProbes.values`."""
TOKENS = 150
"""Random tokens that a text repeats; fewer where the model has fewer tokens or positions."""
DRAWS = 4
"""Texts of each kind, over which probes are averaged."""
WINDOW = 64
"""Newest tokens that ``beyond_window`` does not count; half of `TOKENS` where these are fewer than twice as many."""
SINKS = 4
SEED = 0
FEWEST = 8
"""Random tokens below which nothing is measured."""
GRID = 1 << 14
"""Probes are rounded to whole parts of this, so that other numbers of threads hardly ever give other shares."""
REMEMBERED = 64
"""Models whose probes a process remembers."""


@dataclass(frozen=True)
class HeadProbes:
    """What every KV head of one model does on synthetic text.

    Attributes
    ----------
    values : (heads of all layers, probes) fp32 in [0, 1] on the processor, layer by layer; probes as in `PROBES`.
    heads : KV heads of every layer.
    fingerprint : hex SHA-256 of the identity of the model that was measured, see `fingerprint`.
    """

    values: Tensor
    heads: tuple[int, ...]
    fingerprint: str

    def __getitem__(self, probe: str) -> Tensor:
        """Return one probe by name: (heads of all layers,)."""
        return self.values[:, PROBES.index(probe)]

    def by_layer(self) -> tuple[Tensor, ...]:
        """Return the probes of every layer: (kv_heads, probes) each."""
        return torch.split(self.values, list(self.heads))


def fingerprint(model: PreTrainedModel) -> str:
    """Return what a model's probes are filed under: hex SHA-256 of `evomem.models.identity.identity`.

    Other weights, another type of weights or another configuration give another one; another device does not.
    """
    from evomem.models.identity import identity

    return hashlib.sha256(json.dumps(identity(model), sort_keys=True).encode()).hexdigest()


def head_probes(model: PreTrainedModel, key: str | None = None) -> HeadProbes:
    """Return what every KV head of a model does; measured at the first call for a model, then remembered.

    Nothing of the model is changed. It is told from others by its `fingerprint`, so that a model whose weights were
    changed in place is measured anew.

    Parameters
    ----------
    key : the model's `fingerprint`, where it is known.

    Raises
    ------
    UnsupportedModelError : evomem does not manage the model's memory.
    ModelError : it has too few tokens or positions for a text, or its attention is not finite.
    """
    key = key or fingerprint(model)
    with _lock:
        if key not in _remembered:
            _remembered[key] = measure(model, key)
            while len(_remembered) > REMEMBERED:
                _remembered.popitem(last=False)
        _remembered.move_to_end(key)
        return _remembered[key]


_remembered: OrderedDict[str, HeadProbes] = OrderedDict()
_lock = threading.RLock()


@outside_inference_mode()
@torch.no_grad()
def measure(model: PreTrainedModel, key: str | None = None) -> HeadProbes:
    """Measure what every KV head of a model does; see `head_probes`, which remembers it.

    Parameters
    ----------
    key : the model's `fingerprint`, where it is known.
    """
    texts = Texts.of(model)
    parts = [
        _read(model, ids, scores)
        for ids, scores in ((texts.repeated(), texts.repeated_scores), (texts.pairs(), texts.pair_scores))
    ]
    layers = [torch.cat(of_layer, -1) for of_layer in zip(*parts, strict=True)]  # (kv_heads, measured)
    order = [(*texts.REPEATED, *texts.PAIRS).index(probe) for probe in PROBES]
    values = torch.cat(layers)[:, order].clamp(0, 1)
    if not bool(torch.isfinite(values).all()):
        raise ModelError(
            f"{type(model).__name__}: its attention on random tokens is not finite, so nothing can be said about its "
            "heads; load it in another type (bfloat16 has the range that float16 lacks)"
        )
    values = torch.round(values * GRID) / GRID
    return HeadProbes(values, tuple(len(layer) for layer in layers), key or fingerprint(model))


@dataclass(frozen=True)
class Texts:
    """The synthetic texts for a model, and what is measured on them.

    Attributes
    ----------
    first : id that texts begin with, or None.
    ids : (tokens,) int64, ids that texts are drawn from.
    count : random tokens that a text repeats, an even number.
    """

    first: int | None
    ids: Tensor = field(compare=False)
    count: int

    REPEATED = ("induction", "echo", "beyond_window", "sinks", "entropy")
    PAIRS = ("retrieval",)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Texts:
        """Return the texts for a model.

        The lowest quarter of the ids and the last few are left out: special tokens lie there.

        Raises
        ------
        ModelError : there are too few tokens or positions.
        """
        text: Any = model.config.get_text_config(decoder=True)
        size, first = int(text.vocab_size), getattr(text, "bos_token_id", None)
        first = first if isinstance(first, int) and 0 <= first < size else None
        ids = torch.arange(size // 4, max(size - 8, size // 4))
        limit = position_limit(model)
        most = TOKENS if limit is None else min(TOKENS, (limit.tokens - 1) // 2)
        count = min(most, len(ids)) // 2 * 2
        if count < FEWEST:
            raise ModelError(
                f"{type(model).__name__} has {size} tokens and {'any' if limit is None else limit.tokens} positions, "
                f"too few for a text that repeats {FEWEST} tokens, so nothing can be said about what its heads do; "
                "choose an allocation that needs no probes"
            )
        return cls(first, ids, count)

    @property
    def begin(self) -> int:
        """Tokens before the random ones."""
        return 0 if self.first is None else 1

    @property
    def window(self) -> int:
        """Newest tokens that ``beyond_window`` does not count."""
        return min(WINDOW, self.count // 2)

    @property
    def order(self) -> Tensor:
        """In which order the pairs come again: (pairs,) int64."""
        return torch.randperm(self.count // 2, generator=torch.Generator().manual_seed(SEED))

    def draws(self) -> Tensor:
        """Return different random tokens: (draws, count) int64."""
        generator = torch.Generator().manual_seed(SEED + 1)
        return torch.stack([self.ids[torch.randperm(len(self.ids), generator=generator)] for _ in range(DRAWS)])[
            :, : self.count
        ]

    def repeated(self) -> Tensor:
        """Return random tokens twice: (draws, [1 +] 2 count)."""
        return self._begun(self.draws().repeat(1, 2))

    def pairs(self) -> Tensor:
        """Return random pairs (key, value), then the same pairs in another order: (draws, [1 +] 2 count)."""
        pairs = self.draws().reshape(DRAWS, -1, 2)
        return self._begun(torch.cat((pairs, pairs[:, self.order]), 1).flatten(1))

    def _begun(self, ids: Tensor) -> Tensor:
        return ids if self.first is None else torch.cat((torch.full((len(ids), 1), self.first), ids), 1)

    def repeated_scores(self, attention: Tensor) -> Tensor:
        """Return what is measured on a text that repeats itself: (draws, kv_heads, `REPEATED`).

        attention : (draws, kv_heads, group, tokens read, tokens read). Induction, echo and what lies beyond the window
        are those of the group's query head that does it most; the others are means of the group.
        """
        second = torch.arange(self.begin + self.count, attention.shape[-1], device=attention.device)
        rows = attention[..., second, :]
        earlier = (second - self.count).expand(rows.shape[:-1])[..., None]
        tokens = torch.arange(attention.shape[-1], device=attention.device)
        far = (tokens >= SINKS) & (tokens <= second[:, None] - self.window)
        entropy = torch.special.entr(rows).sum(-1) / torch.log(second + 1.0)
        return torch.stack(
            [
                rows.gather(-1, earlier + 1).squeeze(-1).mean(-1).amax(-1),
                rows.gather(-1, earlier).squeeze(-1).mean(-1).amax(-1),
                torch.where(far, rows, 0.0).sum(-1).mean(-1).amax(-1),
                rows[..., :SINKS].sum(-1).mean((-1, -2)),
                entropy.mean((-1, -2)),
            ],
            -1,
        )

    def pair_scores(self, attention: Tensor) -> Tensor:
        """Return what is measured on pairs that come again: (draws, kv_heads, `PAIRS`); as `repeated_scores`."""
        order = self.order.to(attention.device)
        keys = self.begin + self.count + 2 * torch.arange(len(order), device=attention.device)
        rows = attention[..., keys, :]
        values = (self.begin + 2 * order + 1).expand(rows.shape[:-1])[..., None]
        return rows.gather(-1, values).squeeze(-1).mean(-1).amax(-1)[..., None]


@dataclass(frozen=True)
class _Probing(WindowObservation):
    """An observation of the scores of every query's attention; of no registry, for other texts have no such scores."""

    scores: Callable[[Tensor], Tensor] = torch.clone

    name = "probes"

    def of(self, window: Window) -> Tensor:
        """Return (draws, kv_heads, scores) fp32."""
        return self.scores(window.by_head)


def _read(model: PreTrainedModel, ids: Tensor, scores: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return the scores of the model's attention over texts (draws, tokens): per layer (kv_heads, scores) fp32."""
    from evomem.memory import SlotCache

    if has_own_memory(model):
        raise UnsupportedModelError(
            f"the allocation asks what attention heads do, and {type(model).__name__} has a memory of its own in place "
            "of a KV cache; take another allocation: uniform, across_heads, lava, threshold, ..."
        )
    ids, probing = ids.to(model.device), _Probing(ids.shape[1], scores)
    with evaluating(model), uncounted(), attached(model):
        cache = SlotCache.for_model(model, KeepAll())
        cache.wanted = Wanted((probing,))
        cache.reset()
        cache.decides_after_forward = False
        with full_precision(ids):
            model(input_ids=ids, use_cache=True, logits_to_keep=1, **passed(cache, model))
            # Layer by layer, so that the attention of one layer is held at a time.
            return [layer.view().recorded[probing.spec].mean(0).float().cpu() for layer in cache.layers]
