"""Experiments: what is wrong in one is named, and all that counts is resolved."""

from __future__ import annotations

import pytest
import yaml

from evomem.errors import ConfigError, UnknownNameError
from evomem.runs import load_experiment, search
from tests.support.synthetic_search import ToyEvaluator, factory


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["driver.popluation=4"], r"driver\.popluation: unknown key; did you mean 'population'"),
        (["tasks.0.lenght=4"], r"tasks\.0\.lenght: unknown key; did you mean 'length'"),
        (["generations=many"], r"generations: .*got 'many'"),
        (["budgets=[0]"], r"budgets: .*keep nothing"),
        (["samples_per_generation=9", "train_contexts=3"], "more than the pool"),
        (["tasks=[a, {spec: a, weight: 3}]"], "task a is given twice"),
        (["tasks=[]"], "tasks"),
        (["space=namm_blm"], "Did you mean 'namm_bam'"),
        (["space.sigma=-1"], r"space\.sigma"),
        (["stages=[{generation: 3}]"], r"stages\.0\.generation: unknown key; did you mean 'generations'"),
        (["fitness.objective=logik", "generations=1"], None),
    ],
)
def test_experiment_errors_name_file_field_and_value(settings, message, tmp_path):
    if message is None:
        with pytest.raises(UnknownNameError, match="Did you mean 'loglik'"):
            search(load_experiment("demo", settings), tmp_path / "run", factory(ToyEvaluator()))
        assert not (tmp_path / "run").exists()
        return
    with pytest.raises(ConfigError, match=message):
        load_experiment("demo", settings)


def test_experiments_resolve_to_everything_that_counts(tmp_path):
    path = tmp_path / "mine.yaml"
    data = {"name": "x", "model": "m", "space": {"name": "namm_mlp", "sigma": 0.7}, "tasks": ["passkey"]}
    path.write_text(yaml.safe_dump(data))
    config = load_experiment(path, ["space.manager.options.budget=9", "seed=4", "stages=[{generations: 2, length: 7}]"])
    assert config.space.sigma == 0.7
    assert config.space.manager.options["budget"] == 9
    assert config.space.manager.options["scorer"] == "mlp"
    assert [task.length for task in config.plan()[0].tasks] == [7]
    other, kept = (load_experiment(path, [f"{key}=namm_linear"]).space for key in ("space", "space.name"))
    assert other.manager.options["scorer"] == kept.manager.options["scorer"] == "linear"
    assert (other.sigma, kept.sigma) == (0.2, 0.7)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config.resolved()))
    assert load_experiment(tmp_path / "again.yaml") == config


def test_a_driver_may_be_named_alone(tmp_path):
    path = tmp_path / "e.yaml"
    path.write_text(
        "name: e\nmodel: zoo-gpt2\nspace: feature_scorer\ntasks: [zoo_needle]\ndriver: snes\n", encoding="utf-8"
    )
    assert load_experiment(path).driver.name == "snes"
