"""Evaluation: measures against a known future, against SciPy, exhaustive search, and the plain way to evaluate."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from evomem.errors import ConfigError
from evomem.evaluation import Evaluator
from evomem.evaluation.future import sample_key
from evomem.evaluation.measurement import EXACT
from evomem.evaluation.objectives import Attention
from evomem.evaluation.oracle import (
    FutureOracle,
    evaluate_oracle,
    good_decision_ratio,
    oracle_scores,
    rank_correlation,
)
from evomem.models import LoadedModel
from evomem.testing.models import tiny, tiny_tokenizer
from tests.evaluation.test_evaluation import BUDGET, PROTOCOLS, READ, TASK, made, make_sample

SHAPE = (2, 3, 17)

ATTENTION = Attention.measurement


def heads_of(evaluation):
    return evaluation.values["head_attention"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def loaded(request):
    return LoadedModel(request.param, tiny(request.param, layers=2), tiny_tokenizer(), request.param)


def draw(seed, levels):
    """Scores with as many levels (0: no ties), and which slots hold a token: the empty ones come first."""
    g = torch.Generator().manual_seed(seed)
    valid = torch.arange(SHAPE[-1]) >= torch.randint(0, SHAPE[-1] - 3, SHAPE[:2], generator=g)[..., None]
    values = torch.randn(2, *SHAPE, generator=g)
    return [*(v if not levels else (v * levels).round() for v in values), valid]


@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_rank_correlation_is_scipys(seed, levels):
    scores, future, valid = draw(seed, levels)
    found = rank_correlation(torch.where(valid, scores, torch.nan), torch.where(valid, future, 1e9), valid)
    assert found.shape == SHAPE[:2]
    for row in range(SHAPE[0]):
        for head in range(SHAPE[1]):
            held = valid[row, head]
            slow = spearmanr(scores[row, head][held], future[row, head][held]).statistic
            np.testing.assert_allclose(found[row, head], slow, atol=1e-6)


def test_rank_correlation_of_protected_slots_and_of_constants():
    scores = torch.tensor([[[float("nan"), float("inf"), float("inf"), 2.0, 1.0]]])
    future = torch.tensor([[[9.0, 5.0, 4.0, 3.0, 1.0]]])
    valid = torch.tensor([[[False, True, True, True, True]]])
    expected = spearmanr([9.0, 9.0, 2.0, 1.0], [5.0, 4.0, 3.0, 1.0]).statistic
    assert float(rank_correlation(scores, future, valid)) == pytest.approx(expected)
    assert rank_correlation(torch.ones(1, 1, 5), future, valid).isnan()
    assert float(rank_correlation(future, future, valid)) == pytest.approx(1)
    assert float(rank_correlation(-future, future, valid)) == pytest.approx(-1)


@given(
    uses=st.lists(st.integers(0, 6), min_size=1, max_size=7),
    data=st.data(),
)
def test_good_decisions_are_those_that_belady_could_have_made(uses, data):
    """Belady's choices are found by trying every set of that size: the sets whose latest use is soonest, in order."""
    kept = set(data.draw(st.lists(st.integers(0, len(uses) - 1), unique=True)))
    empty = data.draw(st.integers(0, 2))
    ideal = min(sorted(uses[i] for i in chosen) for chosen in combinations(range(len(uses)), len(kept)))
    rest = sorted(uses)
    for use in ideal:
        rest.remove(use)
    evicted = [i for i in range(len(uses)) if i not in kept]
    good = [i for i in evicted if uses[i] >= min(rest)]
    expected = len(good) / len(evicted) if evicted else 1.0
    valid = torch.tensor([[[False] * empty + [True] * len(uses)]])
    keep = torch.tensor([[[True] * empty + [i in kept for i in range(len(uses))]]])
    found = good_decision_ratio(keep, torch.tensor([[[0.0] * empty + [float(u) for u in uses]]]), valid)
    assert float(found) == pytest.approx(expected)


