from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import settings

from evomem.models import LoadedModel, load

# The same examples in every run: a test that fails, fails for everybody.
settings.register_profile("evomem", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("evomem")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries use the global state)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The real model. When its package is missing this fails: a skipped test of the main thing would hide it."""
    return load("smollm2-135m")
