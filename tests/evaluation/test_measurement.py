"""Evaluation: what is asked and what comes back: nothing mixed, nothing made up, and lines of earlier versions."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from evomem.cli.app import app
from evomem.errors import ConfigError, EvaluationError, UnknownNameError
from evomem.evaluation import Evaluator
from evomem.evaluation.costs import ORACLE
from evomem.evaluation.measurement import EXACT, LOGLIK, Evaluation, Measurement, Quantity, Step
from evomem.evaluation.measures import Draws, Measure, measures, register_measure
from evomem.evaluation.objectives import Attention, ExpectedCost, TraceCost, make, objectives, register_objective
from evomem.evaluation.objectives.base import Objective
from evomem.files.strict_json import to_json
from evomem.models import LoadedModel
from evomem.runs.journal import evaluations_of, unit_record
from evomem.testing.models import tiny, tiny_tokenizer
from evomem.workers.units import Outcome, Unit
from tests.evaluation.test_evaluation import PROTOCOLS, TASK, made, make_sample
from tests.support import synthetic_search as synthetic

BOTH = Attention.measurement.also(ExpectedCost.measurement).also(Measurement.of("oracle"))


@pytest.fixture(scope="module")
def llama():
    return LoadedModel("tiny", tiny("llama", layers=2), tiny_tokenizer(), "tiny")


NAMES = st.sampled_from(["loglik", "exact", "attention", "ranking_cost", "mine"])
OPTIONS = st.dictionaries(st.sampled_from(["how", "gradient", "n"]), st.sampled_from([True, False, 3, 0.5, "sorted"]))
MEASUREMENTS = st.builds(
    lambda quantities, observes: Measurement.of(*(Quantity.of(n, **o) for n, o in quantities.items())).observing(
        frozenset(observes)
    ),
    st.dictionaries(NAMES, OPTIONS),
    st.sets(st.sampled_from(["attention_sum", "window_attention:8"])),
)


@given(MEASUREMENTS)
def test_a_measurement_is_the_same_after_json_and_in_a_unit_that_was_sent(measurement):
    again = Measurement.from_json(json.loads(json.dumps(measurement.to_json())))
    assert again == measurement
    assert hash(again) == hash(measurement)
    unit = Unit("u", "train", 0, "t", make_sample(), None, np.zeros(1, dtype=np.int64), measurement=measurement)
    assert pickle.loads(pickle.dumps(unit)).measurement == measurement


VALUES = st.dictionaries(
    st.sampled_from(["loglik", "exact", "rank_correlation", "mine"]), st.floats(allow_nan=False), max_size=4
)
TABLES = st.dictionaries(
    st.sampled_from(["head_attention", "head_cost"]), st.just(((0.25, -1.5), (2.0, math.inf))), max_size=2
)


@given(VALUES, TABLES, st.none() | st.floats(0, 1e9), st.booleans())
def test_an_evaluation_is_the_same_after_the_journal_and_what_is_absent_is_not_written(values, tables, number, step):
    steps = (Step(b"\0\0\0\0", reward=0.5),) if step else None
    one = Evaluation("words/0", {**values, **tables}, number, number, None, 7, 0.5, steps)
    unit = Unit("u", "train", 0, "t", make_sample(), None, np.zeros(1, dtype=np.int64))
    line = to_json(unit_record(Outcome(unit, [one], 1.0)))
    assert "NaN" not in line
    assert "null" not in line.replace('"generation":null', "")
    assert evaluations_of(json.loads(line)) == [one]
    assert (one.loglik, one.exact) == (values.get("loglik"), values.get("exact"))


def earlier(**fields):
    """A line's evaluation as it was written before values had names."""
    numbers = {"sample": "s", "loglik": -1.5, "exact": None, "slots": 4.0, "bytes_peak": 8.0, "bytes_mean": 8.0}
    return {**numbers, "tokens": 3, "seconds": 0.5, "heads": None, **fields}


