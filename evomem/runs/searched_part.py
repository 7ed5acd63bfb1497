"""Run: which part of a vector a stage searches, and what drivers are told of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from evomem.errors import ConfigError
from evomem.runs.config import Stage
from evomem.search_space.option_ranges import Variable
from evomem.search_space.space import SearchSpace

Coordinates = NDArray[np.int64]


def searched_coordinates(space: SearchSpace, stage: Stage) -> Coordinates:
    """Return the coordinates that a stage searches, ascending; all of them where it names none.

    Raises
    ------
    ConfigError : it names something that does not vary.
    """
    if stage.searches is None:
        return np.arange(space.dim)
    try:
        return space.coordinates(stage.searches)
    except ConfigError as error:
        raise ConfigError(f"stage {stage.name!r}: searches: {error}") from None


def searched_blocks(space: SearchSpace, searched: Coordinates) -> list[Coordinates]:
    """Return the heads' parts (`SearchSpace.blocks`) counted among the searched coordinates; none if none is."""
    blocks = [np.searchsorted(searched, np.intersect1d(block, searched)) for block in space.blocks()]
    return blocks if any(len(block) for block in blocks) else []


def searched_variables(space: SearchSpace, searched: Coordinates) -> list[Variable]:
    """Return what the options' coordinates stand for, of those that are searched, counted among these."""
    return [
        replace(one, offset=int(np.searchsorted(searched, one.offset)))
        for one in space.variables()
        if np.isin(one.coordinates, searched).all()
    ]


def searched_options(space: SearchSpace, searched: Coordinates) -> list[str]:
    """Return the names of the options that are searched."""
    return [name for name in space.config.options if np.isin(space.coordinates([name]), searched).all()]
