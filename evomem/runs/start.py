"""Run: the manager that a search starts from: made, and kept in the run's folder, or taken from there."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch

from evomem.drivers.base import Array
from evomem.errors import EvomemError, RunError
from evomem.files.atomic import write_atomically, write_vector
from evomem.runs.bench import Bench
from evomem.runs.config import ExperimentConfig
from evomem.runs.folder_reading import read_numbers, read_state
from evomem.runs.inputs import check_unchanged
from evomem.runs.plan_checks import check_heads, check_policies
from evomem.runs.samples import Samples
from evomem.search_space.space import SearchSpace
from evomem.tasks.base import Split

STATE = "start/state.safetensors"
"""File of a run's folder with the tensors that its search space starts from."""


def prepare_start(folder: Path, config: ExperimentConfig, bench: Bench, samples: Samples) -> tuple[SearchSpace, Array]:
    """Return a run's search space and the vector (dim,) that its search starts from.

    They are kept in the folder: the files that they are made of may change before the run is resumed.

    Raises
    ------
    RunError : what the folder holds does not fit the experiment, or its inputs were exchanged while they were read.
    ConfigError : a driver is to search head by head, and the space has other heads than the model; or a policy gradient
        cannot search the space.
    """
    path, state = folder / "start" / "vector.npy", folder / STATE
    if path.exists():
        space = stored_space(config, state)
        vector = read_numbers(path)
        if vector.shape != (space.dim,):
            raise RunError(f"{path}: has {len(vector)} numbers; this search space has {space.dim}")
        check_unchanged(config, start=False)
        return space, vector
    space = SearchSpace(config.space)
    check_unchanged(config, start=True)
    check_policies(config, space)
    check_heads(config, space, bench)
    vector = space.start
    if bench.calibrate is not None:
        stage = config.plan()[0]
        first = {task.model: task for task in reversed(stage.tasks)}  # one task a model
        count = max(8, stage.samples_per_generation)
        pools = [(t, samples.pool(t, Split.TRAIN, stage.train_contexts)[:count]) for t in first.values()]
        bench.calibrate(space.template, pools)
    tensors = {name: value.contiguous() for name, value in space.template.state_dict().items()}
    write_atomically(state, safetensors.torch.save(tensors))
    write_vector(path, vector)  # last: it says that both are there
    return space, vector


def stored_space(config: ExperimentConfig, path: Path) -> SearchSpace:
    """Return the search space of a run, with the tensors that it started from; `RunError` if they do not fit."""
    tensors = read_state(path)
    try:
        return SearchSpace(config.space, tensors)
    except (RuntimeError, TypeError, ValueError, LookupError) as error:
        if isinstance(error, EvomemError):
            raise
        raise RunError(f"{path}: does not fit the search space: {' '.join(str(error).split())[:300]}") from None
