"""Three moons: what a contextual unit must have read before it continues a series, with weights that are given."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from evomem.models.architectures.mosaic_cache import UnitMemory
from evomem.tasks.base import Split
from evomem.tasks.streams.moons import orbits
from experiments import moons as script
from experiments.moons import LENGTH, MoonsMosaic, errors, observed, train

RECORDED = Path(__file__).parents[2] / "docs" / "results" / "moons.json"


@pytest.fixture(scope="module")
def moons():
    """The held-out moons; every period is a whole number of observations."""
    return orbits(Split.SEALED, LENGTH, whole=True)[0]


@pytest.mark.parametrize("heads", [1, 3])
def test_the_error_drops_where_the_paper_says(moons, heads):
    series = observed(moons, int(moons.together) + 30, range(0, 1400, 200))
    # After so many observations every head has seen what it looks up, and what followed.
    enough = int(moons.together if heads == 1 else moons.longest) + 1
    before, after, later = errors(MoonsMosaic.given(heads), series, [enough - 3, enough + 1, enough + 5], ahead=20)
    assert before > 0.1
    assert max(after, later) < 0.002


def test_three_heads_need_less_than_one(moons):
    between = int(moons.longest + moons.together) // 2
    series = observed(moons, between + 20, range(0, 1400, 200))
    one, three = (errors(MoonsMosaic.given(heads), series, [between], ahead=20)[0] for heads in (1, 3))
    assert three < 0.002 < 0.1 < one


def test_errors_are_those_of_reading_everything_again(moons):
    torch.manual_seed(0)
    model, series = MoonsMosaic(3).double().requires_grad_(False), observed(moons, 40, [0, 13]).double()
    for length, error in zip((1, 17, 30), errors(model, series, [1, 17, 30], ahead=6), strict=True):
        text = series[:, :length]
        for _ in range(6):
            text = torch.cat((text, model(text)[:, -1:]), 1)
        assert error == pytest.approx(float((text[:, length:] - series[:, length : length + 6]).abs().mean()))


def test_the_matrices_are_complex():
    """Turning all moons by one angle turns what is expected of them."""
    torch.manual_seed(0)
    model, series = MoonsMosaic(3).requires_grad_(False), observed(orbits(Split.TRAIN, LENGTH)[0], 30, [5])
    turned = torch.view_as_real(torch.view_as_complex(series.unflatten(-1, (3, 2))) * torch.tensor(0.6 + 0.8j))
    expected = torch.view_as_complex(model(series, UnitMemory()).unflatten(-1, (3, 2))) * torch.tensor(0.6 + 0.8j)
    said = model(turned.flatten(-2), UnitMemory()).unflatten(-1, (3, 2))
    torch.testing.assert_close(torch.view_as_complex(said), expected, atol=1e-4, rtol=1e-4)


def test_training_lowers_the_loss():
    _, first = train(3, seed=0, steps=2, batch=4, length=60)
    _, later = train(3, seed=0, steps=25, batch=4, length=60)
    assert later < first


@pytest.mark.parametrize(("seed", "reached"), [(0, 0.002), (1, 0.002), (2, 0.2)])
def test_the_recorded_three_heads_drop_at_the_longest_period(moons, seed, reached):
    """Trained weights, measured by reading everything again for every observation; one of seed 2's heads is blunt."""
    (one,) = [
        one
        for one in json.loads(RECORDED.read_text())
        if (one["weights"], one["heads"], one["seed"]) == ("trained", 3, seed)
    ]
    model = MoonsMosaic(3, one["beta"]).requires_grad_(False)
    model.load_state_dict({name: torch.tensor(part) for name, part in one["state"].items()})
    for length, bound in ((int(moons.longest) - 3, None), (int(moons.longest) + 4, reached)):
        series = observed(moons, length + 25, range(0, 311 * one["starts"], 311))
        text = series[:, :length]
        for _ in range(25):
            text = torch.cat((text, model(text)[:, -1:]), 1)
        error = float((text[:, length:] - series[:, length:]).abs().mean())
        assert error == pytest.approx(one["errors"][length - 1], abs=2e-3)
        assert error > 0.2 if bound is None else error < bound


def test_a_finished_measurement_that_was_edited_is_refused(tmp_path, monkeypatch):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["moons", "--runs", str(tmp_path), "--out", str(tmp_path / "out"), *words])
        script.main()

    path = tmp_path / "given-1-0-5-1.json"
    short = {"weights": "given", "heads": 1, "seed": 0, "steps": 5, "starts": 1, "together": 36.0, "errors": [0.0]}
    for text in ("{", "[]", "{}", json.dumps(short), json.dumps(short | {"heads": 3, "errors": [0.0] * 56})):
        path.write_text(text)
        with pytest.raises(SystemExit, match="is not what this script writes"):
            run("--steps", "5", "--starts", "1", "--seeds", "0")
    for words in (("--steps", "0"), ("--starts", "0"), ("--seeds", "-1")):
        with pytest.raises(SystemExit):
            run(*words)
