"""Report: what memory costs in a comparison: net values, who wins on them, and totals that differ between inputs."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evomem
from evomem.errors import ConfigError
from evomem.evaluation import entrants
from evomem.evaluation.compare import NamedManager
from evomem.evaluation.measurement import Evaluation
from evomem.evaluation.rows import Measured, rows_of
from evomem.models import LoadedModel
from evomem.report.sentences import best_on_net, sentences
from evomem.report.subjects import own_budgets, resolve
from evomem.report.tables import markdown, notes, read_rows, tables, write_rows
from evomem.runs.experiment_parts import FitnessConfig
from evomem.runs.fitness import worth
from evomem.statistics import verdict
from evomem.testing.models import tiny, tiny_tokenizer

COUNT = 24


def measured(manager, role, budget, logliks, sizes, totals=None):
    """One manager's evaluations: per sample the log-likelihood, mean bytes, and slots of all heads (2 layers of 2)."""
    found = []
    for i, (value, size) in enumerate(zip(logliks, np.broadcast_to(sizes, len(logliks)), strict=True)):
        total = 40.0 if totals is None else float(totals[i])
        heads = ((total / 4,) * 2,) * 2
        found.append(
            Evaluation(
                str(i), {"loglik": value, "head_slots": heads, "head_bytes": heads}, total / 4, size, size, 1, 0.1
            )
        )
    return Measured("m", "t", manager, budget, "compress_once/query_agnostic", "sealed", role, found)


def adaptive_and_fixed(noise=0.02):
    """The adaptive manager pays for memory where it helps; two fixed ones pay for too much, or lose too much."""
    rng = np.random.default_rng(3)
    hard = rng.integers(0, 2, COUNT)
    jitter = rng.normal(0, noise, (4, COUNT))
    size = 1e6 * (1 + 3 * hard)
    return [
        measured("adaptive", "subject", 40, -0.5 + jitter[0], size, 20 + 60 * hard),
        measured("small", "subject", 20, -0.5 - 1.5 * hard + jitter[1], 1e6),
        measured("large", "field", 80, -0.45 + jitter[2], 4e6),
        measured("full", "full", None, -0.4 + jitter[3], 9e6),
    ]


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.03, 2.0]), st.integers(2, 12))
def test_net_is_what_a_search_would_charge_sample_by_sample(seed, price, count):
    rng = np.random.default_rng(seed)
    logliks, sizes = rng.normal(-1, 0.5, (3, count)), rng.uniform(1e5, 3e6, (3, count))
    given_names = [("mine", "subject", 8), ("other", "subject", 8), ("keydiff", "field", 16)]
    ones = [measured(*name, *values) for name, *values in zip(given_names, logliks, sizes, strict=True)]
    rows = {row.manager: row for row in rows_of("mine", ones, price)}
    config = FitnessConfig(price_per_megabyte=price)
    for one, values, bytes_ in zip(ones, logliks, sizes, strict=True):
        net = values - price * bytes_ / 1e6
        assert rows[one.manager].net == pytest.approx(net.mean())
        assert rows[one.manager].net == pytest.approx(np.mean([worth([e], config)[0] for e in one.evaluations]))
        assert rows[one.manager].price_per_megabyte == price
        if one.manager != "mine":
            difference = logliks[0] - price * sizes[0] / 1e6 - net
            assert rows[one.manager].net_difference == pytest.approx(difference.mean())
            low, high = rows[one.manager].net_interval
            assert low <= difference.mean() <= high
            if price == 0:
                assert rows[one.manager].net_interval == pytest.approx(rows[one.manager].interval)
    plain = {row.manager: row for row in rows_of("mine", ones)}
    assert all(
        row.net is row.net_difference is row.net_interval is row.price_per_megabyte is None for row in plain.values()
    )
    without = {"price_per_megabyte": None, "net": None, "net_difference": None, "net_interval": None}
    assert plain == {name: replace(row, **without) for name, row in rows.items()}
    order = [row.net for row in rows.values() if row.budget == 8]
    assert order == sorted(order, reverse=True)


def test_the_interval_of_net_is_of_each_samples_own_bytes():
    ones = adaptive_and_fixed()
    row = next(row for row in rows_of("adaptive", ones, 0.1) if row.manager == "large")
    logliks, sizes = (
        [np.array([getattr(e, name) for e in ones[i].evaluations]) for i in (0, 2)] for name in ("loglik", "bytes_mean")
    )
    difference = logliks[0] - logliks[1] - 0.1 * (sizes[0] - sizes[1]) / 1e6
    rng = np.random.default_rng(0)
    means = np.sort([difference[rng.integers(0, COUNT, COUNT)].mean() for _ in range(4000)])
    # Slow and apart: pairs drawn by hand. With the mean bytes in place of each sample's it would be a fifth as wide.
    assert row.net_interval == pytest.approx([means[100], means[3900]], abs=0.01)
    assert row.net_interval[1] - row.net_interval[0] > 3 * (row.interval[1] - row.interval[0])