def test_belady_itself_is_perfect_and_its_opposite_is_not():
    next_use, valid = torch.arange(8).float().expand(1, 2, 8), torch.ones(1, 2, 8, dtype=torch.bool)
    soon = next_use < 3
    assert good_decision_ratio(soon, next_use, valid).tolist() == [[1.0, 1.0]]
    # Keeps 5, 6, 7 and evicts 0, 1, 2 (before the boundary, 3) and 3, 4 (not before it).
    found = good_decision_ratio(next_use >= 5, next_use, valid)
    np.testing.assert_allclose(found, [[0.4, 0.4]], rtol=1e-6)
    assert good_decision_ratio(valid, next_use, valid).tolist() == [[1.0, 1.0]]


def test_the_oracle_keeps_the_most_attended_and_is_evaluated_like_any_manager(loaded):
    evaluator, sample = Evaluator(loaded), make_sample()
    tokens = evaluator.tokens(sample)
    found = evaluate_oracle(evaluator, sample, TASK, BUDGET, EXACT)
    future = evaluator.future.of(evaluator, tokens, sample_key(tokens), frozenset())
    asked = tokens.prompt.shape[1] + tokens.answer.shape[1] - 1
    oracle = FutureOracle(oracle_scores(future), budget=BUDGET)
    for view in evaluator.reading(tokens.read, frozenset()).views:
        keep = oracle.decide(view).keep[0].numpy()
        for head, peak in zip(keep, future.peak[view.layer][0].numpy(), strict=True):
            assert set(np.flatnonzero(head)) == set(np.argsort(-peak, kind="stable")[:BUDGET])
    plain = Evaluator(loaded).evaluate_plainly(oracle, sample, TASK, EXACT)
    assert found.loglik == pytest.approx(plain.loglik, abs=1e-5)
    assert (found.exact, found.slots, found.bytes_peak) == (plain.exact, plain.slots, plain.bytes_peak)
    # Read once, asked once to know the future, and once more after the decision.
    assert found.tokens == plain.tokens + asked
    assert evaluate_oracle(evaluator, sample, TASK, BUDGET).tokens == asked


def test_the_oracle_with_room_for_all_is_the_full_cache_and_sinks_are_kept(loaded):
    evaluator, sample = Evaluator(loaded), make_sample()
    (full,) = evaluator.evaluate([made("full")], sample, TASK)
    assert evaluate_oracle(evaluator, sample, TASK, READ).loglik == pytest.approx(full.loglik, abs=1e-6)
    tokens = evaluator.tokens(sample)
    scores = oracle_scores(evaluator.future.of(evaluator, tokens, sample_key(tokens), frozenset()))
    view = evaluator.reading(tokens.read, frozenset()).views[0]
    keep = FutureOracle(scores, budget=6, sinks=4).decide(view).keep
    assert keep[..., :4].all()
    assert (keep.sum(-1) == 6).all()


def test_no_manager_retains_more_than_the_oracle():
    """With one query head per KV head the largest of the group is its mean, and the oracle is the best there is."""
    model = LoadedModel("gpt2", tiny("gpt2", layers=2), tiny_tokenizer(), "gpt2")
    evaluator, sample = Evaluator(model), make_sample()
    tokens = evaluator.tokens(sample)
    scores = oracle_scores(evaluator.future.of(evaluator, tokens, sample_key(tokens), frozenset()))
    field = [made(spec).with_options(budget=BUDGET) for spec in ("keydiff", "tova", "h2o", "random", "streaming_llm")]
    best, *others = evaluator.evaluate([FutureOracle(scores, budget=BUDGET), *field], sample, TASK, ATTENTION)
    for other in others:
        assert np.all(np.array(heads_of(best)) >= np.array(heads_of(other)) - 1e-5)
        assert np.mean(heads_of(best)) > np.mean(heads_of(other)) + 0.01


def test_what_the_oracle_does_not_know_is_refused(loaded):
    with pytest.raises(ConfigError, match="compress_once"):
        evaluate_oracle(Evaluator(loaded, PROTOCOLS["streaming"]), make_sample(), TASK, 8)
    evaluator, sample = Evaluator(loaded), make_sample()
    view = evaluator.reading(evaluator.tokens(sample).read, frozenset()).views[0]
    with pytest.raises(ConfigError, match="its own sample"):
        FutureOracle((torch.zeros(1, view.slots.shape[1], 3),), budget=2).decide(view)
