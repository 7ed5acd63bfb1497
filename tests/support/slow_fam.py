"""A transformer with feedback memory in plain loops over tokens and heads: the slow path of the fast one."""

from __future__ import annotations

import cmath
import math

import torch
import torch.nn.functional as F


def turned(x, position):
    """Return x (size,) with its pairs of halves rotated as complex numbers."""
    half, out = len(x) // 2, x.clone()
    for pair in range(half):
        number = complex(float(x[pair]), float(x[pair + half])) * cmath.exp(1j * position * 10_000.0 ** (-pair / half))
        out[pair], out[pair + half] = number.real, number.imag
    return out


def attend(block, x, position, seen):
    """Return what x (hidden,) at a position reads of ``seen``: pairs of a position and what stands there."""
    attention = block.attention
    heads, size = attention.heads, attention.size

    def projected(project, one):
        return project(block.attention_norm(one)).view(heads, size)

    query, read = projected(attention.q_proj, x), []
    keys, values = ([projected(project, one) for _, one in seen] for project in (attention.k_proj, attention.v_proj))
    for head in range(heads):
        mine = turned(query[head], position)
        scores = [
            float(mine @ turned(key[head], at)) / math.sqrt(size) for (at, _), key in zip(seen, keys, strict=True)
        ]
        shares = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
        read.append(sum(share * value[head] for share, value in zip(shares, values, strict=True)))
    return attention.o_proj(torch.cat(read))


def fed(block, x):
    if hasattr(block, "feed_forward"):  # of a decoder that feedback stands around (`slow_fam_around`)
        return x + block.feed_forward(x)
    return x + block.down(F.gelu(block.up(block.mlp_norm(x))))


def slow_layer(block, hidden, initial, size, segments, gate=None):
    """Return a layer's outputs, what it carries up of the initial feedback, and its feedback at the end.

    gate : of an old summary, the new one and the number of the block, from 1: what part of the update is written.
    """
    feedback, spots, out = initial, list(range(-len(initial), 0)), []
    carried = [
        fed(block, one + attend(block, one, spot, list(zip(spots, initial, strict=True))))
        for spot, one in zip(spots, initial, strict=True)
    ]
    for begin in range(0, len(hidden), size):
        chunk = list(enumerate(hidden))[begin : begin + size]
        rows = list(zip(spots, feedback, strict=True))
        for token, x in chunk:
            near = [(at, hidden[at]) for at in range(max(0, begin - segments * size), token + 1)]
            out.append(fed(block, x + attend(block, x, token, near + rows)))
        if len(chunk) == size:
            residuals = feedback if begin else [torch.zeros_like(one) for one in feedback]
            made = [attend(block, one, spot + size, chunk + rows) for spot, one in rows]
            offered = [fed(block, old + new) for old, new in zip(residuals, made, strict=True)]
            if gate is not None:
                pairs = zip(feedback, offered, strict=True)
                offered = [old + gate(old, new, begin // size + 1) * (new - old) for old, new in pairs]
            feedback = offered
            spots = [spot + size for spot in spots]
    return out, carried, feedback


def slow_fam(model, ids, gates=None):
    """Return logits (tokens, vocabulary) of one row of ids, and every layer's feedback at the end.

    gates : of every layer, see `slow_layer`; None: updates are written whole.
    """
    config = model.config
    hidden = [model.embed.weight[number] for number in ids]
    initial = [] if model.summary is None else list(model.summary.weight)
    ends = []
    for number, block in enumerate(model.blocks):
        gate = None if gates is None else gates[number]
        hidden, initial, feedback = slow_layer(block, hidden, initial, config.block, config.segments, gate)
        ends.append(feedback)
    return torch.stack([model.lm_head(model.norm(x)) for x in hidden]), ends
