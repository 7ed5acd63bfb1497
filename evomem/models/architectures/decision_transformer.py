"""Model: a Decision Transformer as a causal model over a stream of tokens; its memory is managed like any other.

A Decision Transformer (Chen et al. 2021, arXiv 2106.01345; ``transformers.DecisionTransformerModel``) reads an episode
as (return-to-go, observation, action), three inputs a step, and says after every observation how to act.
`DecisionStream` holds one and calls each of those inputs a token of a codebook. It therefore has what every causal
language model has: ``input_ids`` in, a cache, logits out; tasks for it are text, ``"r3 s17 a0 r3 s42"``.

Importing this module makes its classes known to transformers' Auto classes; `evomem.models.load` does so for a folder
whose ``config.json`` has this ``model_type``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DecisionTransformerConfig,
    DecisionTransformerModel,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from evomem.errors import ConfigError, ModelError
from evomem.memory.kv.versions import passed, returned
from evomem.models.architectures.calls import LOSS_TYPE, Call
from evomem.models.architectures.word_tokenizer import word_tokenizer

SPECIAL = ("<pad>", "<unk>")
"""The first ids: they are read as nothing but a place in time."""

TOKENS_PER_STEP = 3
"""Return-to-go, observation, action."""

NEVER = -100.0
"""Logit of everything that is no action. Finite, because differences of infinities are not numbers; exp(-100) is
nothing beside any action in fp32."""


class DecisionStreamConfig(DecisionTransformerConfig):  # type: ignore[no-untyped-call]
    """Configuration: that of the Decision Transformer, and the sizes of its codebook.

    Attributes
    ----------
    return_codes, state_codes : how many returns-to-go and observations have a token; each of ``act_dim`` actions has.
    return_scale : a return-to-go is divided by it before it is embedded.
    vocab_size : specials, returns, observations, actions, in this order of ids; follows from the others.
    """

    model_type = "evomem_decision_transformer"

    return_codes: int = 1
    state_codes: int = 1
    return_scale: float = 1.0
    action_tanh: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        self.vocab_size = len(SPECIAL) + self.return_codes + self.state_codes + self.act_dim
        self.n_positions = self.max_ep_len * TOKENS_PER_STEP
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def first_return(self) -> int:
        """Id of the first return-to-go."""
        return len(SPECIAL)

    @property
    def first_state(self) -> int:
        """Id of the first observation."""
        return self.first_return + self.return_codes

    @property
    def first_action(self) -> int:
        """Id of the first action."""
        return self.first_state + self.state_codes


class DecisionStream(PreTrainedModel, GenerationMixin):
    """A Decision Transformer that reads tokens.

    The actions of the codebook are the classes of ``predict_action``: its outputs are logits, and the model is one for
    discrete actions. Only the logits at observations mean something, as in the Decision Transformer itself.

    Attributes
    ----------
    decision : the ``transformers.DecisionTransformerModel``.
    return_values : (return_codes, 1), the returns-to-go that tokens stand for, in the environment's units.
    state_values : (state_codes, state_dim).
    action_values : (act_dim, act_dim).
    """

    config_class = DecisionStreamConfig
    config: DecisionStreamConfig
    return_values: Tensor
    state_values: Tensor
    action_values: Tensor
    base_model_prefix = "decision"
    main_input_name = "input_ids"
    _supports_sdpa = DecisionTransformerModel._supports_sdpa  # older versions of transformers know eager attention only
    _supports_attention_backend = True

    def __init__(self, config: DecisionStreamConfig) -> None:
        super().__init__(config)
        self.loss_type = LOSS_TYPE
        inner = copy.deepcopy(config)
        # Its GPT-2 is fed embeddings and is told position 0 for every token: one row of either table is ever read.
        inner.vocab_size = inner.n_positions = 1
        self.decision = DecisionTransformerModel(inner)
        self.register_buffer("return_values", torch.zeros(config.return_codes, 1))
        self.register_buffer("state_values", torch.zeros(config.state_codes, config.state_dim))
        self.register_buffer("action_values", torch.eye(config.act_dim))
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def learned_positions(self) -> int:
        """Tokens that it can read: three for each of its timesteps."""
        return int(self.config.max_ep_len) * TOKENS_PER_STEP

    def set_codes(self, returns: Tensor, states: Tensor) -> None:
        """Set what the tokens stand for: returns (return_codes, 1) and states (state_codes, state_dim).

        Raises
        ------
        ConfigError : a shape is not the configuration's.
        """
        for name, values in (("return_values", returns), ("state_values", states)):
            buffer: Tensor = getattr(self, name)
            if values.shape != buffer.shape:
                raise ConfigError(
                    f"codes: {name} of shape {tuple(values.shape)}, config.json says {tuple(buffer.shape)}"
                )
            buffer.copy_(values)

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return what the Decision Transformer makes of tokens (batch, tokens): (batch, tokens, hidden_size).

        Three tokens are a step, so a token's place among all tokens ever read gives its timestep.

        Raises
        ------
        ModelError : the episode is longer than the model has timesteps for.
        """
        timesteps = position_ids // TOKENS_PER_STEP
        longest = int(self.config.max_ep_len)
        if int(timesteps.max()) >= longest:
            raise ModelError(
                f"an episode of more than {longest} steps ({longest * TOKENS_PER_STEP} tokens), which is all that this "
                "Decision Transformer has timesteps for; ask for a shorter length"
            )
        model = self.decision
        table = torch.cat(
            (
                self.return_values.new_zeros(len(SPECIAL), model.hidden_size),
                model.embed_return(self.return_values / self.config.return_scale),
                model.embed_state(self.state_values),
                model.embed_action(self.action_values),
            )
        )
        embedded: Tensor = model.embed_ln(F.embedding(input_ids, table) + model.embed_timestep(timesteps))
        return embedded

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits (batch, kept tokens, vocab_size) for the action that follows each token, and the cache.

        Parameters
        ----------
        input_ids : (batch, tokens) int64.
        attention_mask : (batch, tokens ever read), 0 = padding; None: there is none.
        position_ids : (batch or 1, tokens), a token's place in its own row; by default after what the cache has read.
        past_key_values, cache : any cache of transformers or of evomem, by its older or its newer name.
        logits_to_keep : how many of the last tokens have logits (0: all), or the indices of those that have.
        kwargs : labels, output_hidden_states, output_attentions, return_dict, as transformers' decoders take them
            (`evomem.models.architectures.calls`). Only actions have logits: a label that is none costs `NEVER`.

        Raises
        ------
        ModelError : no tokens; labels that do not fit; attention weights of another attention than ``eager``; an
            episode of more steps than the model has timesteps for.
        """
        attention = self.decision.encoder.config._attn_implementation
        call = Call.of(
            self,
            input_ids,
            logits_to_keep,
            kwargs,
            None
            if attention == "eager"
            else f"{attention} does not compute them; load the model with attn_implementation='eager'",
        )
        assert input_ids is not None  # `Call.of`
        cache = past_key_values if cache is None else cache
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)[None]
        if cache is None and attention_mask is None:
            # Without a mask transformers would take equal positions for the beginnings of many sequences.
            attention_mask = torch.ones_like(input_ids)
        read = self.decision.encoder(
            inputs_embeds=self.embed(input_ids, position_ids),
            attention_mask=attention_mask,
            position_ids=torch.zeros_like(input_ids),
            use_cache=use_cache,
            output_hidden_states=call.hidden_states,
            output_attentions=call.attentions,
            return_dict=True,
            **passed(cache, self.decision.encoder),
        )
        actions = self.decision.predict_action(read.last_hidden_state[:, call.kept])
        logits = F.pad(actions, (self.config.first_action, 0), value=NEVER)
        return call.answer(self, logits, returned(read), read.hidden_states, read.attentions)


def stream_words(config: DecisionStreamConfig) -> Mapping[str, int]:
    """Return the vocabulary: ``r0``, ``r1``, ... for returns, ``s0``, ... for observations, ``a0``, ... for actions."""
    counts = (("r", config.return_codes), ("s", config.state_codes), ("a", config.act_dim))
    words = [*SPECIAL, *(f"{kind}{number}" for kind, count in counts for number in range(count))]
    return {word: number for number, word in enumerate(words)}


def stream_tokenizer(config: DecisionStreamConfig) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the stream: a word is a token."""
    return word_tokenizer(stream_words(config), model_max_length=config.max_ep_len * TOKENS_PER_STEP)


AutoConfig.register(DecisionStreamConfig.model_type, DecisionStreamConfig, exist_ok=True)
AutoModelForCausalLM.register(DecisionStreamConfig, DecisionStream, exist_ok=True)
