from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem.errors import ConfigError, EvaluationError, EvomemError, TaskError, UnknownNameError
from evomem.evaluation import entrants as module
from evomem.evaluation.compare import NamedManager, Scenario, compare, evaluate, field_of
from evomem.evaluation.evaluator import Evaluator
from evomem.evaluation.measurement import EXACT, Evaluation, EvaluationProtocol
from evomem.evaluation.rows import Measured, Row, rows_of
from evomem.managers import build, managers, names
from evomem.models import LoadedModel
from evomem.report.sentences import sentences
from evomem.report.tables import markdown, notes, read_rows, tables, write_rows
from evomem.statistics import bootstrap_mean, paired_bootstrap, recovered_share
from evomem.tasks import build as build_task
from evomem.testing.models import tiny, tiny_tokenizer

# ---- statistics ----------------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(st.integers(0, 10**6), st.integers(10, 40), st.sampled_from([0.25, 2.0, 8.0]), st.integers(-8, 8))
def test_an_interval_holds_its_mean_and_moves_with_the_values(seed, count, scale, shift):
    data = np.random.default_rng(seed).gamma(2.0, 1.0, count)
    found = bootstrap_mean(data, resamples=200)
    assert found == bootstrap_mean(data, resamples=200)
    assert found.mean == pytest.approx(np.mean(data))
    assert data.min() < found.low < found.mean < found.high < data.max()
    moved = bootstrap_mean(scale * data + shift, resamples=200)
    assert (moved.low, moved.high) == pytest.approx((scale * found.low + shift, scale * found.high + shift), abs=1e-6)


def test_a_paired_interval_is_narrow_where_the_samples_differ_and_the_difference_does_not():
    rng = np.random.default_rng(1)
    hardness = rng.normal(0, 5, 60)
    a, b = hardness + 0.3 + rng.normal(0, 0.1, 60), hardness
    found = paired_bootstrap(a, b)
    # Slow and apart: resample the pairs by hand and take percentiles; BCa differs by little for symmetric values.
    means = np.sort([np.mean((a - b)[rng.integers(0, 60, 60)]) for _ in range(4000)])
    assert (found.low, found.high) == pytest.approx((means[100], means[3900]), abs=0.006)
    assert 0 < found.low < found.high < 0.5
    assert bootstrap_mean(a, resamples=500).high - bootstrap_mean(a, resamples=500).low > 1


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(2)
    found = [bootstrap_mean(rng.exponential(1, 30), level=0.8, resamples=200) for _ in range(120)]
    share = np.mean([one.low <= 1 <= one.high for one in found])
    assert 0.68 <= share <= 0.9  # five standard errors around 0.78, what 30 skewed values allow


def test_degenerate_cases_are_said_plainly():
    assert paired_bootstrap([1, 2, 3], [0, 1, 2]).bounds() == [1, 1]
    assert bootstrap_mean([4.0]).bounds() is None
    assert bootstrap_mean([4.0, math.nan]).bounds() is None
    assert bootstrap_mean([0.0] * 20 + [1.0]).bounds() is not None
    with pytest.raises(EvomemError, match="same samples"):
        paired_bootstrap([1, 2], [1])
    assert recovered_share(-1.0, -2.0, 0.0) == 0.5
    assert recovered_share(-1.0, 0.0, 0.0) is None
    assert recovered_share(math.nan, -1.0, 0.0) is None


# ---- rows and what is said of them ---------------------------------------------------------------------------------


def measured(manager, role, budget, logliks, size=1000.0, exact=None):
    def scored(i):
        return {} if exact is None or exact[i] is None else {"exact": exact[i]}

    found = [
        Evaluation(str(i), {"loglik": value} | scored(i), 8.0, size, size, 1, 0.1) for i, value in enumerate(logliks)
    ]
    return Measured("m", "t", manager, budget, "compress_once/query_agnostic", "sealed", role, found)