def test_lines_of_earlier_versions_say_what_they_said():
    read = Evaluation.from_json
    plain = Evaluation("s", {"loglik": -1.5}, 4.0, 8.0, 8.0, 3, 0.5)
    assert read(earlier()) == plain
    assert read(earlier(exact=0.5)).values == {"loglik": -1.5, "exact": 0.5}
    heads = earlier(loglik="NaN", heads=[[-1.0, -2.0]])
    assert read(heads, Attention.measurement).values == {"head_attention": ((-1.0, -2.0),)}
    assert read(heads, TraceCost.measurement).values == {"head_cost": ((1.0, 2.0),)}
    for unfit in (LOGLIK, BOTH):  # which of the two it is cannot be known: it is measured again
        with pytest.raises(ValueError, match="earlier"):
            read(heads, unfit)
    looked = earlier(loglik="NaN", heads=[[-1.0]], oracle={"sorted_cost": 2.0})
    assert read(looked, ExpectedCost.measurement).values == {"head_cost": ((1.0,),), "sorted_cost": 2.0}
    traced = read(earlier(loglik="NaN", heads=[[-1.0]], bytes_peak="NaN", bytes_mean="NaN"), TraceCost.measurement)
    assert (traced.bytes_peak, traced.bytes_mean) == (None, None)
    lost = earlier(loglik="NaN", slots="NaN", bytes_peak="NaN", bytes_mean="NaN", tokens=0, seconds=0.0)
    assert read(lost) == Evaluation("s")
    assert math.isnan(read(earlier(loglik="NaN")).loglik)  # measured, and no number


def test_two_quantities_per_head_are_measured_at_once_and_do_not_mix(llama):
    evaluator, sample, crowd = Evaluator(llama), make_sample(), [made("keydiff"), made("tova")]
    together = evaluator.evaluate(crowd, sample, TASK, EXACT.also(BOTH))
    apart = [Evaluator(llama).evaluate(crowd, sample, TASK, one) for one in (EXACT, Attention.measurement,
             ExpectedCost.measurement.also(Measurement.of("oracle")))]  # fmt: skip
    for number, one in enumerate(together):
        assert one.values.keys() == {"loglik", "exact", "head_attention", "head_cost", *ORACLE}
        for part in apart:
            assert part[number].values.items() <= one.values.items()
        assert one.values["head_attention"] != one.values["head_cost"]
        assert one.bytes_peak == apart[0][number].bytes_peak
    assert sum(one.tokens for one in together) < sum(e.tokens for part in apart for e in part)  # read once


def test_an_objective_takes_its_own_quantity_where_both_were_measured(llama):
    (found,) = Evaluator(llama).evaluate([made("keydiff")], make_sample(), TASK, LOGLIK.also(BOTH))
    cost, attention = (np.mean(found.values[name]) for name in ("head_cost", "head_attention"))
    worth = {"loglik": found.loglik, "attention": attention, "expected_cost": -cost, "trace_cost": -cost}
    for name in objectives:
        objective = make(name)
        assert objective.value(found) == pytest.approx(worth.get(name, math.nan), nan_ok=True)
        if objective.headwise:
            assert objective.per_head(found).mean() == pytest.approx(worth[name])
        assert math.isnan(objective.value(Evaluation("s")))
        assert objective.per_head(Evaluation("s")) is None


