"""Search space: options of an allocation, or of a manager inside another, vary by their paths."""

from __future__ import annotations

import numpy as np
import pytest

from evomem import plugins
from evomem.errors import ConfigError
from evomem.managers import build
from evomem.search_space.option_paths import option_value
from evomem.search_space.space import SearchSpace, SpaceConfig, load_space
from evomem.validation import apply_settings

NESTED = """
manager: {name: snapkv, options: {window: 8, budget: 16, allocation: "across_heads(layers=pyramid(beta=5))"}}
options:
  window: {kind: integer, low: 2, high: 16}
  allocation.safeguard: {kind: bounded, low: 0, high: 1}
  allocation.layers.beta: {kind: log, low: 1, high: 50}
"""


def nested_space(tmp_path, text=NESTED, changes=None):
    (tmp_path / "space.yaml").write_text(text)
    return SearchSpace(load_space(str(tmp_path / "space.yaml"), changes))


def test_options_of_an_allocation_vary_and_come_back(tmp_path):
    space = nested_space(tmp_path)
    assert space.dim == 3
    start = space.decode(space.start)
    for path in space.config.options:
        assert option_value(start, path) == pytest.approx(option_value(space.template, path))
    rng = np.random.default_rng(0)
    for _ in range(20):
        manager = space.decode(rng.normal(size=3))
        described = manager.allocation.describe()["options"]
        assert 0 <= described["safeguard"] <= 1
        assert 1 <= described["layers"]["options"]["beta"] <= 50
        assert described["layers"]["options"]["window"] is None  # what does not vary stays
        assert manager.allocation.layers.options.beta == described["layers"]["options"]["beta"]
        again = space.decode(space.encode(manager))
        assert again.options.window == manager.options.window
        for path in ("allocation.safeguard", "allocation.layers.beta"):
            assert option_value(again, path) == pytest.approx(option_value(manager, path))
    # A plug-in of the winner has them, and a resumed run's space is the same.
    plugins.save(manager, tmp_path / "plug")
    assert plugins.load(tmp_path / "plug").describe() == manager.describe()
    assert np.allclose(space.encode(plugins.load(tmp_path / "plug")), space.encode(manager))
    config = SpaceConfig.model_validate(space.config.model_dump(mode="json"))
    resumed = SearchSpace(config, space.template.state_dict())
    assert resumed.decode(space.start).describe() == start.describe()


def test_settings_reach_options_inside_options(tmp_path):
    layers = "options.allocation.layers"
    settings = ["beta.high=9", "window.kind=integer", "window.low=0", "window.high=4"]
    changes = apply_settings({}, [f"{layers}.{setting}" for setting in settings])
    space = nested_space(tmp_path, changes=changes)
    assert space.config.options["allocation.layers.beta"].high == 9
    assert space.dim == 4
    assert space.decode(np.zeros(4)).allocation.layers.options.window == 0
    inner = "manager: {name: adakv, options: {inner: snapkv(window=8)}}\n"
    inner += "options: {inner.window: {kind: integer, low: 2, high: 9}}"
    assert nested_space(tmp_path, inner).decode(np.zeros(1)).inner.options.window == 2


@pytest.mark.parametrize(("manager", "options", "message"), [
    ("{name: keydiff, options: {allocation: pyramid}}", "allocation.gamma", "'pyramid' has no such option.*beta"),
    ("{name: keydiff}", "allocation.beta", "allocation of manager 'keydiff' is None, which has no options"),
    ("{name: pyramidkv}", "allocation.beta", "is None"),
    ("{name: feature_scorer, options: {allocation: 4}}", "allocation.points", "is 4, which has no options"),
    ("{name: keydiff, options: {allocation: pyramid}}", "allocation.beta.more", "is 20.0, which has no options"),
    ("{name: keydiff, options: {allocation: pyramid}}", "alocation.beta", "no such option"),
])  # fmt: skip
def test_paths_that_lead_nowhere_are_refused(manager, options, message, tmp_path):
    text = f"manager: {manager}\nweights: none\noptions: {{{options}: {{kind: integer, low: 1, high: 9}}}}"
    with pytest.raises(ConfigError, match=message):
        nested_space(tmp_path, text)


def test_a_whole_and_its_part_do_not_vary_together(tmp_path):
    choice = "{kind: categorical, choices: [pyramid, uniform]}"
    text = (
        "manager: {name: keydiff, options: {allocation: pyramid}}\nweights: none\n"
        f"options: {{allocation: {choice}, allocation.beta: {{kind: integer, low: 1, high: 90}}}}"
    )
    with pytest.raises(ConfigError, match="let one of them vary"):
        nested_space(tmp_path, text)
    other = nested_space(tmp_path, text.replace(f"allocation: {choice}, ", ""))
    with pytest.raises(ConfigError, match=r"allocation.beta: allocation 'uniform' has no such option"):
        other.encode(build("keydiff(allocation=uniform)"))
