"""TriAttention's scores equal the formula over complex numbers; mean queries are the model's own, measured once."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from evomem.errors import CacheError, ModelError
from evomem.managers import build
from evomem.memory import Decision, SlotCache, attached
from evomem.memory.kv import query_centres as module
from evomem.memory.kv.query_centres import SINKS, texts
from evomem.memory.kv.recompute import recomputed
from evomem.testing.comparing import random_rows, read
from evomem.testing.models import tiny
from evomem.testing.reference import Batch


def yarn_llama():
    """Return a model whose rotary embedding scales keys and queries too (c is not 1)."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    return tiny("llama", layers=2, rope_parameters=rope)


def gemma3():
    """Return a model with other frequencies in every second layer."""
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=None, sliding_window=64, initializer_range=0.3,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).requires_grad_(False).train(False)


MODELS = {
    "llama": lambda: tiny("llama", layers=2),
    "gpt_neox": lambda: tiny("gpt_neox", layers=2),  # rotates a part of every head
    "gpt2": lambda: tiny("gpt2", layers=2),  # rotates nothing
    "gemma3": gemma3,
    "yarn": yarn_llama,
}


class Dropping:
    """Evicts every third token of each KV head, shifted by head, every 12 tokens."""

    observes = frozenset({"tri_attention"})
    every = 12

    @property
    def schedule(self):
        return self

    def decide(self, view):
        heads = torch.arange(view.slots.shape[1])[:, None]
        return Decision(((view.position + heads) % 3 != 0) & view.valid)


def slow_score(mean, length, key, speed, factor, newest, width):
    """Return s of one query head and one rotated key, pair by pair, over every offset."""
    half = width // 2
    q = [complex(mean[i], mean[i + half]) for i in range(half)]
    k = [complex(key[i], key[i + half]) / factor for i in range(half)]  # turned to its position, not scaled
    total = 0.0
    for offset in (2**n for n in range(17)):
        for f in range(half):
            # k carries its own angle, so the query's position stands where the distance does.
            phase = speed[f] * (newest + offset) + cmath.phase(q[f] * k[f].conjugate())
            total += abs(q[f]) * abs(k[f]) * factor**2 * math.cos(phase) / 17
    total += sum((float(length[i]) - abs(q[i])) * abs(k[i]) * factor**2 for i in range(half))
    return total + sum(float(mean[i]) * float(key[i]) for i in range(width, len(key)))


@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_the_formula(name):
    model = MODELS[name]()
    batch, policy = Batch.of(random_rows(model, [30, 21], 4)), Dropping()
    with attached(model):
        cache = SlotCache.for_model(model, policy)
        with cache.reading():
            read(model, cache, batch, [17, 13])
            views = [layer.view() for layer in cache.layers]
    for at, view in enumerate(views):
        rotary, centre = cache.rotaries[at], cache.centres[at]
        speed, factor = ([], 1.0) if rotary is None else module.frequencies(rotary)
        width, group = 2 * len(speed), centre.mean.shape[0] // view.keys.shape[1]
        for row in range(2):
            newest = 29 - int(view.start[row])
            for head in range(view.keys.shape[1]):
                held = view.valid[row, head].nonzero().flatten().tolist()
                best = [-math.inf] * len(held)
                for q in range(head * group, (head + 1) * group):
                    s = [
                        slow_score(centre.mean[q].tolist(), centre.length[q].tolist(), view.keys[row, head, i].tolist(),
                                   [float(x) for x in speed], factor, newest, width)
                        for i in held
                    ]  # fmt: skip
                    mean = sum(s) / len(s)
                    deviation = math.sqrt(sum((x - mean) ** 2 for x in s) / len(s))
                    best = [max(b, (x - mean) / deviation) for b, x in zip(best, s, strict=True)]
                assert view.recorded["tri_attention"][row, head, held].tolist() == pytest.approx(best, abs=2e-3)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_mean_queries_are_those_of_the_models_own_modules(name):
    model = MODELS[name]()
    with attached(model):
        centres = SlotCache.for_model(model, Dropping()).centres
    ids = texts(model)
    model.set_attn_implementation("sdpa")
    turned, seen = [], []
    real = torch.nn.functional.scaled_dot_product_attention

    def watching(query, *arguments, **options):
        turned.append(query)
        return real(query, *arguments, **options)

    torch.nn.functional.scaled_dot_product_attention = watching
    try:
        with torch.no_grad():
            model(ids)
    finally:
        torch.nn.functional.scaled_dot_product_attention = real
    positions = torch.arange(ids.shape[1])[None].expand(len(ids), -1)
    for layer, query in enumerate(turned):
        rotary = module_rotary(model)
        cos, sin = rotary(query, positions)
        width = cos.shape[-1]
        back, _ = apply_rotary_pos_emb(query[..., :width], query[..., :width], cos, -sin)  # the turn undone
        plain = torch.cat((back, query[..., width:]), -1)[:, :, SINKS:]
        seen.append(plain)
        assert torch.allclose(centres[layer].mean, plain.mean((0, 2)), atol=1e-5)
        pair = torch.complex(plain[..., : width // 2], plain[..., width // 2 : width]).abs().mean((0, 2))
        assert torch.allclose(centres[layer].length[:, :width], torch.cat((pair, pair), -1), atol=1e-5)
        assert not centres[layer].length[:, width:].any()


def module_rotary(model):
    return next(part for part in model.modules() if hasattr(part, "inv_freq"))


def test_mean_queries_are_measured_once_and_anew_where_weights_change(monkeypatch):
    model, calls = tiny("llama", layers=2), []
    real = module._measured
    monkeypatch.setattr(module, "_measured", lambda *given: calls.append(given) or real(*given))
    model.train()
    manager = build("tri_attention", budget=8)
    with manager.attach(model) as cache:
        first = cache.centres
        assert manager.new_cache(model).centres is first
        assert cache.clone().centres is first
        model(torch.arange(5, 25)[None], past_key_values=cache)
        assert all(layer.slots.shape[2] == 8 for layer in cache.layers)
        with torch.no_grad():
            next(model.parameters()).mul_(2.0)
        assert not torch.equal(manager.new_cache(model).centres[0].mean, first[0].mean)
    assert len(calls) == 2
    assert all(part.training for part in model.modules())
    with build("keydiff", budget=8).attach(model) as cache:
        assert cache.centres == (None, None)
        model(torch.arange(5, 25)[None], past_key_values=cache)
    assert len(calls) == 2


def test_no_query_of_the_text_is_looked_at():
    """Keys alone decide: other query weights, after the centres were measured, change no score of the first layer."""
    model = tiny("llama", layers=1)
    ids = torch.arange(5, 45)[None]
    scores = []
    with attached(model):
        centres = SlotCache.for_model(model, Dropping()).centres
        for _ in range(2):
            cache = SlotCache(1, Dropping(), rotaries=(module_rotary(model),), centres=centres, model=model)
            with cache.reading():
                model(ids, past_key_values=cache)
                scores.append(cache.layers[0].view().recorded["tri_attention"])
            with torch.no_grad():
                model.model.layers[0].self_attn.q_proj.weight.neg_()
    assert torch.equal(*scores)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(CacheError, match="mean queries"):
        recomputed(frozenset({"tri_attention"}), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), scale=1.0)
    model = tiny("gpt2", layers=1, max_position_embeddings=8)
    with pytest.raises(ModelError, match="8 positions, too"), build("tri_attention", budget=4).attach(model):
        pass
