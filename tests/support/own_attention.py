"""Llama's attention with a step of one's own, as in a stranger's repository."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward

Step = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Tensor]


class OwnAttention(LlamaAttention):
    """Llama's, with a step between cache and attention: step(attend, key, value) -> output."""

    step: Step

    def forward(
        self, hidden_states: Any, position_embeddings: Any, attention_mask: Any = None, past_key_values: Any = None,
        cache: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        cache = past_key_values if cache is None else cache  # its name until transformers 5.23, and from 5.24 on
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        parts = (part(hidden_states).view(shape).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = parts
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)

        def attend(key: Tensor, value: Tensor) -> Tensor:
            return interface(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)[0]

        output = type(self).step(attend, key, value)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), None
