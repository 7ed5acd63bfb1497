"""Model: a transformer whose attention sees a short window and a memory matrix; all that is older goes through it.

Each layer has a matrix M (batch, matrix_heads, slots, width). A token reads c = Σ_i softmax(M k_r)_i M_i, attends with
Q' = Q + 1 cᵀ W_c over K' = [K; M W_K] and V' = [V; M W_V], where K and V are those of the window's tokens, and
then writes (`evomem.memory.explicit.matrix_rules`). It sees M as the tokens before it left it.

The source leaves open, and this model chooses: rotary positions inside the window and none on the rows of M; keys and
values of M are made of the last ``reach`` inputs besides the token's own, so that one write can join a key and the
value after it; a gate σ(g) that stores more or less of a write; the rows that M begins with are learned.

Importing this module makes its classes known to transformers' Auto classes; `evomem.models.load` does so for a folder
whose ``config.json`` has this ``model_type``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from evomem.errors import CacheError, ConfigError, ModelError
from evomem.memory.explicit.matrix import MatrixCache, ended_rows
from evomem.memory.explicit.matrix_rows import MatrixRowsCache
from evomem.memory.explicit.matrix_rules import check_rule
from evomem.memory.kv.due import turns
from evomem.memory.kv.policy import CachePolicy
from evomem.memory.kv.switch import note_pass
from evomem.models.architectures.calls import LOSS_TYPE, Call, MemoryGenerationMixin, keeps_cache, only_cache
from evomem.models.architectures.checks import (
    SIZES,
    reading_fields,
    require_counts,
    require_left_padding,
    require_one_text,
    require_rotary_heads,
    require_rows,
    with_past,
)
from evomem.models.architectures.memory_matrix_layers import MatrixBlock, RowMemory, WindowAttention


class MemoryMatrixConfig(PreTrainedConfig):
    """Configuration.

    Attributes
    ----------
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size : as in other decoders.
    window : tokens that attention sees, the token itself included.
    matrix_slots, matrix_width, matrix_heads : N and D of M, and how many of them a layer has; attention heads share
        them evenly. 0 slots: no memory, attention sees the window only.
    rule : how M is written: ``leaky``, ``ema``, ``erase_add`` or ``gated``.
    decay : λ that a slot begins with, in (0, 1].
    decay_per_slot : λ is learned, one for every slot.
    matrix_layers : the layers that have a memory; None: all.
    reach : inputs before the token's own of which keys and values of M are made.
    """

    model_type = "evomem_memory_matrix"

    vocab_size: int = 64
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 128
    window: int = 16
    matrix_slots: int = 32
    matrix_width: int = 64
    matrix_heads: int = 1
    matrix_layers: list[int] | None = None
    rule: str = "erase_add"
    decay: float = 1.0
    decay_per_slot: bool = False
    reach: int = 1
    initializer_range: float = 0.05
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        check_rule(self.rule)
        require_counts("memory matrix", self, (*SIZES, "window", "matrix_width"))
        if self.matrix_slots < 0 or self.reach < 0:
            raise ConfigError("memory matrix: matrix_slots and reach are counts; give 0 or more")
        require_rotary_heads("memory matrix", self)
        if self.matrix_heads < 1 or self.num_attention_heads % self.matrix_heads:
            raise ConfigError(
                f"memory matrix: {self.num_attention_heads} attention heads cannot share {self.matrix_heads} matrices "
                "evenly"
            )
        layers = self.memory_layers
        if not set(layers) <= set(range(self.num_hidden_layers)) or layers != sorted(set(layers)):
            raise ConfigError(
                f"memory matrix: matrix_layers is {self.matrix_layers}; give numbers of layers, from 0 to "
                f"{self.num_hidden_layers - 1}, ascending and each once"
            )
        if not 0 < self.decay <= 1 or (self.decay_per_slot and self.decay == 1):
            raise ConfigError(
                f"memory matrix: decay is {self.decay}; give a number in (0, 1], below 1 where every slot learns its "
                "own"
            )
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def memory_layers(self) -> list[int]:
        """The layers that have a memory."""
        layers = list(range(self.num_hidden_layers)) if self.matrix_layers is None else self.matrix_layers
        return layers if self.matrix_slots else []


class MemoryMatrix(MemoryGenerationMixin, PreTrainedModel):
    """A small causal language model with a memory matrix in every layer; see the module."""

    config_class = MemoryMatrixConfig
    config: MemoryMatrixConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: MemoryMatrixConfig) -> None:
        super().__init__(config)
        self.loss_type = LOSS_TYPE
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(MatrixBlock(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a new model begins with."""
        deviation = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=deviation)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, RowMemory):
            nn.init.normal_(module.initial)  # rows that were equal would stay equal
            if self.config.decay_per_slot:
                nn.init.constant_(module.decay_logit, math.log(self.config.decay / (1 - self.config.decay)))
        elif isinstance(module, WindowAttention) and module.memory is not None:
            for part in (module.context_query, module.row_key, module.row_value):
                nn.init.normal_(part, std=deviation)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own cache

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of tokens."""
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        """Return the layer that gives logits."""
        head: nn.Module = self.lm_head
        return head

    def new_cache(self) -> MatrixCache:
        """Return an empty memory for further sequences."""
        return MatrixCache(len(self.blocks))

    def decided_cache(self, policy: CachePolicy) -> MatrixRowsCache:
        """Return an empty memory about which a manager decides: what is stored, what leaves, what fades.

        It decides every ``schedule.every`` tokens, counted with padding; without ``every``, when its ``decide`` is
        called.

        Raises
        ------
        ModelError : the model has no memory.
        ConfigError : the manager observes something that means nothing here.
        """
        if not self.config.memory_layers:
            raise ModelError("this model has no memory matrix (matrix_slots 0, or no matrix_layers) to decide about")
        return MatrixRowsCache(len(self.blocks), self.config.memory_layers, policy)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MatrixCache | MatrixRowsCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: MatrixCache | MatrixRowsCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits (batch, kept tokens, vocab_size), and the memory after the tokens.

        Parameters
        ----------
        input_ids : (batch, tokens) int64.
        attention_mask : (batch, tokens ever read), 0 = padding; None: there is none. Padding is neither seen nor
            written.
        position_ids : ignored but for differences between them; by default after what the memory has read.
        past_key_values, cache : of `new_cache` or `decided_cache`, by its older or its newer name; None: the memory
            begins empty.
        logits_to_keep : how many of the last tokens have logits (0: all), or the indices of those that have.
        kwargs : labels, output_hidden_states, return_dict, as transformers' decoders take them
            (`evomem.models.architectures.calls`).

        Raises
        ------
        ModelError : another kind of cache, or a mask that is not (batch, tokens); no tokens; labels that do not fit;
            attention weights are asked for.
        CacheError : an earlier pass over the cache was cut short, or it has other rows, or was read with another
            configuration; a token stands behind padding that stands behind a token; padding is other than the tokens
            were read with.
        """
        call = Call.of(
            self,
            input_ids,
            logits_to_keep,
            kwargs,
            "every token sees rows of M and a window of its own; hidden states are returned",
        )
        assert input_ids is not None  # `Call.of`
        given = only_cache("a memory matrix", past_key_values, cache)
        if given is not None and not isinstance(given, MatrixCache | MatrixRowsCache):
            raise ModelError(
                f"a memory matrix was given a {type(given).__name__}; give it model.new_cache(), "
                "model.decided_cache(manager), or none"
            )
        cache = self.new_cache() if given is None else given
        cache.require_whole()
        note_pass(self, cache if isinstance(cache, MatrixRowsCache) else None)  # type: ignore[arg-type]
        (batch, tokens), seen = input_ids.shape, cache.get_seq_length()
        window = cache.layers[0].window_keys
        require_rows(None if window is None else len(window), batch)
        real = None if attention_mask is None else self._real(attention_mask, batch, tokens, cache)
        require_one_text("a memory matrix", position_ids, batch, tokens, real)
        if position_ids is None:
            position_ids = torch.arange(seen, seen + tokens, device=input_ids.device)[None]
        cache.require_reader(reading_fields(self.config))
        if real is None and cache.right_padded:
            self._require_open(ended_rows(cache.layers[0]))
        if isinstance(cache, MatrixCache):
            if not seen:
                cache.begin_rows(batch, input_ids.device)
            if real is not None:
                cache.note_padding(real)
        if real is not None:
            cache.right_padded = cache.right_padded or not bool(real[:, -1].all())
        embedded, at, parts = self.embed(input_ids), 0, call.parts(len(self.blocks))
        cache.interrupted = True  # if an error ends the pass, some layers have read what others have not
        for end, due in turns(
            seen, tokens, (0,), None if isinstance(cache, MatrixCache) else cache.policy.schedule.every
        ):
            hidden: Tensor = embedded[:, at:end]
            positions, shown = position_ids[:, at:end], None if real is None else real[:, at:end]
            for index, (block, layer) in enumerate(zip(self.blocks, cache.by_block(batch), strict=True)):
                if call.hidden_states:
                    parts[index].append(hidden)
                hidden = block(hidden, positions, shown, layer)
            parts[-1].append(hidden)
            if any(due) and not isinstance(cache, MatrixCache):
                cache.decide()
            at = end
        cache.interrupted = False
        return call.answer_parts(self, parts, cache if keeps_cache(self, given, use_cache) else None)

    def _real(self, mask: Tensor, batch: int, tokens: int, cache: MatrixCache | MatrixRowsCache) -> Tensor:
        """Return which of the new tokens are no padding, (batch, tokens) bool; see `forward`."""
        seen, first = cache.get_seq_length(), cache.layers[0]
        start = first.start if seen else None
        real, whole = with_past(
            mask, batch, tokens, seen, start, "a memory matrix", "who is seen follows from its window"
        )
        if self.config.window == 1:
            require_left_padding(real, "a window of one token does not keep that a row has ended")
        ended = ended_rows(first) if seen else None
        if ended is not None:
            if whole and bool((ended & real[:, seen - 1]).any()):
                raise CacheError(
                    "attention_mask has other padding than the tokens were read with; reset() the memory and read again"
                )
            self._require_open(ended & real[:, -tokens:].any(1))
        padding = ~real & (real.long().cumsum(1) > 0)  # behind a token
        self._require_open((real & (padding.long().cumsum(1) > 0)).any(1))
        return real[:, -tokens:]

    @staticmethod
    def _require_open(ended: Tensor | None) -> None:
        """Raise `CacheError` where a row has a token behind padding that is behind a token: (batch,) bool."""
        if ended is not None and bool(ended.any()):
            raise CacheError(
                "attention_mask has padding between tokens; a memory matrix's window and looks back would run through "
                "it: pad on the left (tokenizer.padding_side = 'left')"
            )


AutoConfig.register(MemoryMatrixConfig.model_type, MemoryMatrixConfig, exist_ok=True)
AutoModelForCausalLM.register(MemoryMatrixConfig, MemoryMatrix, exist_ok=True)
