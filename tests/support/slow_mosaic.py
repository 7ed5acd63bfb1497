"""A Memory Mosaic as the papers write it: loops over rows, tokens, heads and pairs, in fp64, nothing carried over.

Of the model only the numbers are used (arXiv 2405.06394 and 2507.03285).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from evomem.models.architectures.mosaic import MemoryMosaic


def leaky(inputs: list[Tensor], decays: list[float]) -> list[Tensor]:
    """k̄_t = inputs_t + λ_t k̄_{t-1}."""
    averages: list[Tensor] = []
    for now, decay in zip(inputs, decays, strict=True):
        averages.append(now + decay * averages[-1] if averages else now)
    return averages


def norm(x: Tensor) -> Tensor:
    """Vector of length 1."""
    return x / math.sqrt(float((x * x).sum()))


def retrieve(query: Tensor, keys: list[Tensor], values: list[Tensor], beta: float, dim: int) -> Tensor:
    """Σ softmax(β q·k_i) v_i; zeros of nothing."""
    if not keys:
        return torch.zeros(dim, dtype=torch.float64)
    scores = [beta * float(query @ key) for key in keys]
    weights = [math.exp(score - max(scores)) for score in scores]
    return sum((w / sum(weights) * v for w, v in zip(weights, values, strict=True)), torch.zeros(dim).double())


def slow_logits(model: MemoryMosaic, ids: list[int]) -> Tensor:
    """Logits (tokens, vocabulary) for one row of tokens, none of them padding."""
    weights = {name: value.detach().double() for name, value in model.state_dict().items()}
    config = model.config
    xs = [weights["embedding.weight"][token] for token in ids]
    for index in range(config.num_hidden_layers):
        own = {
            name.removeprefix(f"layers.{index}."): value
            for name, value in weights.items()
            if name.startswith(f"layers.{index}.")
        }
        normed = [layer_norm(x, own["contextual_norm.weight"], config.layer_norm_eps) for x in xs]
        units = [_contextual(own, unit, normed, config) for unit in range(1 if config.form == "v1" else 2)]
        xs = [x + own["contextual_out.weight"] @ torch.cat([unit[t] for unit in units]) for t, x in enumerate(xs)]
        normed = [layer_norm(x, own["persistent_norm.weight"], config.layer_norm_eps) for x in xs]
        xs = [x + read for x, read in zip(xs, _persistent(own, normed, config), strict=True)]
    head = weights["lm_head.weight"]
    return torch.stack([head @ layer_norm(x, weights["norm.weight"], config.layer_norm_eps) for x in xs])


def layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise one vector."""
    return F.layer_norm(x, x.shape, weight, None, eps)


def _keys(own: dict[str, Tensor], prefix: str, xs: list[Tensor], head: int, heads: int, form: str) -> list[Tensor]:
    """Return one head's keys, of length 1."""
    dim = len(xs[0]) // heads
    projected = [(own[f"{prefix}.projection.weight"] @ x)[head * dim : (head + 1) * dim] for x in xs]
    if form == "v1":
        decay = math.exp(-10 * abs(float(own[f"{prefix}.decay"][head])))
        return [norm(k) for k in leaky(projected, [decay] * len(xs))]
    gates = [math.exp(float(own[f"{prefix}.gate.weight"][head] @ x)) for x in xs]
    decays = [math.exp(-abs(float(own[f"{prefix}.decay.weight"][head] @ x))) for x in xs]
    return [norm(k) for k in leaky([g * k for g, k in zip(gates, projected, strict=True)], decays)]


def _contextual(own: dict[str, Tensor], unit: int, xs: list[Tensor], config) -> list[Tensor]:
    heads, form = config.num_attention_heads, config.form
    dim, prefix = config.hidden_size // heads, f"contextual.{unit}"
    outputs = [[] for _ in xs]
    for head in range(heads):
        keys = _keys(own, f"{prefix}.keys", xs, head, heads, form)
        seen = [(own[f"{prefix}.values.projection.weight"] @ x)[head * dim : (head + 1) * dim] for x in xs]
        share = float(own[f"{prefix}.values.share"][head])
        scale = math.exp(10 * float(own[f"{prefix}.values.scale"][head]))
        for t, query in enumerate(keys):
            if form == "v1":  # pairs 1 .. T-1; ṽ_i + λ_ψ ṽ_{i+1}
                pairs, lam = range(t), (1 - share) / share
                key_scale = math.exp(min(10 * float(own[f"{prefix}.bandwidth.scale"][head]), 5))
                queried, stored, beta = key_scale * query, [key_scale * keys[i] for i in pairs], 1.0
                values = [scale * norm(seen[i] + lam * seen[i + 1]) for i in pairs]
            else:
                first = max(0, t - config.short_window + 1) if unit == 0 else 0
                pairs = range(first, t) if unit == 0 else range(max(0, t - config.long_delay + 1))
                named = {n: float(own[f"{prefix}.bandwidth.{n}"][head]) for n in ("slope", "offset", "power")}
                beta = math.exp(min(named["slope"], 10)) * len(pairs) ** min(abs(named["power"]), 1)
                beta += math.exp(min(named["offset"], 10))
                queried, stored = query, [keys[i] for i in pairs]
                values = [scale * norm(share * seen[i] + (1 - share) * seen[i + 1]) for i in pairs]
            outputs[t].append(retrieve(queried, stored, values, beta, dim))
    return [torch.cat(parts) for parts in outputs]


def _persistent(own: dict[str, Tensor], xs: list[Tensor], config) -> list[Tensor]:
    if config.form == "v2":
        gate, up, down = (own[f"persistent.{name}.weight"] for name in ("gate", "up", "down"))
        return [down @ (F.silu(gate @ x) * (up @ x)) for x in xs]
    heads = config.num_attention_heads
    dim = config.hidden_size // heads
    outputs = [[] for _ in xs]
    for head in range(heads):
        beta = math.exp(min(20 * float(own["persistent.key_scale"][head]), 5))
        scale = math.exp(10 * float(own["persistent.scale"][head]))
        stored, values = list(own["persistent.stored_keys"][head]), list(own["persistent.stored_values"][head])
        for t, query in enumerate(_keys(own, "persistent.keys", xs, head, heads, "v1")):
            outputs[t].append(scale * retrieve(query, stored, values, beta, dim))
    return [own["persistent_out.weight"] @ torch.cat(parts) for parts in outputs]
