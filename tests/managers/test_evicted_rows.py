"""A memory of what was evicted: against plain loops, its limits, and that a cache neither loses nor invents a token."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evomem.errors import CacheError, ConfigError
from evomem.evaluation.population import PopulationPolicy
from evomem.managers import build
from evomem.memory.explicit import PairMemory
from tests.support.ragged_view import make_view

SPECS = (
    "evicted_rows(keydiff, rows=4, budget=9)",
    "evicted_rows(h2o, rows=3, budget=9, sharpness=2, weight=0.5)",
    "evicted_rows(streaming_llm(sinks=2), rows=30, budget=12, writes=values)",
    "evicted_rows(snapkv(window=8), rows=5, budget=0.4, allocation=across_heads)",
)


def slow_rows(manager, view, keep, b, h):
    """Slot -> (key, value, tokens) of one head, in Python numbers; keep: indices of the slots that stay."""
    o = manager.options
    held = [s for s, token in enumerate(view.slots[b, h].tolist()) if token >= 0]
    content = {s: (view.keys[b, h, s].tolist(), view.values[b, h, s].tolist()) for s in held}
    decays = None if view.decays is None else view.decays[b, h].tolist()
    mass = {s: 1.0 if decays is None else math.exp(decays[s] / o.weight) for s in held}
    safe = manager.ends.safe(view, torch.tensor([[[len(keep)]]]))[b, h].tolist()
    scores = manager.score(view)[b, h].tolist()
    rows = sorted((s for s in keep if not safe[s]), key=lambda s: scores[s])[: o.rows]

    def cosine(one, two):
        return sum(x * y for x, y in zip(one, two, strict=True)) / (math.hypot(*one) * math.hypot(*two))

    written = {s: [] for s in rows}  # (share, key, value)
    for s in set(held) - set(keep):
        logits = [o.sharpness * cosine(content[s][0], content[row][0]) for row in rows]
        total = sum(math.exp(x - max(logits)) for x in logits) if rows else 1
        for row, logit in zip(rows, logits, strict=True):
            written[row].append((mass[s] * math.exp(logit - max(logits)) / total, *content[s]))
    result = {}
    for s in keep:
        parts = [(mass[s], *content[s]), *written.get(s, [])]
        tokens = sum(share for share, _, _ in parts)
        key, value = (
            [sum(part[0] * part[which][d] for part in parts) / tokens for d in range(len(parts[0][which]))]
            for which in (1, 2)
        )
        result[s] = (key if o.writes == "both" else content[s][0], value, tokens)
    return result


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("again", [False, True])
def test_rows_are_those_of_plain_loops(spec, again):
    manager, view = build(spec), make_view(3)
    if again:  # some slots are rows already
        view = replace(view, decays=manager.options.weight * torch.log(1 + torch.arange(40.0) % 3).expand(2, 3, 40))
    decision = manager.decide(view)
    plain = manager.inner.decide(view)
    assert torch.equal(decision.keep, plain.keep)
    for b in range(2):
        for h in range(3):
            keep = decision.keep[b, h].nonzero()[:, 0].tolist()
            for s, (key, value, tokens) in slow_rows(manager, view, keep, b, h).items():
                torch.testing.assert_close(decision.keys[b, h, s].tolist(), key, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(decision.values[b, h, s].tolist(), value, rtol=1e-4, atol=1e-5)
                expected = manager.options.weight * math.log(tokens)
                torch.testing.assert_close(float(decision.decay[b, h, s]), expected, rtol=1e-4, atol=1e-5)


def test_equal_tokens_can_be_evicted_without_a_change():
    """Every token is there three times; what is read of 7 rows is what is read of all 21."""
    draw = torch.Generator().manual_seed(0)
    view, manager = make_view(0, held=((21,) * 3, (21,) * 3)), build("evicted_rows(random, rows=7, sharpness=10000)")
    keys, values = (torch.randn(2, 3, 7, 8, generator=draw).repeat(1, 1, 3, 1) for _ in range(2))
    view, query = replace(view, keys=keys, values=values), torch.randn(2, 3, 8, generator=draw)
    manager = manager.with_options(budget=7)
    decision = manager.decide(view)

    class First(type(manager.inner)):  # keeps one of each
        def score(self, view):
            return -torch.arange(21.0).expand(2, 3, 21)

    manager.inner = First(budget=7)
    decision = manager.decide(view)
    assert decision.keep.nonzero()[:, 2].unique().tolist() == list(range(7))

    def read(bias, keys, values):
        weights = torch.softmax((keys @ query[..., None])[..., 0] + bias, -1)
        return (weights[..., None] * values).sum(2)

    rows = torch.where(decision.keep, decision.decay, -torch.inf)
    torch.testing.assert_close(read(rows, decision.keys, decision.values), read(torch.zeros(21), keys, values))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("spec", [SPECS[0], "evicted_rows(keydiff, rows=3, budget=7, allocation=across_heads)"])
def test_a_cache_holds_every_token_once_and_pieces_do_not_matter(spec, model):
    ids, manager = torch.randint(1, 50, (2, 41), generator=torch.Generator().manual_seed(1)), build(spec, every=8)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with manager.attach(model) as whole:
        logits = model(ids, attention_mask=mask, past_key_values=whole).logits
        parts, pieces = [], manager.new_cache(model)
        for begin, end in ((0, 8), (8, 11), (11, 30), (30, 41)):
            passed = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=pieces)
            parts.append(passed.logits)
        alone = manager.new_cache(model)
        model(ids[1:, 5:], past_key_values=alone)
    torch.testing.assert_close(torch.cat(parts, 1)[:, 5:], logits[:, 5:], rtol=1e-4, atol=1e-4)
    for layer, other in zip(whole.layers, alone.layers, strict=True):
        tokens = torch.where(layer.slots >= 0, layer.decays.exp(), 0.0).sum(-1)
        torch.testing.assert_close(tokens, torch.tensor([[41.0, 41.0], [36.0, 36.0]]))
        assert torch.equal((layer.slots[1] >= 0).sum(-1), (other.slots[0] >= 0).sum(-1))
        held = [[torch.sort(one.values[row, h][one.slots[row, h] >= 0], 0).values for h in range(2)]
                for one, row in ((layer, 1), (other, 0))]  # fmt: skip
        for mine, by_itself in zip(*held, strict=True):
            torch.testing.assert_close(mine, by_itself, rtol=1e-4, atol=1e-5)


def test_what_was_written_is_not_cropped(model):
    manager = build(SPECS[0], every=8)
    with manager.attach(model) as cache:
        model(torch.arange(1, 43)[None], past_key_values=cache)
        cache.crop(41)
        cache.crop(40)
        with pytest.raises(CacheError, match="stand for several tokens, or were rewritten"):
            cache.crop(39)


def test_a_population_writes_each_for_itself():
    managers, view = [build(SPECS[0]), build("keydiff(budget=9)"), build(SPECS[1])], make_view(5)
    row = view.map(lambda part: part[:1])
    made = PopulationPolicy(managers).decide(row)
    for number, manager in enumerate(managers):
        alone = manager.decide(row)
        assert torch.equal(made.keep[number], alone.keep[0])
        for name in ("keys", "values"):
            expected = getattr(view, name)[0] if alone.keys is None else getattr(alone, name)[0]
            assert torch.equal(getattr(made, name)[number], expected)


def test_what_cannot_be_written_is_refused():
    with pytest.raises(ConfigError, match="belongs to evicted_rows"):
        build("evicted_rows(keydiff(budget=3))")
    with pytest.raises(ConfigError, match="no last slot"):
        build("evicted_rows(namm)")
    with pytest.raises(ConfigError, match="lets slots fade"):
        build(
            {"name": "evicted_rows", "options": {"inner": "kv_policy(actions=[evict, forget], features=[keydiff])"}},
            budget=5,
        ).decide(make_view(0))
    memory = PairMemory(observes=build("keydiff").observes)
    keys = torch.randn(1, 1, 9, 4)
    memory.feed(keys, keys, torch.arange(9).expand(1, 1, 9))
    with pytest.raises(CacheError, match="only its model writes"):
        memory.decide(build("evicted_rows(keydiff, rows=2, budget=4)"))
