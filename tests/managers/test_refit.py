"""Slots that are refitted: against plain least squares, its limits, and that the probes' error falls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import torch

from evomem.errors import CacheError, ConfigError
from evomem.managers import build
from evomem.managers.heuristics.refit import LIGHTEST, matching_mass, value_changes, whole_attention
from evomem.testing.models import tiny
from tests.support.ragged_view import make_view

WIDTH, GROUP = 6, 2


def probed(view, seed=0, scale=2.0):
    """The view with random logits of probes: two query heads a KV head, and one probe that sees nothing."""
    batch, heads, slots = view.slots.shape
    draw = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, GROUP * heads, slots, WIDTH, generator=draw)
    logits = torch.where(view.valid.repeat_interleave(GROUP, 1)[..., None], logits, -torch.inf)
    logits[..., WIDTH - 1] = -torch.inf
    return replace(view, recorded={**view.recorded, f"probe_logits:{WIDTH}": logits})


def by_head(view, keep, b, h):
    """Attention of a head's probes over all slots (probes, slots), which slots stay, and the values, in NumPy."""
    logits = view.recorded[f"probe_logits:{WIDTH}"][b, GROUP * h : GROUP * (h + 1)].double()
    logits = logits[..., : WIDTH - 1].permute(0, 2, 1).reshape(-1, logits.shape[1])
    kept = keep[b, h].nonzero()[:, 0].numpy()
    return torch.softmax(logits, -1).numpy(), kept, view.values[b, h].double().numpy()


@pytest.mark.parametrize("biases", [True, False])
def test_values_are_those_of_plain_least_squares(biases):
    manager = build(f"refit(keydiff, probes={WIDTH}, ridge=0.2, biases={str(biases).lower()}, budget=9)")
    view = probed(make_view(3))
    decision = manager.decide(view)
    assert torch.equal(decision.keep, build("keydiff", budget=9).decide(view).keep)
    assert torch.equal(decision.keys, view.keys)
    assert (decision.decay is not None) == biases
    gone = ~decision.keep[..., None]
    assert torch.equal(decision.values * gone, view.values * gone)
    for b in range(2):
        for h in range(3):
            attention, kept, values = by_head(view, decision.keep, b, h)
            weights = np.ones(len(kept)) if not biases else decision.decay[b, h, kept].double().exp().numpy()
            shares = attention[:, kept] * weights
            shares = shares / shares.sum(1, keepdims=True)
            size = np.trace(shares @ shares.T) / len(shares)
            error = attention @ values - shares @ values[kept]
            normal = shares.T @ shares + (0.2 * size + 1e-6) * np.eye(len(kept))  # the primal way; ours is the dual
            expected = values[kept] + np.linalg.solve(normal, shares.T @ error)
            np.testing.assert_allclose(decision.values[b, h, kept], expected, rtol=2e-3, atol=2e-4)
            after = np.linalg.norm(shares @ expected - attention @ values)
            assert after < np.linalg.norm(error)


def test_weights_near_those_of_non_negative_least_squares():
    draw = torch.Generator().manual_seed(0)
    attention, asked = whole_attention(2 * torch.randn(1, 2, 30, 40, generator=draw))
    kept = attention * (torch.arange(40) < 8)
    w = matching_mass(kept, asked, 2000)
    before = np.inf
    for steps in (1, 4, 16, 64, 256):
        error = float(((kept @ matching_mass(kept, asked, steps)[..., None])[..., 0] - 1).square().sum())
        assert error <= before + 1e-5
        before = error
    for h in range(2):
        best, residual = scipy.optimize.nnls(kept[0, h, :, :8].double().numpy(), np.ones(30))
        reached = np.linalg.norm(kept[0, h, :, :8].double().numpy() @ w[0, h, :8].double().numpy() - 1)
        assert reached < 1.002 * residual + 1e-6
        np.testing.assert_allclose(np.maximum(best, LIGHTEST), w[0, h, :8], atol=0.15)
    assert torch.equal(w[..., 8:], torch.ones(1, 2, 32))  # nobody sees what left


