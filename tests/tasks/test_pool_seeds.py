"""Experiments: runs that differ in their seed only, pooled from the samples of comparisons."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.pool_seeds import Samples, arm, main, table

VALUES = {"runs/x/mine-0": 1.0, "runs/x/mine-1": 3.0, "other": 0.5, "full": 4.0}


def write(path, subjects, names=("t/sealed/0/0", "t/sealed/0/1")):
    managers = [[name, None if name == "full" else budget, {}, ""] for name in subjects for budget in (8, 16)]
    lines = [{"split": "sealed", "managers": managers}]
    for number, name in enumerate(names):
        found = [
            {"loglik": VALUES[own] * (1 if budget == 16 else 2) + number, "exact": None, "bytes_mean": 1024.0}
            for own, budget, *_ in managers
        ]
        lines.append({"place": 0, "sample": name, "evaluations": found})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_seeds_are_averaged_within_an_arm_and_comparisons_of_the_same_samples_joined(tmp_path, monkeypatch, capsys):
    one, two = (
        write(tmp_path / "1", ["runs/x/mine-0", "runs/x/mine-1", "full"]),
        write(tmp_path / "2", ["other", "full"]),
    )
    samples = Samples([one, two], {"other": "theirs"})
    np.testing.assert_array_equal(samples.values("loglik", "mine", 16), [[1, 3], [2, 4]])
    assert samples.values("loglik", "full", 16).shape == (2, 1)  # measured in both, counted once
    rows = [line.split(" | ") for line in table(samples, 16).splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == ["mine", "full", "theirs"]
    assert [row[1] for row in rows] == ["2.500", "8.500", "1.000"]  # the full cache has no budget: its first column
    assert rows[2][2].startswith("+1.500 [+1.500, +1.500]")
    monkeypatch.setattr("sys.argv", ["pool_seeds", str(one), str(two), "--arm", "other=theirs"])
    main()
    assert capsys.readouterr().out.count("slots per head, 2 samples") == 2


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        ("runs/x/mine-0", "mine"),
        ("runs/x/mine-too-12", "mine-too"),
        ("runs/x/mine", "mine"),
        ("runs/x/mine-too", "mine-too"),
        ("runs/x/mine_1", "mine_1"),
        ("my-plugin-2", "my-plugin-2"),
        ("runs/x/renamed", "new"),
        ("runs/x/whole-3", "newer"),
        ("renamed", "new"),
    ],
)
def test_a_subject_always_has_an_arm(subject, expected):
    assert arm(subject, {"renamed": "new", "runs/x/whole-3": "newer"}) == expected


def test_comparisons_of_other_samples_are_refused(tmp_path):
    paths = [write(tmp_path / "1", ["other"]), write(tmp_path / "2", ["other"], names=("t/sealed/0/7", "t/sealed/0/8"))]
    with pytest.raises(SystemExit, match="other samples"):
        Samples(paths, {})
