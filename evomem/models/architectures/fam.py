"""Model: TransformerFAM, a transformer that reads in blocks and feeds a summary of each back to its own layers.

Hwang et al. 2024 (arXiv 2404.09173), Algorithm 2. A token attends to the block that it stands in, causally, to the
``segments`` blocks before it, and to the feedback F of its layer. When a block ends, the same layer makes a new F: its
queries are F, its keys and values the block and F, and what they read goes through the layer's feed-forward part. So F
has all blocks behind it, at constant memory, and the layers have no new weights: F begins as learned embeddings.

The source leaves open, and this model chooses: what F is in a layer before the first block is what the layers below
made of the embeddings alone, so it depends on no token and is the same for all rows; F stands at the last positions of
the block that it has compressed, as keys and, a block later, as queries; positions are rotary, so that only distances
matter, and training needs no random offset; F is held in fp32.

Importing this module makes its classes known to transformers' Auto classes; `evomem.models.load` does so for a folder
whose ``config.json`` has this ``model_type``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from evomem.errors import CacheError, ConfigError, ModelError
from evomem.memory.explicit.feedback import FeedbackCache
from evomem.memory.explicit.feedback_slots import FeedbackSlotsCache
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
from evomem.models.architectures.fam_layers import FamBlock, Turn


class FamConfig(PreTrainedConfig):
    """Configuration.

    Attributes
    ----------
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size : as in other decoders.
    block : tokens of a block.
    segments : m, blocks before a token's own that it attends to.
    feedback : FL, slots of the feedback memory. 0: none, block sliding-window attention alone.
    """

    model_type = "evomem_fam"

    vocab_size: int = 64
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 128
    block: int = 16
    segments: int = 1
    feedback: int = 4
    initializer_range: float = 0.05
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        require_counts("feedback memory", self, SIZES)
        if self.block < 1 or self.segments < 0 or self.feedback < 0:
            raise ConfigError(
                f"feedback memory: block {self.block}, segments {self.segments}, feedback {self.feedback}; a block has "
                "1 token or more, and the others are counts of 0 or more"
            )
        require_rotary_heads("feedback memory", self)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]


class Fam(MemoryGenerationMixin, PreTrainedModel):
    """A small causal language model with feedback memory in every layer; see the module.

    Attributes
    ----------
    summary : (slots, hidden_size), the embeddings that feedback begins as; None without feedback.
    """

    config_class = FamConfig
    config: FamConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: FamConfig) -> None:
        super().__init__(config)
        self.loss_type = LOSS_TYPE
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.summary = nn.Embedding(config.feedback, config.hidden_size) if config.feedback else None
        self.blocks = nn.ModuleList(FamBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a new model begins with."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)

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

    def new_cache(self) -> FeedbackCache:
        """Return an empty memory for further sequences."""
        return FeedbackCache(len(self.blocks))

    def decided_cache(self, policy: CachePolicy) -> FeedbackSlotsCache:
        """Return an empty memory about which a manager decides: what is written, which slots leave, which fade.

        It decides every ``schedule.every`` tokens, which must divide a block; without ``every``, when its ``decide`` is
        called. Padding is refused: all rows' blocks end together.

        Raises
        ------
        ModelError : the model has no feedback memory.
        ConfigError : the manager would decide when no block ends, or observes something that means nothing here.
        """
        if self.summary is None:
            raise ModelError("this model has no feedback memory (feedback 0) to decide about")
        return FeedbackSlotsCache(len(self.blocks), self.config.block, self.config.feedback, policy)

    def initial_feedback(self) -> list[Tensor | None]:
        """Return F before the first block, of every layer: (slots, hidden_size)."""
        if self.summary is None:
            return [None] * len(self.blocks)
        feedback, initial = self.summary.weight[None], list[Tensor | None]()
        for block in self.blocks:
            initial.append(feedback[0])
            feedback = cast(FamBlock, block).carry(feedback)
        return initial

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FeedbackCache | FeedbackSlotsCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: FeedbackCache | FeedbackSlotsCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits (batch, kept tokens, vocab_size), and the memory after the tokens.

        Parameters
        ----------
        input_ids : (batch, tokens) int64.
        attention_mask : (batch, tokens ever read), 0 = padding, which stands on the left; None: there is none. A row's
            blocks are counted from its first real token.
        position_ids : looked at for several texts in a row only, which are refused: where a token stands follows from
            what the memory has read.
        past_key_values, cache : of `new_cache` or `decided_cache`, by its older or its newer name; None: the memory
            begins empty.
        logits_to_keep : how many of the last tokens have logits (0: all), or the indices of those that have.
        kwargs : labels, output_hidden_states, return_dict, as transformers' decoders take them
            (`evomem.models.architectures.calls`).

        Raises
        ------
        ModelError : another kind of cache, or of other layers; a mask that is not (batch, tokens) of 0 and 1; several
            texts in a row; no tokens; labels that do not fit; attention weights are asked for.
        CacheError : an earlier pass over the cache was cut short, or it has other rows, or was read with another
            configuration; padding on the right, or other than it was read with.
        """
        call = Call.of(
            self,
            input_ids,
            logits_to_keep,
            kwargs,
            "every token sees segments and feedback of its own; hidden states are returned",
        )
        assert input_ids is not None  # `Call.of`
        given = only_cache("a feedback memory", past_key_values, cache)
        cache = self.new_cache() if given is None else self._checked(given)
        decided = cache if isinstance(cache, FeedbackSlotsCache) else None
        note_pass(self, decided)  # type: ignore[arg-type]
        (batch, tokens), seen = input_ids.shape, cache.get_seq_length()
        require_rows(len(cache.starts) if seen else None, batch)
        real = input_ids.new_ones(batch, tokens, dtype=torch.bool)
        if attention_mask is not None:
            real = self._real(attention_mask, batch, tokens, cache)
        require_one_text("a feedback memory", position_ids, batch, tokens, real)
        cache.require_reader(reading_fields(self.config))
        if not seen:
            layers: list[Any] = list(cache.layers)
            for layer, initial in zip(layers, self.initial_feedback(), strict=True):
                layer.begin(batch, initial, input_ids.device)
        if attention_mask is not None:
            self._note_padding(cache, real)
        cache.interrupted = True  # if an error ends the pass, some layers have read what others have not
        embedded, at, parts = self.embed(input_ids), 0, call.parts(len(self.blocks))
        every = None if decided is None else decided.policy.schedule.every
        for end, due in turns(seen, tokens, cache.starts, every or self.config.block):
            turn = self._turn(cache, seen + at, seen + end, real[:, at:end])
            hidden: Tensor = embedded[:, at:end]
            for index, (block, layer) in enumerate(zip(self.blocks, cache.layers, strict=True)):
                if call.hidden_states:
                    parts[index].append(hidden)
                hidden = block(hidden, turn, layer)
            parts[-1].append(hidden)
            if decided is not None and every is not None and any(due):
                decided.decide()
            at = end
        cache.interrupted = False
        return call.answer_parts(self, parts, cache if keeps_cache(self, given, use_cache) else None)

    def _checked(self, cache: Any) -> FeedbackCache | FeedbackSlotsCache:
        """Return the cache to read on with; see `forward`."""
        if not isinstance(cache, FeedbackCache | FeedbackSlotsCache) or len(cache.layers) != len(self.blocks):
            what = f"{type(cache).__name__} of {len(cache.layers)} layers" if hasattr(cache, "layers") else repr(cache)
            raise ModelError(
                f"a feedback memory of {len(self.blocks)} layers was given a {what}; give it model.new_cache(), "
                "model.decided_cache(manager), or none"
            )
        cache.require_whole()
        if isinstance(cache, FeedbackSlotsCache):
            cache.require_sizes(self.config.block, self.config.feedback, self.config.segments)
        return cache

    def _turn(self, cache: FeedbackCache | FeedbackSlotsCache, begin: int, end: int, real: Tensor) -> Turn:
        """Return what the layers need to know of tokens ``begin`` to ``end``."""
        block, start = self.config.block, cache.layers[0].start
        if start is None:
            raise CacheError("this feedback memory was not begun")
        number = (end - 1 - start) // block
        ends = [end > first and (end - first) % block == 0 for first in cache.starts]
        due = torch.tensor(ends, device=real.device) if any(ends) else None
        return Turn(begin, end, real, start + number * block, due, number == 0)

    @staticmethod
    def _note_padding(cache: FeedbackCache | FeedbackSlotsCache, real: Tensor) -> None:
        """Let rows begin behind their padding."""
        if isinstance(cache, FeedbackCache):
            cache.note_padding(real)
        elif not bool(real.all()):
            raise CacheError(
                "attention_mask has padding, and a manager decides about a feedback memory when a block ends, for all "
                "rows at once; give rows of one length, or one row at a time"
            )

    @staticmethod
    def _real(mask: Tensor, batch: int, tokens: int, cache: FeedbackCache | FeedbackSlotsCache) -> Tensor:
        """Return which of the new tokens are no padding, (batch, tokens) bool; see `forward`."""
        seen, start = cache.get_seq_length(), cache.layers[0].start
        why = "who is seen follows from its blocks"
        real, whole = with_past(mask, batch, tokens, seen, start, "a feedback memory", why)
        real = real if whole else real[:, 1:]  # what is behind a token, `_note_padding` says
        require_left_padding(real, "a block would be compressed with it")
        return real[:, -tokens:]


AutoConfig.register(FamConfig.model_type, FamConfig, exist_ok=True)
AutoModelForCausalLM.register(FamConfig, Fam, exist_ok=True)
