"""Model: Memory Mosaics as a causal language model, in the forms v1 and v2.

A mosaic has no attention and no positions: each layer has contextual units, which store what followed what in this
text, and a persistent one, which stores what holds in all texts. Sources: Zhang et al. 2024 (arXiv 2405.06394, v1),
Zhang and Bottou 2025 (arXiv 2507.03285, v2).

Importing this module makes its classes known to transformers' Auto classes; `evomem.models.load` does so for a folder
whose ``config.json`` has this ``model_type``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from evomem.errors import CacheError, ConfigError
from evomem.memory.kv.due import turns
from evomem.memory.kv.policy import CachePolicy
from evomem.memory.kv.switch import note_pass
from evomem.models.architectures.calls import LOSS_TYPE, Call, MemoryGenerationMixin, keeps_cache, only_cache
from evomem.models.architectures.checks import (
    reading_fields,
    require_counts,
    require_left_padding,
    require_one_text,
    require_rows,
    with_past,
)
from evomem.models.architectures.mosaic_cache import CONTEXTUAL, UNITS, MosaicCache
from evomem.models.architectures.mosaic_decided import DecidedMosaicCache
from evomem.models.architectures.mosaic_units import (
    AdaptiveBandwidth,
    ContextualUnit,
    FixedBandwidth,
    GatedKeys,
    GatedPersistentUnit,
    LeakyKeys,
    Memory,
    PeekingValues,
    PersistentUnit,
)


class MosaicConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Configuration of a `MemoryMosaic`.

    Attributes
    ----------
    form : ``v1`` or ``v2``.
    hidden_size, num_hidden_layers, num_attention_heads : width, layers, and heads of every unit.
    persistent_size : pairs of a persistent unit's head (v1), or width of its SwiGLU (v2).
    short_window : v2: the short memory reads pairs less than so many tokens back (h).
    long_delay : v2: the long memory reads pairs at least so many tokens back (m), when the model is used.
    longest_delay : v2: in training every pass of a layer draws m between ``long_delay`` and this.
    dropout : share of pairs overlooked, and of a unit's output left out, in training.
    """

    model_type = "evomem_mosaic"

    form: Literal["v1", "v2"] = "v1"
    vocab_size: int = 256
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    persistent_size: int = 448
    short_window: int = 256
    long_delay: int = 64
    longest_delay: int = 256
    dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        if self.form not in ("v1", "v2"):
            raise ConfigError(f"mosaic: form {self.form!r}; write v1 or v2")
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "persistent_size")
        require_counts("mosaic", self, sizes)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"mosaic: hidden_size {self.hidden_size} cannot be divided among {self.num_attention_heads} heads"
            )
        if self.short_window < 2 or not 1 <= self.long_delay <= self.longest_delay:
            raise ConfigError(
                f"mosaic: short_window {self.short_window}, long_delay {self.long_delay}, longest_delay "
                f"{self.longest_delay}; a pair can be read from the next token on: at least 2, 1, and long_delay"
            )


class MosaicLayer(nn.Module):
    """One layer: contextual units, whose outputs are concatenated, then a persistent one; both added to the input.

    v1 has one contextual unit; v2 has a short and a long memory. That v2's persistent memory reads what the contextual
    ones have added, as v1's does, is our choice: the paper does not say.
    """

    def __init__(self, config: MosaicConfig) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.contextual_norm, self.persistent_norm = (
            nn.LayerNorm(width, eps=config.layer_norm_eps, bias=False) for _ in range(2)
        )
        self.persistent: nn.Module
        if config.form == "v1":
            unit = ContextualUnit(
                LeakyKeys(width, heads), PeekingValues(width, heads), FixedBandwidth(heads), dropout=config.dropout
            )
            self.contextual = nn.ModuleList([unit])
            self.persistent = PersistentUnit(width, heads, config.persistent_size, config.dropout)
            self.persistent_out: nn.Module = nn.Linear(width, width, bias=False)
        else:
            short, long = (
                ContextualUnit(
                    GatedKeys(width, heads),
                    PeekingValues(width, heads),
                    AdaptiveBandwidth(heads),
                    dropout=config.dropout,
                )
                for _ in range(2)
            )
            short.farthest = config.short_window - 1
            long.nearest, long.drawn_nearest = config.long_delay, config.longest_delay
            self.contextual = nn.ModuleList([short, long])
            self.persistent = GatedPersistentUnit(width, config.persistent_size)
            self.persistent_out = nn.Identity()
        self.contextual_out = nn.Linear(width * len(self.contextual), width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, real: Tensor | None, memories: list[Memory]) -> Tensor:
        """Return (batch, tokens, width) of tokens x (batch, tokens, width).

        real : (batch, tokens) bool, or None: no token is padding. memories : `UNITS` of them.
        """
        normed = self.contextual_norm(x)
        read = [unit(normed, real, memory) for unit, memory in zip(self.contextual, memories, strict=False)]
        x = x + self.dropout(self.contextual_out(torch.cat(read, -1)))
        persistent = self.persistent(self.persistent_norm(x), real, memories[-1])
        added: Tensor = x + self.dropout(self.persistent_out(persistent))
        return added