def a_field(subject, size=1000.0):
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.05, 20)
    return rows_of(
        "mine",
        [
            measured("full", "full", None, noise * 0, 9000.0),
            measured("mine", "subject", 8, subject + rng.normal(0, 0.05, 20)),
            measured("keydiff", "field", 8, -1.0 + noise, size),
            measured("random", "field", 8, -2.0 + noise),
        ],
    )


@pytest.mark.parametrize(
    ("subject", "verdict", "interval_sign"),
    [(-0.5, "beats the best heuristic (keydiff) by", 1), (-1.5, "loses to the best heuristic (keydiff) by", -1)],
)
def test_the_sentence_says_who_wins(subject, verdict, interval_sign):
    rows = a_field(subject)
    (sentence,) = sentences(rows)
    assert verdict in sentence
    assert "on 20 sealed samples at 8 slots per head" in sentence
    assert "memory" not in sentence
    best = next(row for row in rows if row.manager == "keydiff")
    assert all(math.copysign(1, bound) == interval_sign for bound in best.interval)
    assert f"by {abs(best.difference):.3f} nats" in sentence


def test_the_sentence_says_when_nothing_is_shown():
    (sentence,) = sentences(a_field(-1.0))
    assert "mine cannot be told from the best heuristic (keydiff)" in sentence


@pytest.mark.parametrize(("size", "best"), [(1100.0, "random"), (900.0, "keydiff"), (1010.0, "keydiff")])
def test_the_best_heuristic_holds_no_more_memory_and_others_are_told_apart(size, best):
    rows = a_field(-1.0, size=size)
    (sentence,) = sentences(rows)
    assert f"the best heuristic ({best})" in sentence
    assert ("against keydiff, which holds 10.0% more memory" in sentence) == (size == 1100)
    assert ("keydiff holds 10.0% less memory" in sentence) == (size == 900)
    assert any("more than 2%" in note for note in notes(rows)) == (size != 1010)
    assert ("1*" in markdown(rows)) == (size != 1010)


def test_rows_are_recomputable_and_survive_json(tmp_path):
    rows = a_field(-0.5)
    assert [row.manager for row in rows] == ["mine", "keydiff", "random", "full"]
    by_name = {row.manager: row for row in rows}
    for row in rows:
        expected = (row.loglik - by_name["random"].loglik) / (by_name["full"].loglik - by_name["random"].loglik)
        if row.budget is not None:
            assert row.recovered == pytest.approx(expected)
        if row.manager != "mine":
            assert row.difference == pytest.approx(by_name["mine"].loglik - row.loglik)
            assert row.interval[0] <= row.difference <= row.interval[1]
    assert by_name["mine"].interval is None
    assert by_name["full"].bytes_ratio == 9
    rows[2] = replace(rows[2], loglik=math.nan)
    write_rows(tmp_path / "rows.json", rows)
    data = json.loads((tmp_path / "rows.json").read_text(), parse_constant=pytest.fail)
    required = {"model", "task", "manager", "budget", "protocol", "score", "loglik", "interval"}
    assert all(required | {"bytes_peak", "bytes_mean"} <= set(row) for row in data)
    again = read_rows(tmp_path / "rows.json")
    assert math.isnan(again[2].loglik)
    assert [replace(row, loglik=0) for row in again] == [replace(row, loglik=0) for row in rows]
    assert markdown(rows).count("\n| ") == len(rows) + 1
    assert sum(table.row_count for table in tables(rows)) == len(rows)


def trivial_field(**logliks):
    """A subject at -0.5, the full cache at 0, and heuristics at these means, all with the same noise."""
    noise = np.random.default_rng(0).normal(0, 0.05, 20)
    others = [measured(name.replace("_x", "(seed=1)"), "field", 8, value + noise) for name, value in logliks.items()]
    return rows_of(
        "mine",
        [measured("full", "full", None, 0 * noise, 9000.0), measured("mine", "subject", 8, -0.5 + noise), *others],
    )


