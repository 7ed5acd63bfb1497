"""Worker options: what a user writes stands for one pool, or is refused before anything is made."""

from __future__ import annotations

import pytest

import evomem
from evomem.errors import ConfigError
from evomem.workers import WorkerOptions


def test_what_a_user_writes_is_read():
    whole = WorkerOptions(count=3, gpus=0, timeout=0.5)
    assert WorkerOptions.of(whole) is whole
    assert WorkerOptions.of("auto") == WorkerOptions.of(None) == WorkerOptions(count=None)
    assert WorkerOptions.of(2) == WorkerOptions(count=2)


@pytest.mark.parametrize("workers", ["many", "2", "", -1, 1.5, True])
def test_other_words_and_numbers_are_refused(workers, tmp_path):
    with pytest.raises(ConfigError, match="give a whole number, 0 for this process, or 'auto'"):
        evomem.evolve("demo", out=tmp_path / "run", workers=workers)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["cpus", "gpus", "timeout"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), True, "1"])
def test_what_workers_ask_for_is_a_number(name, value):
    with pytest.raises(ConfigError, match=f"workers: {name} "):
        WorkerOptions(**{name: value})
    if name != "gpus":
        with pytest.raises(ConfigError, match="more than 0"):
            WorkerOptions(**{name: 0})