def test_nothing_changes_where_nothing_leaves():
    view = probed(make_view(1))
    decision = build(f"refit(keydiff, probes={WIDTH}, budget=400)").decide(view)
    torch.testing.assert_close(decision.values, view.values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decision.decay, torch.zeros_like(decision.decay), atol=1e-4, rtol=0)


def test_equal_tokens_can_be_evicted_without_a_change():
    """Every token is there three times: each that stays stands for three, and its value is right already."""
    logits = torch.randn(1, 1, 12, 7, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 1, 3)
    attention, asked = whole_attention(logits)
    kept = attention * (torch.arange(21) < 7)
    torch.testing.assert_close(
        matching_mass(kept, asked, 20_000)[..., :7], torch.full((1, 1, 7), 3.0), atol=0.05, rtol=0
    )
    values = torch.randn(1, 1, 7, 4).repeat(1, 1, 3, 1)
    shares = kept / kept.sum(-1, keepdim=True)
    change = value_changes(shares, asked, attention @ values - shares @ values, 0.1)
    assert change.abs().max() < 1e-5


def test_a_head_that_no_probe_sees_stays_as_it_is():
    view = make_view(2)
    logits = torch.full((2, 6, view.slots.shape[2], WIDTH), -torch.inf)
    view = replace(view, recorded={**view.recorded, f"probe_logits:{WIDTH}": logits})
    decision = build(f"refit(keydiff, probes={WIDTH}, budget=9)").decide(view)
    assert torch.equal(decision.values, view.values)
    assert not decision.decay.any()


def test_in_half_precision_values_stay_numbers():
    view = probed(make_view(4))
    large = replace(view, keys=view.keys.half(), values=torch.full_like(view.values, 6e4).half())
    decision = build(f"refit(keydiff, probes={WIDTH}, budget=9)").decide(large)
    assert decision.values.dtype == torch.float16
    assert torch.isfinite(decision.values).all()


def test_what_would_say_nothing_is_refused():
    with pytest.raises(ConfigError, match="it lets slots fade, and so do biases"):
        build("refit(kv_policy(actions=[evict, forget]))", budget=9)
    for spec in ("refit(full)", "surprise_gate", "write_gate"):
        with pytest.raises(ConfigError, match="budget: 4 has no effect, for every slot stays"):
            build(spec, budget=4)
    with pytest.raises(ConfigError, match="belongs to refit"):
        build("refit(keydiff(budget=3))")


@pytest.mark.parametrize("biases", ["true", "false"])
def test_tokens_that_values_were_refitted_to_cannot_be_cropped(biases):
    model, ids = tiny("llama", layers=1), torch.arange(30)[None] + 8
    with build(f"refit(keydiff, budget=8, biases={biases})").attach(model) as cache:
        model(ids, past_key_values=cache)
        with pytest.raises(CacheError, match="or were rewritten, cannot be cropped to 28"):
            cache.crop(28)
        model(ids[:, :1], past_key_values=cache)
        cache.crop(30)  # what came after the decision is in no value
        assert cache.get_seq_length() == 30
        whole = build("refit(keydiff, biases=false)").new_cache(model)
        model(ids, past_key_values=whole)
        whole.crop(28)  # nothing was evicted, so nothing was rewritten


@pytest.mark.parametrize(
    "spec", [f"refit(keydiff, probes={WIDTH}, budget=9, allocation={way})" for way in ("uniform", "across_layers")]
    + ["write_gate(features=[])"],
)  # fmt: skip
def test_every_layer_is_written_once(spec, monkeypatch):
    manager = build(spec)
    rule, writes = type(manager.rule), []
    plain = rule.written

    def counting(self, decision, judgement, view):
        writes.append(view.layer)
        return plain(self, decision, judgement, view)

    monkeypatch.setattr(rule, "written", counting)
    manager.decide_all([probed(make_view(3 + layer, layer=layer), layer) for layer in range(2)])
    assert writes == [0, 1]