@pytest.mark.parametrize(
    ("logliks", "floor", "recovered"),
    [
        ({"keydiff": -0.6, "random": -4.0}, "random", 3.5 / 4),
        ({"random": -0.9, "streaming_llm": -2.0, "fifo": -3.0}, "streaming_llm", 1.5 / 2),
        ({"random": -4.0, "protected_random_x": -1.0, "streaming_llm": -2.0}, "protected_random(seed=1)", 0.5),
        ({"fifo": -1.0, "streaming_llm": -1.0}, "streaming_llm", 0.5),
        ({"streaming_llm": math.nan, "fifo": -2.0}, "fifo", 1.5 / 2),
        ({"keydiff": -0.6}, None, None),
    ],
)
def test_recovered_starts_from_the_best_trivial_manager(logliks, floor, recovered):
    rows = trivial_field(**logliks)
    mine = next(row for row in rows if row.manager == "mine")
    assert (mine.floor, mine.recovered) == (
        floor,
        recovered if recovered is None else pytest.approx(recovered, abs=1e-2),
    )
    at_floor = [row.recovered for row in rows if row.manager == floor]
    assert at_floor == [0.0] * (floor is not None)
    said = [note for note in notes(rows) if "recovered" in note]
    assert len(said) == (floor is not None)
    assert all(("the best trivial manager" in note and floor in note) == (floor != "random") for note in said)
    old = [Row.from_json({k: v for k, v in row.to_json().items() if k != "floor"}) for row in rows]
    assert all("share of what random eviction loses" in note for note in notes(old) if "recovered" in note)


def test_the_sentence_sets_the_best_trivial_manager_beside_the_best_heuristic():
    (sentence,) = sentences(trivial_field(keydiff=-0.8, protected_random=-1.5, streaming_llm=-1.0, fifo=-1.2))
    assert "beats the best heuristic (keydiff) by 0.300" in sentence
    assert "; it beats the best trivial manager (streaming_llm) by 0.500 nats" in sentence
    (sentence,) = sentences(trivial_field(keydiff=-0.8, fifo=-0.3))
    assert "loses to the best heuristic (fifo) by 0.200" in sentence
    assert "; fifo is a trivial manager" in sentence
    (sentence,) = sentences(trivial_field(keydiff=-0.8, random=-0.9))
    assert "trivial" not in sentence


def test_exact_scores_are_paired_apart_from_likelihood():
    rows = rows_of(
        "a",
        [
            measured("a", "subject", 8, [0.0] * 6, exact=[1, 1, 0, 1, None, 1]),
            measured("b", "field", 8, [-1.0] * 6, exact=[1, 0, 0, 0, 1, None]),
        ],
    )
    b = rows[1]
    assert (b.manager, b.score, b.difference, b.difference_score) == ("b", pytest.approx(0.4), 1.0, 0.5)
    assert b.interval_score[0] < 0.5 < b.interval_score[1]


# ---- comparing on a real small model -------------------------------------------------------------------------------

WORDS = [
    "the",
    "cat",
    "dog",
    "bird",
    "tree",
    "house",
    "red",
    "black",
    "white",
    "big",
    "small",
    "grass",
    "green",
    "sky",
    "blue",
    "sun",
]


@pytest.fixture(scope="module")
def loaded():
    return LoadedModel("tiny", tiny("llama", layers=2), tiny_tokenizer(), "digest")


