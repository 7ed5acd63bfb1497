"""Plug-in: a manager as a press of kvpress, the library of KV-cache compression methods.

kvpress wants transformers < 5.3 and evomem's own caches a later one, so the two live in separate environments. There::

    pip install kvpress
    pip install --no-deps PATH  # evomem-toolkit's wheel or checkout

Loading plug-ins, scoring and this module need nothing of evomem's own caches; `MemoryManager.attach` does, and is for
the other environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evomem.errors import ConfigError
from evomem.managers import MemoryManager
from evomem.managers.allocation import LayerAllocation, Uniform
from evomem.memory import LayerView, layer_view
from evomem.memory.kv.due import check_heads
from evomem.memory.kv.parallel import check_parallel
from evomem.memory.kv.recompute import recomputed
from evomem.memory.kv.rotary import Rotary, find_rotaries, rotate_half

try:
    from kvpress import ScorerPress
    from kvpress.utils import compute_n_kept, get_prerope_query_states
except ImportError as error:
    raise ConfigError(
        f"kvpress cannot be imported here ({error}). It wants transformers < 5.3, which evomem's own caches do not, so "
        "it needs an environment of its own: pip install kvpress && pip install --no-deps PATH (evomem-toolkit's wheel)"
    ) from error

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EvoMemPress(ScorerPress):  # type: ignore[misc]
    """Compresses a context, once and after it was read, to what a manager keeps.

    >>> press = EvoMemPress(load("my-plugin"))                                       # doctest: +SKIP
    >>> pipeline("kv-press-text-generation", ...)(context, question=..., press=press)  # doctest: +SKIP

    What is equal to ``manager.attach(model)`` with a schedule *once*: the observations, so the scores, and which slots
    of which head are kept. What is not:

    * Managers that keep equally many slots in every head and layer (the allocation ``uniform``) evict physically. Where
      heads or layers differ (NAMM, adakv, pyramidkv, shares of the budget per layer) kvpress has no room for it: what
      is evicted is hidden as by its AdaKVPress, by keys that get next to no attention, and not freed. Not with eager
      attention.
    * kvpress compresses once. Refused are a manager that decides every so many tokens, and a press around this one that
      hands over a context in pieces.
    * Padded batches, windows of attention shorter than the context, and forgetting (decay) are refused.

    Parameters
    ----------
    manager : a manager, or the folder or repository of a plug-in.
    compression_ratio : share of the tokens to evict. It overrides the manager's budget, by kvpress's rounding: the
        budget is ⌊tokens (1 - ratio)⌋ slots per head. None: the manager's budget counts.

    Raises
    ------
    ConfigError : a manager or input that kvpress cannot carry out, as above.
    """

    def __init__(self, manager: MemoryManager | str | Path, compression_ratio: float | None = None) -> None:
        if not isinstance(manager, MemoryManager):
            from evomem.plugins import load

            manager = load(manager)
        if manager.schedule.every is not None:
            raise ConfigError(
                f"manager {manager.name!r} decides every {manager.schedule.every} tokens, kvpress once, after the "
                "context; give EvoMemPress(manager.with_options(every=None))"
            )
        if manager.whole_model:
            raise ConfigError(
                f"manager {manager.name!r}: allocation {manager.allocation.name!r} needs all layers at once, and "
                "kvpress compresses layer by layer; give another allocation"
            )
        self.manager = manager
        self._ratio: float | None = None
        if compression_ratio is not None:
            self.compression_ratio = compression_ratio
        self._rotaries: tuple[Rotary | None, ...] = ()
        self._heads: int | None = None  # KV heads of the first layer

    def __repr__(self) -> str:
        return f"EvoMemPress({self.manager!r}, compression_ratio={self._ratio})"

    @property
    def compression_ratio(self) -> float:
        """Share of the tokens that is evicted; raises `ConfigError` where only the length of a context gives one."""
        budget = self.manager.options.budget
        if self._ratio is None and not isinstance(budget, float):
            raise ConfigError(
                f"manager {self.manager.name!r} has budget {budget!r}, which is no share of a context; give "
                "EvoMemPress(manager, compression_ratio=...) to use it inside another press"
            )
        return self._ratio if self._ratio is not None else 1 - float(budget or 0)

    @compression_ratio.setter
    def compression_ratio(self, ratio: float) -> None:
        if not 0 <= ratio < 1:
            raise ConfigError(f"compression_ratio: {ratio!r} is not a share in [0, 1)")
        self._ratio = ratio

    # ---- what kvpress calls ---------------------------------------------------------------------------------------

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Find the model's rotary embeddings, which queries are turned by, and what its heads do, if that is asked for.

        Raises `UnsupportedModelError` for a model whose heads are split over processes, if the manager compares heads.
        """
        self.manager = self.manager.for_model(model)
        check_parallel(model, self.manager, model.config.get_text_config(decoder=True).num_hidden_layers)
        if self.manager.observes:
            self._rotaries = find_rotaries(model, model.config.get_text_config(decoder=True).num_hidden_layers)

    def score(
        self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
    ) -> Tensor:
        """Return scores (batch, kv_heads, tokens) fp32, protected tokens infinite: what other presses build upon."""
        view = self._view(module, hidden_states, keys, values, kwargs)
        manager = self._sized(keys.shape[2])
        scores, here = manager.score(view).float(), manager.on(view.slots.device)
        if not isinstance(here.allocation, LayerAllocation):
            return scores
        return here.ends.mark(scores, view, view.valid, here.rule.layer_limit(view, here.shares()))

    def compress(
        self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values (batch, kv_heads, kept, head_dim) that the manager keeps."""
        batch, heads, tokens, _ = keys.shape
        manager = self._sized(tokens)
        decision = manager.decide(self._view(module, hidden_states, keys, values, kwargs))
        if decision.decay is not None:
            raise ConfigError(f"manager {manager.name!r} lets slots fade (decay), which kvpress has no way to do")
        if bool(decision.keep.all()):
            return keys, values
        # Other allocations share a budget unequally; `admit` takes tokens off some heads.
        if isinstance(manager.allocation, Uniform) and type(manager).admit is MemoryManager.admit:
            index = decision.keep.nonzero()[:, 2].view(batch, heads, -1, 1)
            return tuple(x.gather(2, index.expand(-1, -1, -1, x.shape[3])) for x in (keys, values))  # type: ignore[return-value]
        if module.config._attn_implementation == "eager":  # type: ignore[union-attr]
            raise ConfigError(
                f"manager {manager.name!r} keeps different numbers of slots per head or layer, which kvpress can only "
                'hide, and not with eager attention; load the model with attn_implementation="sdpa"'
            )
        module.masked_key_indices = (~decision.keep).nonzero(as_tuple=True)  # type: ignore[assignment]
        return keys, values

    # ---- what the manager sees ------------------------------------------------------------------------------------

    def _sized(self, tokens: int) -> MemoryManager:
        """Return the manager with the budget that counts for a context of so many tokens."""
        if self._ratio is None:
            return self.manager
        return self.manager.with_options(budget=tokens if not self._ratio else compute_n_kept(tokens, self._ratio))

    def _view(self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, kwargs: Any) -> LayerView:
        """Return what the manager sees of the layer, its observations computed again from the hidden states."""
        _require_whole(module, kwargs.get("attention_mask"), hidden_states.shape[1])
        self._heads = keys.shape[1] if not module.layer_idx else self._heads or keys.shape[1]
        check_heads(self.manager, (self._heads, keys.shape[1]))
        if not hidden_states.shape[1] == keys.shape[2] == kwargs["position_embeddings"][0].shape[1]:
            raise ConfigError(
                f"{keys.shape[2]} keys of {hidden_states.shape[1]} tokens read: EvoMemPress judges whole contexts, and "
                "the press around it hands over pieces (BlockPress, ChunkPress, DecodingPress); use it without that one"
            )
        layer, observes = int(module.layer_idx), self.manager.observes
        recorded: dict[str, Tensor] = {}
        if observes:
            recorded = recomputed(
                observes,
                _rotated(get_prerope_query_states(module, hidden_states), *kwargs["position_embeddings"]),
                keys,
                scale=float(module.scaling),
                softcap=getattr(module, "attn_logit_softcapping", None),
                rotary=self._rotaries[layer],
            )
        layers = int(module.config.num_hidden_layers)
        return layer_view(keys, values, recorded=recorded, observes=observes, layer=layer, layers=layers)


def _rotated(query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries (batch, heads, tokens, head_dim) turned by cos and sin (batch, tokens, rotary width)."""
    width = cos.shape[-1]
    turned = query[..., :width] * cos[:, None] + rotate_half(query[..., :width]) * sin[:, None]
    return torch.cat((turned, query[..., width:]), dim=-1)


def _require_whole(module: Any, mask: Tensor | None, tokens: int) -> None:
    """Raise `ConfigError` when some token of the context is hidden from the newest one."""
    window = getattr(module, "sliding_window", None)
    hidden = window is not None and window < tokens
    if mask is not None:
        last = mask if mask.dim() == 2 else mask[..., -1, :]
        hidden |= bool((last < 0).any() if last.is_floating_point() else (~last.bool()).any())
    if hidden:
        raise ConfigError(
            "EvoMemPress reads whole contexts: this batch is padded, or the model's attention has a window shorter "
            f"than the {tokens} tokens; give one context at a time, and a model with full attention"
        )