class MemoryMosaic(MemoryGenerationMixin, PreTrainedModel):
    """A Memory Mosaic that reads tokens and says what comes next.

    What it knows of the text lies in the cache that it is given, so reading in pieces, ``generate``, beams and
    rows of a batch work as with any model, and a cache can be saved and resumed. Tokens cannot be taken back.

    Attributes
    ----------
    embedding, layers, norm, lm_head : token vectors (tied to the head by default), layers, last norm, logits.
    """

    config_class = MosaicConfig
    config: MosaicConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _tied_weights_keys = {"lm_head.weight": "embedding.weight"}  # noqa: RUF012

    def __init__(self, config: MosaicConfig) -> None:
        super().__init__(config)
        self.loss_type = LOSS_TYPE
        self.embedding: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MosaicLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of token vectors."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of token vectors."""
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the matrix of logits."""
        return self.lm_head

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        deviation = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=deviation)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, PersistentUnit):
            for stored in (module.stored_keys, module.stored_values):
                nn.init.normal_(stored, std=stored.shape[-1] ** -0.5)
        elif isinstance(module, MosaicLayer):
            # As GPT-2: what is added to the residual stream shrinks with the number of layers.
            last = (
                module.persistent.down if isinstance(module.persistent, GatedPersistentUnit) else module.persistent_out
            )
            for out in (module.contextual_out, last):
                nn.init.normal_(out.weight, std=deviation / (2 * self.config.num_hidden_layers) ** 0.5)  # type: ignore[arg-type]

    @property
    def units(self) -> int:
        """Units that keep something of the text: layers of the cache."""
        return UNITS * len(self.layers)

    def new_cache(self) -> MosaicCache:
        """Return an empty cache."""
        return MosaicCache(self.units)

    def decided_cache(self, policy: CachePolicy) -> DecidedMosaicCache:
        """Return an empty cache about whose pairs a manager decides: the bounded store of the papers' outlook.

        It decides every ``schedule.every`` tokens, counted with padding; without ``every``, when its ``decide`` is
        called.

        Raises
        ------
        ConfigError : the manager observes something that means nothing here.
        """
        contextual = CONTEXTUAL[self.config.form] * len(self.layers)
        return DecidedMosaicCache(contextual, self.units - contextual, policy)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits (batch, kept tokens, vocab_size) for the token after each, and the cache.

        Parameters
        ----------
        input_ids : (batch, tokens) int64.
        attention_mask : (batch, tokens ever read), 0 = padding, which stands on the left; None: there is none.
        past_key_values, cache : of `new_cache` or `decided_cache`, by its older or its newer name; None: nothing was
            read before.
        logits_to_keep : how many of the last tokens have logits (0: all), or the indices of those that have.
        kwargs : labels, output_hidden_states, return_dict, as transformers' decoders take them
            (`evomem.models.architectures.calls`).

        Raises
        ------
        ModelError : no tokens; a mask that is not (batch, tokens); labels that do not fit; attention weights are asked
            for.
        CacheError : another kind of cache, or of other rows, or read with another configuration; padding on the right,
            or other than the tokens were read with; a pass before was cut short.
        """
        call = Call.of(self, input_ids, logits_to_keep, kwargs, "a mosaic has no attention")
        assert input_ids is not None  # `Call.of`
        given = only_cache("a mosaic", past_key_values, cache)
        memory = self.new_cache() if given is None else self._checked(given, len(input_ids))
        real = (
            None if attention_mask is None else self._real(attention_mask, len(input_ids), input_ids.shape[1], memory)
        )
        require_one_text("a mosaic", kwargs.get("position_ids"), len(input_ids), input_ids.shape[1], real)
        memory.require_reader(reading_fields(self.config))
        if isinstance(memory, MosaicCache):
            if not memory.get_seq_length():
                memory.begin_rows(len(input_ids), input_ids.device)
            if real is not None:
                memory.note_padding(real)
        decided = isinstance(memory, DecidedMosaicCache)
        note_pass(self, memory if decided else None)  # type: ignore[arg-type]
        every = memory.policy.schedule.every if isinstance(memory, DecidedMosaicCache) else None
        embedded, (batch, tokens), at = self.embedding(input_ids), input_ids.shape, 0
        parts = call.parts(len(self.layers))
        memory.interrupted = True  # if an error ends the pass, some units have read what others have not
        for end, due in turns(memory.get_seq_length(), tokens, (0,), every):
            x = embedded[:, at:end]
            for index, layer in enumerate(self.layers):
                memories = memory.memories(index, CONTEXTUAL[self.config.form], batch)
                if call.hidden_states:
                    parts[index].append(x)
                x = layer(x, None if real is None else real[:, at:end], memories)
            parts[-1].append(x)
            if any(due) and isinstance(memory, DecidedMosaicCache):
                memory.decide()
            at = end
        memory.interrupted = False
        return call.answer_parts(self, parts, memory if keeps_cache(self, given, use_cache) else None)

    def _checked(self, cache: Any, rows: int) -> MosaicCache | DecidedMosaicCache:
        count = len(cache.parts) if isinstance(cache, DecidedMosaicCache) else len(cache)
        if not isinstance(cache, MosaicCache | DecidedMosaicCache) or count != self.units:
            raise CacheError(
                f"a mosaic was given {type(cache).__name__} of {count} layers as its cache; give it "
                "model.new_cache(), model.decided_cache(manager), or no cache"
            )
        cache.require_whole()
        average = cache.layers[0].average
        require_rows(None if average is None else len(average), rows)
        return cache

    @staticmethod
    def _real(mask: Tensor, rows: int, tokens: int, memory: MosaicCache | DecidedMosaicCache) -> Tensor:
        """Return which of the new tokens are no padding, (rows, tokens) bool; see `forward`."""
        seen, start = memory.get_seq_length(), memory.layers[0].start
        real, _ = with_past(mask, rows, tokens, seen, start, "a mosaic", "what is read follows from its keys")
        require_left_padding(real, "a mosaic's averages would run through it")
        return real[:, -tokens:]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Tell transformers that a cache of keys and values is none for this model."""
        return False


AutoConfig.register(MosaicConfig.model_type, MosaicConfig, exist_ok=True)
AutoModelForCausalLM.register(MosaicConfig, MemoryMosaic, exist_ok=True)
