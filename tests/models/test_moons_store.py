"""Three moons with a bounded store: pairs in a `PairMemory`, managers that decide which of them stay."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from evomem.managers.vector import to_vector
from evomem.models.architectures.mosaic_cache import UnitMemory
from evomem.tasks.base import Split
from experiments import moons_store
from experiments.moons import LENGTH, MOONS, MoonsMosaic
from experiments.moons_store import BUDGET, FIELD, POLICIES, main, manager_of, measure, read, search, series_of

MODEL, SERIES = MoonsMosaic.given(MOONS), series_of(Split.SEALED, 4, 100_000)


@pytest.mark.parametrize("every", [3, 1000])
def test_a_store_that_keeps_all_reads_as_the_unit_does(every):
    memory = read(MODEL, SERIES[:, :40], manager_of("full"), every).layers[0]
    unit = MODEL.unit(SERIES[:, :40], None, UnitMemory())[:, -1]
    query = MODEL.unit.keys(SERIES[:, 39:40], None, UnitMemory())
    torch.testing.assert_close(memory.read(query).transpose(1, 2).flatten(1), unit, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FIELD)
def test_the_budget_is_held_and_series_do_not_mix(name):
    row = measure(MODEL, SERIES, manager_of(name))
    assert row["pairs"] == (MOONS * (LENGTH - 1) if name == "full" else MOONS * BUDGET)
    assert sum(row["pairs_by_head"]) == pytest.approx(row["pairs"])
    if name != "random":  # whose draws depend on the row
        assert measure(MODEL, SERIES[2:3], manager_of(name))["errors"] == pytest.approx(row["errors"][2:3], abs=1e-4)


def test_what_surprised_is_enough():
    """A twelfth of the pairs, split over heads by one ranking; fewer where tokens are refused."""
    full, ranked = (measure(MODEL, SERIES, manager_of(name)) for name in ("full", "surprise, one ranking"))
    assert max(full["errors"]) < 1e-3
    assert max(ranked["errors"]) < 0.005
    assert ranked["pairs_by_head"] == sorted(ranked["pairs_by_head"])  # moons are ordered by their periods
    # Rank by surprise, and store where 10 * surprise - 1 >= 0.
    gated = measure(MODEL, SERIES, manager_of("evolved", np.array([1, 0, 0, 0, 10, 0, 0, 0, -1.0])))
    assert max(gated["errors"]) < 0.005
    assert gated["pairs"] <= 56 < 0.2 * MOONS * (LENGTH - 1)
    equal = measure(MODEL, SERIES, manager_of("surprise, equal split"))
    assert np.mean(equal["errors"]) > 0.05


def test_shares_per_head_give_each_moon_what_it_needs():
    """With 18 pairs a head, the moons' 12, 18 and 24 are all there is; an equal split of them is not enough."""
    needed = [12.0, 18.0, 24.0]
    ranks, stores = [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 20.0]
    shares = np.array([*ranks, *stores, *np.log(needed)])
    row = measure(MODEL, SERIES, manager_of("evolved, shares per head", shares, budget=18))
    assert row["pairs_by_head"] == needed
    assert max(row["errors"]) < 1e-3
    equal = measure(MODEL, SERIES, manager_of("evolved, equal split", shares[:-3], budget=18))
    assert equal["pairs_by_head"] == [18.0] * 3
    assert min(equal["errors"]) > 0.05


@pytest.mark.parametrize("name", POLICIES)
def test_a_search_changes_the_policy(name):
    vector, history = search(MODEL, 0, generations=1, popsize=4, name=name)
    assert np.isfinite(vector).all()
    assert len(history) == 1
    assert len(vector) == 9 + (MOONS if "shares" in name else 0)
    assert not np.array_equal(vector, to_vector(manager_of(name, vector * 0)))


def test_a_file_of_other_settings_or_edited_is_refused(tmp_path, monkeypatch, capsys):
    """Rows of two settings in one table would be compared as if they were one."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["moons_store", "--out", str(tmp_path / "rows"), "--seeds", "0", *words])
        main()

    monkeypatch.setattr(moons_store, "FIELD", {name: FIELD[name] for name in ("random", "FIFO", "LRU", "LFU")})
    run("--starts", "2")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert set(rows) == {"random", "FIFO", "LRU", "LFU"}  # also without a search
    with pytest.raises(SystemExit):
        run("--starts", "3")
    assert "--starts 2" in capsys.readouterr().err
    found = rows["LRU"] | {"fitness": [0.0, 0.0], "popsize": 4}
    (tmp_path / "rows.json").write_text(json.dumps(rows | {"evolved, seed 0": found}))
    for words, message in ((("--generations", "3"), "--generations 2"), (("--generations", "2"), "--popsize 4")):
        with pytest.raises(SystemExit):
            run("--starts", "2", *words)
        assert message in capsys.readouterr().err
    for text in ('{"LRU": {}}', "[]", "{", json.dumps({"LRU": {"errors": [float("nan")]}})):
        (tmp_path / "rows.json").write_text(text)
        with pytest.raises(SystemExit, match="holds no rows that this script has written"):
            run("--starts", "2")
    with pytest.raises(SystemExit):
        run("--starts", "0")
