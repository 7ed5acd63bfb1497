"""Evaluation: many managers decide at once, each as if it were alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from evomem.evaluation import Evaluator, PopulationPolicy
from evomem.managers import FeatureScorer, MemoryManager
from evomem.managers.allocation import Everything
from evomem.managers.base import ManagerOptions
from evomem.models import LoadedModel
from evomem.testing.models import tiny, tiny_tokenizer
from tests.evaluation.test_evaluation import BUDGET, FEATURES, TASK, Fading, equal, made, make_sample, randomised


@pytest.fixture(scope="module")
def llama():
    return LoadedModel("llama", tiny("llama", layers=2), tiny_tokenizer(), "llama")


def test_population_groups_by_everything_but_parameters(llama):
    """Managers that differ in a buffer, an option or a shape must not be decided by one of them."""

    class Buffered(MemoryManager):
        name = "buffered"

        class Options(ManagerOptions):
            sign: int = 1

        def __init__(self, **options):
            super().__init__(**options)
            self.weight = nn.Parameter(torch.ones(()))
            self.register_buffer("offset", torch.zeros(16))

        def score(self, view):
            return self.options.sign * self.weight * (view.keys.float() - self.offset).norm(dim=-1)

    crowd = [Buffered(budget=5) for _ in range(4)] + [Buffered(budget=5, sign=-1), Buffered(budget=6)]
    crowd[1].offset.fill_(0.7)
    crowd[2].weight.data.fill_(-2.0)
    reading = Evaluator(llama)
    view = reading.reading(reading.tokens(make_sample()).read, frozenset()).views[0]
    policy = PopulationPolicy(crowd)
    kept = policy.decide(view).keep
    assert len(policy.groups) == 4
    for place, manager in enumerate(crowd):
        assert torch.equal(kept[place], manager.decide(view).keep[0])
    assert len({mask.numpy().tobytes() for mask in kept}) == 4


def test_population_of_rows_equals_each_row(llama):
    """After the first decision every candidate looks at slots of its own, also at ragged ones."""
    crowd = [
        made(spec, seed) for spec in ("feature_scorer", "namm(scorer=bam, selection=threshold)") for seed in (0, 1)
    ]
    crowd += [made("adakv(keydiff)"), randomised(Fading(budget=9), 1)]
    evaluator = Evaluator(llama)
    crowd = [evaluator.scheduled(manager) for manager in crowd]
    policy = PopulationPolicy(crowd)
    reading = evaluator.reading(evaluator.tokens(make_sample()).read, policy.observes)

    def rows_of(view, take):
        fields = {name: take(getattr(view, name)) for name in ("keys", "values", "slots", "start")}
        return replace(view, **fields, recorded={k: take(t) for k, t in view.recorded.items()}, memo={})

    for view in reading.views:
        g = torch.Generator().manual_seed(view.layer)
        rows, heads, slots = len(crowd), *view.slots.shape[1:]
        first = torch.randint(0, slots - 9, (rows, heads, 1), generator=g)
        many = rows_of(view, lambda tensor, rows=rows: tensor.expand(rows, *tensor.shape[1:]))
        many = replace(many, slots=torch.where(torch.arange(slots) >= first, many.slots, -1))
        decided = policy.decide(many)
        for place, manager in enumerate(crowd):
            one = rows_of(many, lambda tensor, place=place: tensor[place : place + 1])
            alone = manager.decide(one)
            assert torch.equal(decided.keep[place], alone.keep[0])
            if alone.decay is not None:
                torch.testing.assert_close(decided.decay[place], alone.decay[0])
        assert policy.fades(view.layer).tolist() == [isinstance(manager, Fading) for manager in crowd]


def test_what_managers_compute_once_is_shared_and_not_wrong(llama):
    """Features stay with the reading; another list of features must not find them."""
    evaluator, sample = Evaluator(llama), make_sample()
    first = evaluator.evaluate([made("feature_scorer")], sample, TASK)
    other = FeatureScorer(features=FEATURES[::-1], budget=BUDGET, sinks=1, recent=2)
    with torch.no_grad():
        other.weights.copy_(made("feature_scorer").weights.flip(1))
    again = evaluator.evaluate([other], sample, TASK)
    assert evaluator.store.misses == 1
    assert first[0].loglik == pytest.approx(again[0].loglik, abs=1e-6)


def test_a_manager_may_have_an_allocation_of_its_own(llama):
    class Generous(Everything):
        def require_no_budget(self, budget, manager):
            """Take a budget, which `Everything` refuses as it would say nothing."""

    class Keeping(MemoryManager):
        name = "everything"

        def score(self, view):
            return view.keys.new_zeros(view.slots.shape)

        def built_in_allocation(self):
            return Generous()

    evaluator, sample = Evaluator(llama), make_sample()
    equal(*evaluator.evaluate([Keeping(budget=3), made("full")], sample, TASK))
