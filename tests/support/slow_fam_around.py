"""Feedback memory around a Llama in plain loops: its layers in the words of `slow_fam`."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from tests.support.slow_fam import slow_layer


def slow_block(layer, heads, kv_heads):
    """Return a layer of Llama as `slow_fam` looks at one."""
    attention = layer.self_attn
    size = attention.head_dim

    def repeated(project):
        return lambda x: project(x).view(kv_heads, size).repeat_interleave(heads // kv_heads, 0).flatten()

    parts = SimpleNamespace(
        heads=heads, size=size, q_proj=attention.q_proj, o_proj=attention.o_proj,
        k_proj=repeated(attention.k_proj), v_proj=repeated(attention.v_proj),
    )  # fmt: skip
    return SimpleNamespace(
        attention=parts,
        attention_norm=layer.input_layernorm,
        feed_forward=lambda x: layer.mlp(layer.post_attention_layernorm(x)),
    )


def slow_fam_around(decoder, summary, ids, block, segments, gates=None):
    """Return logits (tokens, vocabulary) of one row of ids, and every layer's feedback at the end.

    summary : (slots, hidden). gates : see `slow_fam`.
    """
    config, body = decoder.config, decoder.model
    hidden, initial, ends = [body.embed_tokens.weight[number] for number in ids], list(summary), []
    for number, layer in enumerate(body.layers):
        slow = slow_block(layer, config.num_attention_heads, config.num_key_value_heads)
        gate = None if gates is None else gates[number]
        hidden, initial, feedback = slow_layer(slow, hidden, initial, block, segments, gate)
        ends.append(feedback)
    return torch.stack([decoder.lm_head(body.norm(x)) for x in hidden]), ends