def test_a_sentence_tells_a_budget_from_what_is_held_at_it():
    """An input that decides the total holds other slots than the budget says."""
    logliks, size = np.linspace(-1, -0.5, COUNT), 1024 * 30
    for totals, budget, text in (
        (np.full(COUNT, 48), 32, "at a budget of 32 slots per head (12.0 held, 30 KiB measured)"),
        (np.full(COUNT, 128), 32, "at 32 slots per head (30 KiB measured)"),
        (np.full(COUNT, 48), 0.25, "at 25% of the tokens (30 KiB measured)"),
        (np.full(COUNT, 48), None, "at 12 slots per head (30 KiB measured)"),
    ):
        rows = rows_of(
            "mine",
            [measured("mine", "subject", budget, logliks, size, totals), measured("x", "field", budget, logliks, size)],
        )
        assert text in sentences(rows)[0]


def test_the_lines_say_who_wins_on_net_across_budgets_and_the_price_once():
    rows = rows_of("adaptive", adaptive_and_fixed(), 0.1)
    net, largest = sentences(rows)
    assert " ".join((net, largest)).count("0.1 nats per MB") == 1
    start, _, outcomes = net.partition(" beats ")
    assert start.startswith("At 0.1 nats per MB, on 24 sealed samples: adaptive (")
    beaten = ("small", "small ("), ("large", "the best heuristic on net, large ("), ("full", "the full cache (")
    for outcome, (name, text) in zip(outcomes.removesuffix(".").split("; beats "), beaten, strict=True):
        assert outcome.startswith(text)
        row = next(row for row in rows if row.manager == name)
        low, high = row.net_interval
        assert low > 0
        assert outcome.endswith(f"by {row.net_difference:.3f} nats per answer token [{low:.3f}, {high:.3f}]")
    assert largest.startswith("The largest net is that of adaptive (")
    # With memory for nothing the large one wins, and nothing is said of net without a price.
    net, largest = sentences(rows_of("adaptive", adaptive_and_fixed(), 0.0))
    assert "loses to the best heuristic on net, large" in net
    assert "largest net is that of full" in largest
    assert not any(" net" in line for line in sentences(rows_of("adaptive", adaptive_and_fixed())))


def test_few_samples_are_said_to_be_few_on_net():
    ones = [replace(one, evaluations=one.evaluations[:1]) for one in adaptive_and_fixed()]
    net = sentences(rows_of("adaptive", ones, 0.1))[0]
    assert "from the full cache" in net
    assert net.endswith("; too few samples.")


def test_at_common_budgets_net_is_compared_budget_by_budget():
    ones = [
        measured(name, role, budget, np.linspace(value, value + 0.1, COUNT), 1e6 * size)
        for budget, size in ((8, 1), (16, 2))
        for name, role, value, size in (
            ("mine", "subject", -1, size), ("keydiff", "field", -1.4, size), ("fat", "field", -0.8, 9 * size),
        )
    ]  # fmt: skip
    rows = rows_of("mine", ones, 0.1)
    said = [line for line in sentences(rows) if "on net" in line]
    assert ["keydiff at budget 8" in said[0], "keydiff at budget 16" in said[1], len(said)] == [True, True, 2]
    assert [row.manager for row in rows if row.budget == 8] == ["mine", "keydiff", "fat"]
    assert best_on_net(rows).budget == 8
    assert best_on_net([row for row in rows if row.role == "subject"]) is None
    # By likelihood alone "fat" is first, and the sentence about equal memory is as without a price.
    assert [row.manager for row in rows_of("mine", ones) if row.budget == 8] == ["fat", "mine", "keydiff"]
    assert sentences(rows)[:2] == sentences(rows_of("mine", ones))


