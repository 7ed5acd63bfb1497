"""Model: Titans, a language model whose layers have neural memories, in the variants LMM, MAC, MAG and MAL.

Each layer has a small network M whose weights learn while the text is read (`evomem.memory.explicit.neural_rules`).
Source: Behrouz et al. 2024, Titans (arXiv 2501.00663). What the paper leaves open and this model chooses is listed in
docs/titans.md.

Importing this module makes its classes known to transformers' Auto classes; `evomem.models.load` does so for a folder
whose ``config.json`` has this ``model_type``.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from evomem.errors import ConfigError, ModelError
from evomem.memory.explicit.neural import NeuralCache
from evomem.memory.explicit.neural_gates import NeuralRule
from evomem.memory.explicit.neural_rules import DEPTHS, matrices, widths_of
from evomem.memory.explicit.neural_slots import NeuralSlotsCache
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
from evomem.models.architectures.titans_layers import NeuralMemory, PrefixAttention, Projection, TitansBlock

Variant = Literal["lmm", "mac", "mag", "mal"]


class TitansConfig(PreTrainedConfig):
    """Configuration.

    Attributes
    ----------
    variant : ``lmm``: the memory alone; ``mac``: memory as context; ``mag``: as gate; ``mal``: as layer.
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size : as in other decoders.
    window : tokens that attention of ``mag`` and ``mal`` sees, the token itself included.
    segment : tokens of a segment: surprise is measured by the weights that a segment begins with, and attention of
        ``mac`` sees the segment. 1: every token by the weights before it.
    persistent : tokens that attention always sees, learned.
    depth : matrices of M, 1 to 4.
    expansion : how many times as wide as its input M's hidden layers are.
    memory_heads : neural memories of a layer, each of an equal part of the width.
    conv : tokens over which keys, values and queries of M are mixed; 1: none.
    rate : the largest θ.
    momentum, forgetting : whether there are past surprise (η) and forgetting (α).
    gradient_limit : longest gradient of a matrix of M at one token; see `neural_rules.surprise`.
    """

    model_type = "evomem_titans"

    variant: Variant = "mac"
    vocab_size: int = 64
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 128
    window: int = 16
    segment: int = 16
    persistent: int = 4
    depth: int = 2
    expansion: int = 1
    memory_heads: int = 1
    conv: int = 4
    rate: float = 1.0
    momentum: bool = True
    forgetting: bool = True
    gradient_limit: float = 10.0
    initializer_range: float = 0.05
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.variant not in get_args(Variant):
            raise ConfigError(f"titans: variant is {self.variant!r}; give one of {', '.join(get_args(Variant))}")
        if self.depth not in DEPTHS:
            raise ConfigError(f"titans: depth is {self.depth}; give {DEPTHS[0]} to {DEPTHS[-1]} matrices")
        require_counts("titans", self, (*SIZES, "window", "segment", "expansion", "memory_heads", "conv"))
        if self.persistent < 0:
            raise ConfigError(f"titans: persistent is {self.persistent}; give the number of tokens, 0 or more")
        require_rotary_heads("titans", self)
        if self.hidden_size % self.memory_heads:
            raise ConfigError(
                f"titans: hidden_size {self.hidden_size} cannot be divided among {self.memory_heads} memory_heads"
            )
        for name in ("rate", "gradient_limit"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"titans: {name} is {getattr(self, name)}; give a number above 0")
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]


class Titans(MemoryGenerationMixin, PreTrainedModel):
    """A small causal language model with a neural memory in every layer; see the module.

    What it knows of a text lies in the cache that it is given (`NeuralCache`), whose size does not depend on how long
    the text is; there is one memory for every sequence of a batch. Tokens cannot be taken back.
    """

    config_class = TitansConfig
    config: TitansConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.loss_type = LOSS_TYPE
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(TitansBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a new model begins with."""
        deviation = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=deviation)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, Projection):
            bound = module.taps.shape[1] ** -0.5
            if module.taps.shape[1] > 1:
                nn.init.uniform_(module.taps, -bound, bound)
        elif isinstance(module, PrefixAttention):
            nn.init.normal_(module.persistent)  # as long as tokens after a norm
        elif isinstance(module, NeuralMemory):
            for matrix in matrices(module.initial, module.widths):
                nn.init.normal_(matrix, std=matrix.shape[-1] ** -0.5)
            forget, momentum, rate = module.gates.bias.view(3, -1)
            nn.init.constant_(forget, -5.0)
            nn.init.constant_(momentum, -1.0)
            nn.init.constant_(rate, 0.0)

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

    def new_cache(self) -> NeuralCache:
        """Return an empty memory for further sequences."""
        return NeuralCache(len(self.blocks))

    def decided_cache(self, policy: CachePolicy) -> NeuralSlotsCache:
        """Return an empty memory about which a manager decides: which tokens are stored, and with which gates.

        It decides about every row every ``schedule.every`` tokens of its own, which must divide a segment; without
        ``every``, when its ``decide`` is called.

        Raises
        ------
        ConfigError : the manager would decide when no segment ends, or observes something that means nothing here.
        """
        return NeuralSlotsCache(len(self.blocks), self._rule(), policy)

    def _rule(self) -> NeuralRule:
        """Return how the memories learn."""
        config = self.config
        return NeuralRule(
            config.segment, widths_of(config.hidden_size // config.memory_heads, config.depth, config.expansion),
            config.gradient_limit, config.rate, config.momentum, config.forgetting,
        )  # fmt: skip

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: NeuralCache | NeuralSlotsCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: NeuralCache | NeuralSlotsCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits (batch, kept tokens, vocab_size), and the memory after the tokens.

        Parameters
        ----------
        input_ids : (batch, tokens) int64.
        attention_mask : (batch, tokens ever read), 0 = padding, which stands on the left; None: there is none. Padding
            is neither seen nor learnt.
        position_ids : ignored but for differences between them; by default after what the memory has read.
        past_key_values, cache : of `new_cache` or `decided_cache`, by its older or its newer name; None: the memory
            begins empty.
        logits_to_keep : how many of the last tokens have logits (0: all), or the indices of those that have.
        kwargs : labels, output_hidden_states, return_dict, as transformers' decoders take them
            (`evomem.models.architectures.calls`).

        Raises
        ------
        ModelError : another kind of cache, or of another model; a mask that is not (batch, tokens) of 0 and 1; several
            texts in a row; no tokens; labels that do not fit; attention weights are asked for.
        CacheError : an earlier pass over the cache was cut short, or it has other rows, or was read with another
            configuration; padding behind a token.
        """
        why = "what a token has of those before its window lies in weights; hidden states are returned"
        call = Call.of(self, input_ids, logits_to_keep, kwargs, why)
        assert input_ids is not None  # `Call.of`
        given = only_cache("a Titans model", past_key_values, cache)
        (batch, tokens), memory = input_ids.shape, self._checked(given, len(input_ids))
        decided = memory if isinstance(memory, NeuralSlotsCache) else None
        note_pass(self, decided)  # type: ignore[arg-type]
        seen = memory.get_seq_length()
        real = None if attention_mask is None else self._real(attention_mask, batch, tokens, memory)
        require_one_text("a Titans model", position_ids, batch, tokens, real)
        if position_ids is None:
            position_ids = torch.arange(seen, seen + tokens, device=input_ids.device)[None]
        memory.require_reader(reading_fields(self.config))
        if not seen:
            memory.begin_rows(batch, input_ids.device)
        if real is not None:
            memory.note_padding(real)
        embedded, at, parts = self.embed(input_ids), 0, call.parts(len(self.blocks))
        layers: list[Any] = list(memory.layers)
        memory.interrupted = True  # if an error ends the pass, some layers have read what others have not
        every = None if decided is None else decided.policy.schedule.every  # divides a segment
        for end, due in turns(seen, tokens, memory.starts, every or self.config.segment):
            hidden: Tensor = embedded[:, at:end]
            positions, shown = position_ids[:, at:end], None if real is None else real[:, at:end]
            ended = None if all(due) else torch.tensor(due, device=hidden.device)
            for index, (block, layer) in enumerate(zip(self.blocks, layers, strict=True)):
                if call.hidden_states:
                    parts[index].append(hidden)
                hidden = block(hidden, positions, shown, layer)
                if any(due):
                    layer.end_segment(ended)
            parts[-1].append(hidden)
            if decided is not None and every is not None and any(due):
                decided.decide_rows(due)
            elif decided is not None and any(due) and end < tokens:
                decided.say_unasked("segment", self.config.segment)
            at = end
        memory.interrupted = False
        return call.answer_parts(self, parts, memory if keeps_cache(self, given, use_cache) else None)

    def _checked(self, cache: Any, rows: int) -> NeuralCache | NeuralSlotsCache:
        """Return the cache to read on with; see `forward`."""
        if cache is None:
            return self.new_cache()
        if not isinstance(cache, NeuralCache | NeuralSlotsCache) or len(cache.layers) != len(self.blocks):
            what = f"{type(cache).__name__} of {len(cache.layers)} layers" if hasattr(cache, "layers") else repr(cache)
            raise ModelError(
                f"a Titans model of {len(self.blocks)} layers was given {what}; give it model.new_cache(), or "
                "model.decided_cache(manager)"
            )
        cache.require_whole()
        if isinstance(cache, NeuralSlotsCache):
            cache.require_rule(self._rule())
        layers: list[Any] = list(cache.layers)
        for block, layer in zip(self.blocks, layers, strict=True):
            initial: Any = block.memory.initial  # type: ignore[union-attr]
            if layer.memory is not None and layer.memory.shape[1:] != initial.shape:
                raise ModelError(
                    f"a neural memory of {tuple(layer.memory.shape[1:])} numbers (heads, numbers) was given to a model "
                    f"whose memories have {tuple(initial.shape)}; give it a cache of its own"
                )
        require_rows(len(cache.starts) if cache.get_seq_length() else None, rows)
        return cache

    @staticmethod
    def _real(mask: Tensor, batch: int, tokens: int, memory: NeuralCache | NeuralSlotsCache) -> Tensor | None:
        """Return which of the new tokens are no padding, (batch, tokens) bool; None: all are. See `forward`."""
        seen, start = memory.get_seq_length(), memory.layers[0].start
        real, _ = with_past(mask, batch, tokens, seen, start, "a Titans model", "who is seen follows from its window")
        require_left_padding(real, "a neural memory would take it into its segments")
        real = real[:, -tokens:]
        return None if bool(real.all()) else real


AutoConfig.register(TitansConfig.model_type, TitansConfig, exist_ok=True)
AutoModelForCausalLM.register(TitansConfig, Titans, exist_ok=True)
