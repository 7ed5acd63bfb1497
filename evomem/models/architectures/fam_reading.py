"""Model: how a model with feedback memory reads a text turn by turn, whatever its layers are.

`evomem.models.architectures.fam` is one of our own; `fam_around` beside it has a frozen decoder inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from evomem.errors import CacheError, ModelError
from evomem.memory.explicit.feedback import FeedbackCache, FeedbackLayer
from evomem.memory.explicit.feedback_slots import FeedbackSlots, FeedbackSlotsCache
from evomem.memory.kv.due import turns
from evomem.memory.kv.policy import CachePolicy
from evomem.memory.kv.switch import note_pass
from evomem.models.architectures.calls import Call, MemoryGenerationMixin, keeps_cache, only_cache
from evomem.models.architectures.checks import (
    reading_fields,
    require_left_padding,
    require_one_text,
    require_rows,
    with_past,
)
from evomem.models.architectures.fam_layers import Turn


class FeedbackModel(MemoryGenerationMixin, PreTrainedModel):  # type: ignore[no-untyped-call]
    """A causal language model with feedback memory in every layer.

    A subclass has layers, ``norm`` and ``lm_head``, and a configuration with ``block``, ``segments``, ``feedback`` and
    ``num_hidden_layers``.

    Attributes
    ----------
    summary : (slots, hidden_size), the embeddings that feedback begins as; None without feedback.
    """

    summary: nn.Embedding | None

    @property
    def depth(self) -> int:
        """Number of layers."""
        layers: int = self.config.num_hidden_layers
        return layers

    def embedded(self, input_ids: Tensor) -> Tensor:
        """Return what the first layer is given of tokens: (batch, tokens, hidden_size)."""
        raise NotImplementedError

    def initial_feedback(self, embeddings: Tensor | None = None) -> list[Tensor | None]:
        """Return F before the first block, of every layer: (slots, hidden_size), or (batch, slots, hidden_size).

        embeddings : (batch, slots, hidden_size), a row's own in place of the model's; None: the model's.
        """
        raise NotImplementedError

    def read(
        self,
        embedded: Tensor,
        turn: Turn,
        layers: Sequence[FeedbackLayer | FeedbackSlots],
        inputs: Sequence[list[Tensor]] | None,
    ) -> Tensor:
        """Return what the last layer makes of a turn's tokens, and note the turn in all layers of the memory.

        Parameters
        ----------
        embedded : (batch, tokens, hidden_size).
        inputs : takes what every layer was given, (batch, tokens, hidden_size); None: nobody asks.
        """
        raise NotImplementedError

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own cache

    def new_cache(self, embeddings: Tensor | None = None) -> FeedbackCache:
        """Return an empty memory for further sequences.

        embeddings : (batch, slots, hidden_size), what feedback begins as in each row, in place of the model's own
            ``summary``: a population is read as a batch. None: the model's.

        Raises
        ------
        ModelError : embeddings have other axes than the model's feedback memory.
        """
        if embeddings is not None:
            slots = None if self.summary is None else tuple(self.summary.weight.shape)
            if embeddings.dim() != 3 or tuple(embeddings.shape[1:]) != slots:
                raise ModelError(
                    f"embeddings of shape {tuple(embeddings.shape)} for a model whose feedback memory is {slots}; give "
                    "(rows, slots, hidden_size)"
                )
        return FeedbackCache(self.depth, embeddings)

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
        return FeedbackSlotsCache(self.depth, self.config.block, self.config.feedback, policy)

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
            embeddings = cache.embeddings if isinstance(cache, FeedbackCache) else None
            for layer, initial in zip(layers, self.initial_feedback(embeddings), strict=True):
                layer.begin(batch, initial, input_ids.device)
        if attention_mask is not None:
            self._note_padding(cache, real)
        cache.interrupted = True  # if an error ends the pass, some layers have read what others have not
        embedded, at, parts = self.embedded(input_ids), 0, call.parts(self.depth)
        every = None if decided is None else decided.policy.schedule.every
        for end, due in turns(seen, tokens, cache.starts, every or self.config.block):
            turn = self._turn(cache, seen + at, seen + end, real[:, at:end])
            inputs = parts[:-1] if call.hidden_states else None
            parts[-1].append(self.read(embedded[:, at:end], turn, cache.layers, inputs))
            if decided is not None and every is not None and any(due):
                decided.decide()
            elif decided is not None and any(due) and end < tokens:
                decided.say_unasked("block", self.config.block)
            at = end
        cache.interrupted = False
        return call.answer_parts(self, parts, cache if keeps_cache(self, given, use_cache) else None)

    def _checked(self, cache: Any) -> FeedbackCache | FeedbackSlotsCache:
        """Return the cache to read on with; see `forward`."""
        if not isinstance(cache, FeedbackCache | FeedbackSlotsCache) or len(cache.layers) != self.depth:
            what = f"{type(cache).__name__} of {len(cache.layers)} layers" if hasattr(cache, "layers") else repr(cache)
            raise ModelError(
                f"a feedback memory of {self.depth} layers was given a {what}; give it model.new_cache(), "
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
