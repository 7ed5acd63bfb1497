"""Model: what callers of a causal language model ask for besides logits, answered in one way by every architecture.

transformers' decoders also return a loss and hidden states, and a tuple where no dictionary is wanted. A model that
takes such a request and ignores it lets training run without a loss, so every request is answered or refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from evomem.errors import ModelError
from evomem.memory.kv.versions import as_output

LOSS_TYPE = "ForCausalLM"
"""transformers' name of the loss of the next token; a model whose class it does not know has to say so."""
LOSS_OPTIONS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""Arguments of a call that transformers' loss takes, a trainer's among them."""


class MemoryGenerationMixin(GenerationMixin):
    """``generate`` for a model whose cache takes in every token that is read, and gives none back."""

    _is_stateful = True  # transformers then refuses assisted generation, which takes tokens back

    def prepare_inputs_for_generation(self, *inputs: Any, **options: Any) -> dict[str, Any]:
        """Return the next call's arguments, as transformers does.

        Raises
        ------
        ModelError : a cache is given and not to be used; transformers then gives the whole text again with every
            token, and the memory would take it in each time.
        """
        if options.get("past_key_values") is not None and options.get("use_cache") is False:
            raise ModelError(
                f"{type(self).__name__} was to generate with past_key_values and use_cache=False: its memory "
                "would read the text again with every token; leave one of them out"
            )
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(*inputs, **options)  # type: ignore[misc]
        return prepared


# `generate` refuses arguments that the signature of this method does not name.
update_wrapper(
    MemoryGenerationMixin.prepare_inputs_for_generation, GenerationMixin.prepare_inputs_for_generation, ("__module__",)
)


def only_cache(name: str, past_key_values: Any, cache: Any) -> Any:
    """Return the cache that a call was given by its older or its newer name.

    Raises
    ------
    ModelError : it was given two.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ModelError(f"{name} was given past_key_values and another cache, and reads with one; leave one out")
    return past_key_values if cache is None else cache