@pytest.fixture(scope="module")
def task(loaded, tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("task") / "t.jsonl"
    rows = [
        {
            "context": " ".join(rng.choice(WORDS, 40)), "question": " what ?", "answers": [f"{a} {b}"],
            "split": "sealed", "id": i, "max_new_tokens": 2,
        }
        for i, (a, b) in enumerate(rng.choice(WORDS, (5, 2)))
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return build_task(f"file:{path}", loaded.tokenizer)


def place(loaded, task, **protocol):
    return Scenario("tiny", "t", Evaluator(loaded, EvaluationProtocol(**protocol)), task)


def members(*specs):
    return [NamedManager(spec, build(spec)) for spec in specs]


@pytest.mark.parametrize("protocol", [{}, {"kind": "streaming", "every": 16, "mode": "query_aware"}])
def test_rows_equal_the_plain_way_one_manager_at_a_time(loaded, task, protocol):
    here = place(loaded, task, **protocol)
    against = ["snapkv(window=4)", "h2o", "random", "adakv(keydiff)"]
    found = compare(members("keydiff", "knorm"), [here], samples=3, budgets=[12, 0.5], against=against)
    assert len(found.rows) == 6 * 2 + 1
    drawn = task.samples("sealed", 3, 0)
    for row in found.rows:
        manager = build(row.manager) if row.budget is None else build(row.manager, budget=row.budget)
        plain = [here.evaluator.evaluate_plainly(manager, sample, task, EXACT) for sample in drawn]
        assert row.loglik == pytest.approx(np.mean([e.loglik for e in plain]), abs=1e-4)
        assert row.score == pytest.approx(np.mean([e.exact for e in plain]))
        assert row.slots == pytest.approx(np.mean([e.slots for e in plain]))
        if not protocol:
            assert row.bytes_mean == pytest.approx(np.mean([e.bytes_mean for e in plain]), rel=1e-6)
    roles = {(row.manager, row.role) for row in found.rows}
    assert ("full", "full") in roles
    assert ("knorm", "subject") in roles
    assert {row.samples for row in found.rows} == {3}
    assert all((row.interval is None) == (row.manager == "keydiff") for row in found.rows)
    assert here.evaluator.store.bytes_in_memory == 0


@pytest.mark.parametrize("field", ["loglik", "bytes_mean", "exact"])
def test_a_number_that_is_none_is_an_error_that_names_manager_and_sample(loaded, task, monkeypatch, tmp_path, field):
    here, file = place(loaded, task), tmp_path / "rows.partial.jsonl"
    real = module.on_sample

    def spoiled(entrants, place, sample, exact):
        found = real(entrants, place, sample, exact)
        if sample.id == task.samples("sealed", 2, 0)[1].id:
            bad = math.nan if field != "loglik" else -math.inf
            fields = {field: bad} if field == "bytes_mean" else {"values": {**found[1].values, field: bad}}
            found[1] = replace(found[1], **fields)
        return found

    monkeypatch.setattr(module, "on_sample", spoiled)
    with pytest.raises(EvaluationError, match=f"h2o on tiny, t, sample .+: {field} is") as caught:
        compare(members("keydiff"), [here], samples=2, budgets=[8], against=["h2o"], keep=file)
    assert "float32" in str(caught.value)
    assert len(file.read_text().splitlines()) == 2  # what was measured, and the sample that is good


def test_a_model_of_which_a_weight_is_nan_has_no_row(task):
    broken = tiny("llama")
    broken.model.norm.weight.data[0] = math.nan
    here = place(LoadedModel("broken", broken, tiny_tokenizer(), "0" * 64), task)
    with pytest.raises(EvaluationError, match="full on tiny"):
        evaluate(NamedManager("full", build("full")), [here], samples=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_subject_may_have_numbers_of_any_type(loaded, task, tmp_path, dtype):
    subject = NamedManager("mine", build("feature_scorer(knots=1)").to(dtype))
    found = compare([subject], [place(loaded, task)], samples=1, budgets=[8], against=[], keep=tmp_path / "rows.jsonl")
    assert [row.manager for row in found.rows] == ["mine"]


def test_a_tokenizer_of_another_model_is_named(loaded, task):
    small = LoadedModel("small", tiny("llama", vocab_size=8), loaded.tokenizer, "0" * 64)
    with pytest.raises(TaskError, match=r"is beyond the 8 that model 'small' has embeddings of"):
        evaluate(NamedManager("full", build("full")), [place(small, task)], samples=1)


def test_a_context_is_read_once_for_the_whole_field(loaded, task):
    here = place(loaded, task)
    compare(members("keydiff"), [here], samples=2, budgets=[8, 30], exact=False)
    assert here.evaluator.store.misses == 2


def test_a_killed_comparison_goes_on_and_gives_the_same(loaded, task, tmp_path, monkeypatch):
    file = tmp_path / "rows.json.partial.jsonl"

    def run(keep, progress=None, against=("h2o",)):
        arguments = {"samples": 4, "budgets": [8], "against": against, "keep": keep, "progress": progress}
        return compare(members("keydiff"), [place(loaded, task)], **arguments)

    whole = run(None)

    def kill(done, total):
        assert total == 4
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(file, kill)
    with file.open("ab") as stream:
        stream.write(b'{"place":0,"sample":"torn')
    seen = []
    real = module.on_sample
    monkeypatch.setattr(module, "on_sample", lambda *a: seen.append(a[2].id) or real(*a))
    resumed = run(file)
    assert len(seen) == 2
    assert [replace(row, seconds=0) for row in resumed.rows] == [replace(row, seconds=0) for row in whole.rows]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["sample"] for line in lines[1:]] == [sample.id for sample in task.samples("sealed", 4, 0)]
    with pytest.raises(ConfigError, match="another comparison"):
        run(file, against=("snapkv",))


def test_what_takes_no_budget_is_measured_as_it_is(loaded, task):
    subject = NamedManager("mine", build("namm(scorer=linear, selection=threshold)"))
    found = compare([subject], [place(loaded, task)], samples=2, budgets=[8, 16], against=["keydiff"], exact=False)
    expected = {("mine", None), ("full", None), ("keydiff", 8), ("keydiff", 16)}
    assert {(row.manager, row.budget) for row in found.rows} == expected
    assert all(row.interval is not None for row in found.rows if row.manager != "mine")
    alone = evaluate(members("full")[0], [place(loaded, task)], samples=2)
    assert [(row.manager, row.interval, row.score is not None) for row in alone.rows] == [("full", None, True)]


def test_the_field_is_all_heuristics_unless_it_is_named():
    field = {member.name for member in field_of(None)}
    searched = {"namm", "feature_scorer", "kv_policy", "retention_gate", "surprise_gate", "write_gate"}
    others = {name for name in names() if not managers.get(name).__module__.startswith("evomem.")}  # of other tests
    assert field - others == set(names()) - others - searched - {"full", "adakv", "evicted_rows", "refit", "kvzip"} | {
        "adakv(keydiff)"
    }
    assert {"lru", "lfu", "fifo", "slot_relevance"} <= field
    assert [m.name for m in field_of(["keydiff", "full", "adakv(snapkv)", "keydiff"])] == ["keydiff", "adakv(snapkv)"]
    with pytest.raises(UnknownNameError, match="Did you mean 'keydiff'"):
        field_of(["keydif"])


@settings(max_examples=50)
@given(st.lists(st.one_of(st.none(), st.integers(1, 500), st.floats(0.01, 1.0)), max_size=30))
def test_batches_hold_every_manager_once_and_rows_of_about_the_same_size(budgets):
    entrants = [module.Entrant(str(i), "field", budget, build("full")) for i, budget in enumerate(budgets)]
    batches = list(module.batches_of(entrants))
    assert sorted(index for batch in batches for index in batch) == list(range(len(budgets)))
    for batch in batches:
        sizes = [budgets[index] for index in batch]
        assert len(batch) <= module.ROWS
        assert len(batch) == 1 or None not in sizes
        if all(isinstance(size, int) for size in sizes):
            assert max(sizes) <= module.SPREAD * min(sizes)


def test_rows_of_later_versions_are_read():
    data = {**a_field(-0.5)[0].to_json(), "new": 1}
    assert Row.from_json(data).manager == "mine"
