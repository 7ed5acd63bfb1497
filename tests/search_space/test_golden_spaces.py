"""Vectors of the search spaces that come with evomem stand for the managers that they stood for at commit 1ffdb50."""

from __future__ import annotations

import hashlib
import zlib

import numpy as np
import pytest

from evomem.search_space.space import SearchSpace, load_space
from tests.support.golden import told

SPACES = told("spaces")


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", SPACES)
def test_a_vector_stands_for_the_manager_that_it_stood_for(name):
    """Order and shapes of what varies, start, blocks, options, and every tensor of one random vector's manager."""
    before, space = SPACES[name], SearchSpace(load_space(name))
    assert (space.dim, space.sigma, digest(space.start)) == (before["dim"], before["sigma"], before["start"])
    shapes = [[key, list(tensor.shape)] for key, tensor in space.template.named_parameters()]
    assert shapes == before["parameters"]
    blocks = space.blocks()
    assert [len(blocks), digest(np.concatenate(blocks)) if blocks else ""] == before["blocks"]
    # The offset of a variable was called place.
    variables = [repr(variable).replace("(offset=", "(place=") for variable in space.variables()]
    assert variables == before["variables"]
    manager = space.decode(np.random.default_rng(zlib.crc32(name.encode())).normal(size=space.dim))
    for options, expected in (
        (space.template.describe()["options"], before["template"]["options"]),
        (manager.describe()["options"], before["options"]),
    ):
        assert {key: options[key] for key in expected} == expected  # later code may have more options
    assert {key: digest(tensor.numpy()) for key, tensor in manager.state_dict().items()} == before["tensors"]
    assert digest(space.encode(manager)) == before["encoded"]