@dataclass(frozen=True)
class Call:
    """What one call of a model asks for.

    Attributes
    ----------
    labels : (batch, tokens) int64, the tokens themselves, -100 where no loss is counted; None: no loss is asked for.
    hidden_states : whether the hidden states of every layer are.
    attentions : whether attention weights are.
    as_tuple : the answer is a tuple instead of a `CausalLMOutputWithPast`.
    logits_to_keep : how many of the last tokens have logits (0: all), or the indices of those that have.
    loss_options : see `LOSS_OPTIONS`.
    """

    labels: Tensor | None = None
    hidden_states: bool = False
    attentions: bool = False
    as_tuple: bool = False
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    logits_to_keep: int | Tensor = 0

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        input_ids: Tensor | None,
        logits_to_keep: int | Tensor,
        options: Mapping[str, Any],
        no_attentions: str | None = None,
    ) -> Call:
        """Return what a call's further keyword arguments ask for; what is not given, the model's configuration says.

        Parameters
        ----------
        input_ids : (batch, tokens) integers, at least one of each.
        options : keyword arguments of ``forward`` that it has no parameters for.
        no_attentions : why the model cannot return attention weights, as an end of a sentence; None: it can.

        Raises
        ------
        ModelError : there are no tokens; labels have another shape than the tokens, or not every token has logits;
            attention weights, or hidden states of some layers, are asked for and cannot be returned.
        """
        name = type(model).__name__
        _require_tokens(name, input_ids, options)
        labels = options.get("labels")
        if labels is not None:
            if isinstance(logits_to_keep, Tensor) or logits_to_keep:
                raise ModelError(
                    f"{name} was given labels and logits_to_keep: a loss needs the logits of every token; leave "
                    "logits_to_keep out"
                )
            assert input_ids is not None  # `_require_tokens`
            if labels.shape != input_ids.shape:
                raise ModelError(
                    f"{name} was given labels of shape {tuple(labels.shape)} for input_ids of shape "
                    f"{tuple(input_ids.shape)}; give the same tokens again, -100 where no loss is to be counted: they "
                    "are shifted by one inside"
                )
        hidden_states = _option(model, options, "output_hidden_states", False)
        if not isinstance(hidden_states, bool):
            raise ModelError(
                f"{name} was given output_hidden_states={hidden_states!r}; it returns all layers' or none: write True "
                "or False, and select layers from what is returned"
            )
        attentions = bool(_option(model, options, "output_attentions", False))
        if attentions and no_attentions is not None:
            raise ModelError(f"{name} cannot return attention weights (output_attentions=True): {no_attentions}")
        loss_options = {key: options[key] for key in LOSS_OPTIONS if options.get(key) is not None}
        as_tuple = not _option(model, options, "return_dict", True)
        return cls(labels, hidden_states, attentions, as_tuple, loss_options, logits_to_keep)

    @property
    def kept(self) -> slice | Tensor:
        """Which tokens have logits, as an index of their axis."""
        return slice(-self.logits_to_keep, None) if isinstance(self.logits_to_keep, int) else self.logits_to_keep

    def parts(self, layers: int) -> list[list[Tensor]]:
        """Return empty lists for what a model that reads turn by turn makes of the tokens; see `answer_parts`."""
        return [[] for _ in range(1 + layers * self.hidden_states)]

    def answer_parts(
        self, model: Any, parts: Sequence[Sequence[Tensor]], cache: Any
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return the output of a model that reads turn by turn, and ends in ``norm`` and ``lm_head``.

        parts : of every turn (batch, tokens, width): what each layer was given, if hidden states are asked for, and
            last what the last layer made.
        """
        *states, hidden = (torch.cat(list(part), 1) for part in parts)
        logits = model.lm_head(model.norm(hidden[:, self.kept]))
        return self.answer(model, logits, cache, [*states, model.norm(hidden)] if self.hidden_states else None)

    def answer(
        self,
        model: Any,
        logits: Tensor,
        cache: Any,
        hidden_states: Sequence[Tensor] | None = None,
        attentions: Sequence[Tensor] | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return a model's output with what was asked for; the loss is `LOSS_TYPE` of ``model.loss_function``.

        hidden_states : of the tokens' vectors and behind every layer, the last one normalised, (batch, tokens, width)
            each: what `lm_head` reads is the last.
        """
        loss = None
        if self.labels is not None:
            vocabulary = logits.shape[-1]
            loss = model.loss_function(logits=logits, labels=self.labels, vocab_size=vocabulary, **self.loss_options)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=None if hidden_states is None else tuple(hidden_states),
            attentions=None if attentions is None else tuple(attentions),
            **as_output(cache, CausalLMOutputWithPast),
        )
        return output.to_tuple() if self.as_tuple else output


def keeps_cache(model: PreTrainedModel, given: object, use_cache: bool | None) -> bool:
    """Whether a call returns its cache: one that was given always; a new one unless in training, or as is asked."""
    return given is not None or (not model.training if use_cache is None else use_cache)


def _option(model: PreTrainedModel, options: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return an argument of a call, or, where it is not given, what the model's configuration says."""
    value = options.get(name)
    value = getattr(model.config, name, None) if value is None else value
    return default if value is None else value


def _require_tokens(name: str, input_ids: Tensor | None, options: Mapping[str, Any]) -> None:
    if options.get("inputs_embeds") is not None:
        raise ModelError(f"{name} reads tokens: it was given inputs_embeds; give input_ids (batch, tokens)")
    if not isinstance(input_ids, Tensor):
        given = "none" if input_ids is None else f"a {type(input_ids).__name__}"
        raise ModelError(f"{name} reads input_ids, and was given {given}; give a tensor of integers (batch, tokens)")
    if input_ids.dim() != 2 or not input_ids.numel() or input_ids.is_floating_point():
        raise ModelError(
            f"{name} was given input_ids of shape {tuple(input_ids.shape)} and type {input_ids.dtype}; give integers "
            "(batch, tokens), at least one row and one token: an empty text has nothing that could be continued"
        )