def test_rows_with_a_price_are_shown_and_survive_json(tmp_path):
    rows = rows_of("adaptive", adaptive_and_fixed(), 0.1)
    write_rows(tmp_path / "rows.json", rows)
    assert read_rows(tmp_path / "rows.json") == rows
    page = markdown(rows)
    assert "| net | net advantage [95 %] |" in page
    assert "net: loglik - 0.1 for every 10^6 bytes of the sample's mean memory." in notes(rows)[0]
    for row in rows:
        assert f"| {row.net:.3f} |" in page
    assert [str(column.header) for column in tables(rows)[0].columns][4:6] == ["net", "net advantage [95 %]"]
    assert "net" not in markdown(rows_of("adaptive", adaptive_and_fixed()))
    data = json.loads((tmp_path / "rows.json").read_text())
    data[0]["net"] = "much"
    (tmp_path / "rows.json").write_text(json.dumps(data))
    with pytest.raises(evomem.errors.RunError, match=r"rows\.json"):
        read_rows(tmp_path / "rows.json")


def test_a_total_that_differs_between_samples_is_shown():
    rows = {row.manager: row for row in rows_of("adaptive", adaptive_and_fixed())}
    mean = np.mean([sum(map(sum, e.table("head_slots"))) for e in adaptive_and_fixed()[0].evaluations])
    assert rows["adaptive"].total_range == [20, 80]
    assert rows["small"].total_range == [40, 40]
    page = markdown(list(rows.values()))
    assert f"| {mean:,.0f} (20-80) |" in page
    assert "(40-40)" not in page
    assert "total: of all heads, after the context (fewest-most of a sample)." in page
    same = rows_of("small", adaptive_and_fixed()[1:])
    assert "fewest-most" not in markdown(same)


# ---- nobody wins by nothing ----------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.floats(-0.003, 0.003), st.floats(0, 0.003))
def test_who_wins_is_what_the_printed_interval_says(low, width):
    high = low + width
    zero_is_in_it = float(f"{low:.3f}") <= 0 <= float(f"{high:.3f}")
    assert verdict([low, high]) == ("ties" if zero_is_in_it else "wins" if low > 0 else "loses")


@pytest.mark.parametrize(
    ("offset", "said"), [(2e-4, "cannot be told"), (-2e-4, "cannot be told"), (2e-3, "beats"), (-2e-3, "loses to")]
)
def test_a_difference_that_is_printed_as_zero_is_none(offset, said):
    values = np.linspace(-1e-4, 0, COUNT)
    ones = [measured("mine", "subject", 8, values + offset, 1e6), measured("keydiff", "field", 8, values * 1.1, 1e6)]
    lines = sentences(rows_of("mine", ones, 0.1))
    assert len(lines) == 2
    for line in lines:
        assert said in line
        assert "-0.000" not in line
        assert ("0.000, 0.000]" in line) == (said == "cannot be told")


# ---- comparing on a real small model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conditions(tmp_path_factory):
    words = ["the", "cat", "dog", "bird", "tree", "house", "red", "black", "white", "big", "small", "sky", "blue"]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, length)) for length in (20, 40, 60)]
    file = tmp_path_factory.mktemp("task") / "questions.jsonl"
    lines = [{"context": text, "question": " what ?", "answers": ["red cat"], "split": "sealed"} for text in texts]
    file.write_text("\n".join(map(json.dumps, lines)))
    loaded = LoadedModel("tiny", tiny("llama", layers=2), tiny_tokenizer(), "digest")
    return {"models": loaded, "tasks": f"file:{file}", "samples": 3, "check": False, "exact": False}


def adaptive():
    """By the keys and values that stand out, about the budget in all; how much is different from sample to sample."""
    manager = evomem.build("keydiff(budget=10, allocation=slots(window=8, total=[0.1, 4]))")
    with torch.no_grad():
        manager.allocation.total_weights.copy_(torch.tensor([0.0, 1.0, 1.0, 0.0, 4.0]))
    return NamedManager("adaptive", manager)


def untimed(rows):
    return [replace(row, seconds=0.0) for row in rows]


