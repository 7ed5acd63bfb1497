from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from evomem.models import LoadedModel, load

# The same examples in every run: a test that fails, fails for everybody.
settings.register_profile("evomem", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("evomem")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


RAY = {
    "test_benchmarks.py",
    "test_faults.py",
    "test_killed_driver.py",
    "test_policy_search.py",
    "test_ray_pool.py",
    "test_several_models.py",
}
"""Files whose own process starts Ray: one after the other, because a process joins the Ray that it finds."""
FIRST = "test_ray_cluster.py"
"""The longest of the others, which mostly waits: its Ray belongs to processes that it starts, where none looks."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that use Ray: they take most of the time, and the other process does all the others."""
    items.sort(key=lambda item: (item.path.name not in RAY, item.path.name != FIRST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Keep the tests of a file in one process, because they share what is slow to make; and all that use Ray."""
    config.option.loadscopereorder = False
    return Files(config, log)


class Files(LoadScopeScheduling):
    """A scope is a file, or all that use Ray."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return "ray" if Path(file).name in RAY else file


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries use the global state)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The real model. When its package is missing this fails: a skipped test of the main thing would hide it."""
    return load("smollm2-135m")


@pytest.fixture
def devices() -> Iterator[Any]:
    """Two devices that refuse what CUDA refuses."""
    from evomem.testing.pretend import PretendDevices

    with PretendDevices(2) as pretended:
        yield pretended


@pytest.fixture(scope="session")
def ray_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray for all tests with pools on this machine: it takes seconds to start, and a pool uses the one it finds."""
    from evomem.workers.ray.cluster import library
    from evomem.workers.ray.local import LocalRay

    if "PYTEST_XDIST_WORKER" in os.environ:  # fails if another process of this run has one: see `Files`
        (tmp_path_factory.getbasetemp().parent / "ray").touch(exist_ok=False)
    places = [str(Path(__file__).parents[1]), *(path for path in sys.path if path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(places))  # what workers import
        patch.setenv("OMP_NUM_THREADS", "1")
        running = LocalRay(library(), num_cpus=2, object_store_memory=256 << 20)
        yield
        running.close()
