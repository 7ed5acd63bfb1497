"""The mean of plug-ins: every number is the mean, the order does not matter, and what cannot be averaged is refused."""

from __future__ import annotations

import pytest
import torch

import evomem
from experiments.mean_of_plugins import main, mean_of

TEXT = "keydiff(allocation=slots)"


def plugin(folder, seed, text=TEXT, budget=16):
    manager = evomem.build(text, budget=budget)
    generator = torch.Generator().manual_seed(seed)
    for parameter in manager.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    evomem.save(manager, folder, {"experiment": "slots", "seed": seed, "scores": {"sealed": -1.0}})
    return str(folder)


def numbers(folder):
    return dict(evomem.load(folder).named_parameters())["allocation.weights"]


def test_every_number_is_the_mean_and_nothing_else_is_taken_from_provenance(tmp_path, capsys):
    folders = [plugin(tmp_path / str(seed), seed, budget=8 * seed) for seed in (1, 2, 3)]
    main([*folders, "--out", str(tmp_path / "mean")])
    main([*folders[::-1], "--out", str(tmp_path / "back")])
    slow = [sum(float(numbers(folder)[i]) for folder in folders) / 3 for i in range(14)]
    assert numbers(tmp_path / "mean").tolist() == pytest.approx(slow, abs=1e-6)
    assert torch.equal(numbers(tmp_path / "mean"), numbers(tmp_path / "back"))
    made = evomem.load(tmp_path / "mean")
    assert "scores" not in made.provenance
    assert [source["seed"] for source in made.provenance["mean_of"]] == [1, 2, 3]
    assert made.options.budget == 8  # the first's


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("keydiff(allocation=slots(window=16))", "other options"),
        ("knorm(allocation=slots)", "another kind"),
    ],
)
def test_what_is_of_another_kind_is_refused(tmp_path, other, words):
    folders = [plugin(tmp_path / "one", 1), plugin(tmp_path / "other", 2, other)]
    with pytest.raises(SystemExit, match=words):
        main([*folders, "--out", str(tmp_path / "mean")])
    assert not (tmp_path / "mean").exists()


def test_one_plugin_or_none_with_numbers_is_refused(tmp_path):
    with pytest.raises(evomem.errors.ConfigError, match="at least two"):
        mean_of([evomem.build(TEXT, budget=8)], ["one"])
    with pytest.raises(evomem.errors.ConfigError, match="no numbers"):
        mean_of([evomem.build("keydiff", budget=8)] * 2, ["a", "b"])


def test_a_plugin_that_is_named_twice_is_refused(tmp_path):
    folder = plugin(tmp_path / "one", 1)
    with pytest.raises(SystemExit, match="is named twice"):
        main([folder, f"{folder}/../one", "--out", str(tmp_path / "mean")])