def test_managers_are_compared_at_budgets_of_their_own(conditions, tmp_path, monkeypatch):
    subjects = [adaptive(), "keydiff(budget=6)", "keydiff(budget=16)"]
    against, out = ["snapkv(window=4)", "knorm(budget=12)"], tmp_path / "rows.json"
    calls, real = [], entrants.on_sample
    monkeypatch.setattr(entrants, "on_sample", lambda *words: calls.append(words[2].id) or real(*words))
    rows = evomem.compare(subjects, against=against, price_per_megabyte=0.5, out=out, **conditions)
    at = {(row.manager, row.budget) for row in rows}
    own = {("adaptive", 10), ("keydiff(budget=6)", 6), ("keydiff(budget=16)", 16), ("knorm(budget=12)", 12)}
    assert at == own | {("snapkv(window=4)", budget) for budget in (10, 6, 16)} | {("full", None)}
    assert all((row.net_difference is None) == (row.manager == "adaptive") for row in rows)
    first = next(row for row in rows if row.manager == "adaptive")
    assert first.total_range[0] < first.total_range[1]
    for row in rows:
        assert row.net == pytest.approx(row.loglik - 0.5 * row.bytes_mean / 1e6)
        if row is not first:
            assert row.net_difference == pytest.approx(first.net - row.net)
    assert len(calls) == 3

    # Another price asks nothing of the model, and rows are what they would be if it had been the first one.
    dear = evomem.compare(subjects, against=against, price_per_megabyte=50, out=out, **conditions)
    assert len(calls) == 3
    assert {row.price_per_megabyte for row in read_rows(out)} == {50.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json", "rows.samples.jsonl"]
    anew = evomem.compare(subjects, against=against, price_per_megabyte=50, **conditions)
    assert untimed(dear) == untimed(anew)
    assert len(calls) == 6
    evomem.compare(subjects, against=against, price_per_megabyte=50, out=out, **conditions)
    assert len(calls) == 9  # the same command again measures again
    evomem.compare(subjects, against=[], price_per_megabyte=5, out=out, **conditions)
    assert len(calls) == 12  # of other managers nothing is taken over


def test_a_killed_comparison_goes_on_at_another_price_with_all_rows_at_that_price(conditions, tmp_path, monkeypatch):
    out, seen = tmp_path / "rows.json", []

    def kill(done, total):
        seen.append(done)
        if done == 2:
            raise KeyboardInterrupt

    subjects = {"subjects": "keydiff(budget=6)", "against": ["knorm"]}
    with pytest.raises(KeyboardInterrupt):
        evomem.compare(**subjects, price_per_megabyte=1, out=out, progress=kill, **conditions)
    calls, real = [], entrants.on_sample
    monkeypatch.setattr(entrants, "on_sample", lambda *words: calls.append(words[2].id) or real(*words))
    resumed = evomem.compare(**subjects, price_per_megabyte=7, out=out, **conditions)
    assert len(calls) == 1
    assert untimed(resumed) == untimed(evomem.compare(**subjects, price_per_megabyte=7, **conditions))
    assert {row.price_per_megabyte for row in resumed} == {7}
    # Without a price the budgets are the first subject's, which are the same here: rows without net, nothing measured.
    count = len(calls)
    plain = evomem.compare(**subjects, out=out, **conditions)
    assert (len(calls), {row.net for row in plain}) == (count, {None})


def test_who_has_no_budget_is_measured_at_those_of_others():
    subjects = [resolve(word) for word in ("keydiff(budget=6)", "snapkv", "keydiff(budget=9)")]
    field = [NamedManager(word, evomem.build(word)) for word in ("h2o", "knorm(budget=3)")]
    expected = {
        "keydiff(budget=6)": (6,),
        "snapkv": (6, 9),
        "keydiff(budget=9)": (9,),
        "h2o": (6, 9),
        "knorm(budget=3)": (3,),
    }
    assert own_budgets(subjects, [], field) == expected
    assert own_budgets([resolve("snapkv")], [], field) == {"snapkv": (3,), "h2o": (3,), "knorm(budget=3)": (3,)}
    threshold = resolve("namm(scorer=linear, selection=threshold)")
    assert own_budgets([threshold], [], []) == {threshold.name: (None,)}
    with pytest.raises(ConfigError, match="neither snapkv nor a subject has a budget"):
        own_budgets([resolve("snapkv"), threshold], [], [])


def test_a_subject_under_other_allocations_is_measured_at_the_subjects_budget(conditions):
    rows = evomem.compare(
        ["keydiff(budget=6)", "keydiff(budget=9)"], against=["knorm(budget=3)"], allocations="pyramid",
        price_per_megabyte=1, **conditions,
    )  # fmt: skip
    at = {row.manager: row.budget for row in rows}
    assert at.pop("full") is None
    assert at == {
        "keydiff(budget=6)": 6, "keydiff(budget=6, allocation=pyramid)": 6, "keydiff(budget=9)": 9,
        "knorm(budget=3)": 3,
    }  # fmt: skip


@pytest.mark.parametrize("price", [-0.1, math.nan, math.inf, 1e7, "0.1", True, [0.1]])
def test_a_price_that_is_none_is_refused_before_a_model_is_loaded(price, monkeypatch):
    monkeypatch.setattr("evomem.models.load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=r"price_per_megabyte: .*nats per 10\^6 bytes"):
        evomem.compare("keydiff", budgets=8, tasks="multikey_1:length=500", price_per_megabyte=price)
    with pytest.raises(ConfigError, match="price_per_megabyte"):
        rows_of("mine", [], price)