def test_what_cannot_be_measured_is_refused(llama):
    evaluator, sample, crowd = Evaluator(llama), make_sample(), [made("keydiff")]
    for measurement, error, text in (
        (Measurement(), ConfigError, "no quantity"),
        (Measurement.of("logik"), UnknownNameError, "loglik"),
        (Measurement.of(Quantity.of("ranking_cost", hwo="sorted")), ConfigError, "'hwo'; it has how, gradient"),
        (Measurement.of(Quantity.of("ranking_cost", how="best")), ConfigError, "expected, sorted, drawn"),
        (Measurement.of(Quantity.of("ranking_cost", gradient=1)), ConfigError, "gradient is 1; give a bool"),
        (Measurement.of(Quantity.of("loglik", n=3)), ConfigError, "has none"),
        (Measurement.of("loglik", "rollout"), ConfigError, "draws no decisions"),
    ):
        with pytest.raises(error, match=text):
            evaluator.evaluate(crowd, sample, TASK, measurement)
    with pytest.raises(ConfigError, match="twice"):
        ExpectedCost.measurement.also(TraceCost.measurement)
    with pytest.raises(ConfigError, match="another name"):
        Evaluation("s", {"tokens": 1.0}).to_json()
    with pytest.raises(ConfigError, match="per head"):
        Evaluation("s", {"loglik": ((1.0,),)}).loglik  # noqa: B018
    for name in ("attention", "ranking_cost"):
        with pytest.raises(ConfigError, match="compress_once"):
            Evaluator(llama, PROTOCOLS["streaming"]).evaluate(crowd, sample, TASK, Measurement.of(name))


def test_a_new_measure_is_one_class_and_gives_no_value_of_another(llama):
    try:

        @register_measure("toy_slots")
        class Slots(Measure):
            def evaluations(self, evaluator, managers, sample, task, measurement, draws: Draws):
                return [Evaluation(sample.id, {self.gives: 1.0 * m.options.budget}) for m in managers]

        Slots.gives = "budget"
        wanted = Measurement.of("loglik", "toy_slots")
        (found,) = Evaluator(llama).evaluate([made("keydiff")], make_sample(), TASK, wanted)
        assert found.values.keys() == {"loglik", "budget"}
        Slots.gives = "loglik"
        with pytest.raises(ConfigError, match="two measures give 'loglik'"):
            Evaluator(llama).evaluate([made("keydiff")], make_sample(), TASK, wanted)
    finally:
        measures._classes.pop("toy_slots")


def test_a_new_objective_is_one_class(tmp_path):
    """A search by it finds what it asks for, and the likelihood's search does not."""
    try:

        @register_objective("toy_middle")
        class Middle(Objective):
            """How near the likelihood is to -1."""

            measurement = LOGLIK

            def value(self, evaluation):
                return -abs(evaluation.loglik + 1.0) if evaluation.loglik is not None else math.nan

        settings = ["budgets=null", "generations=12", "tasks=[toy:a]", "select={contexts: 5, top: 2}"]
        found = [
            synthetic.search(
                synthetic.experiment(*settings, f"fitness.objective={name}", "fitness.normalise=none"),
                tmp_path / name,
                synthetic.factory(synthetic.ToyEvaluator()),
            )
            for name in ("toy_middle", "loglik")
        ]
        assert found[0].select.fitness > -0.9 - abs(found[1].select.loglik + 1.0)
        assert abs(found[0].select.loglik + 1.0) <= abs(found[1].select.loglik + 1.0) + 1e-6
    finally:
        objectives._classes.pop("toy_middle")


def test_objectives_are_listed():
    found = CliRunner().invoke(app, ["list", "objectives", "--json"])
    assert set(json.loads(found.stdout)) == set(objectives)
    assert all(json.loads(found.stdout).values())


def test_an_objective_without_a_measurement_is_refused():
    try:

        @register_objective("toy_nothing")
        class Nothing(Objective):
            def value(self, evaluation):
                return 0.0

        with pytest.raises(ConfigError, match="has no measurement"):
            make("toy_nothing")
    finally:
        objectives._classes.pop("toy_nothing")


def test_what_was_not_measured_is_no_number():
    one = Evaluation("needle/1", {"loglik": -0.5})
    assert one.required("loglik") == -0.5
    with pytest.raises(EvaluationError, match="needle/1: exact was not measured"):
        one.required("exact")
