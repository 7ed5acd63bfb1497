"""Run: drivers that take turns: each begins where the one before it ended, and the first where the run does.

Which driver is at work in a generation is a pure function of the configuration, so a checkpoint need not say it. Where
a later driver begins is kept in ``start/driver-GENERATION.npy``: its state holds what it learned, not what it was made
with.
"""

from __future__ import annotations

from pathlib import Path

from evomem.drivers import base
from evomem.drivers.base import Array, Driver
from evomem.files.atomic import write_vector
from evomem.runs.checkpoint import Checkpoint
from evomem.runs.config import ExperimentConfig, Stage
from evomem.runs.driver_setup import make_driver
from evomem.runs.fitness import objective_of
from evomem.runs.folder_reading import read_numbers
from evomem.search_space.space import SearchSpace


def enter(driver: Driver, stage: Stage) -> None:
    """Tell a driver what a stage measures; its generations are counted from the driver's first one."""
    objective = objective_of(stage.fitness)
    begin, end = stage.begin - stage.since, stage.end - stage.since
    driver.enter(base.Stage(begin, end, per_head=objective.headwise, exact=objective.exact_gradient))


class Relay:
    """The drivers of a run, and the one at work.

    Parameters
    ----------
    config, space : of the run.
    start : (dim,) where its first driver begins.
    folder : of the run.

    Raises
    ------
    ConfigError : a driver, of any stage, that does not exist, has not these options or cannot search this space by what
        the stage measures: said before the first generation, not when its turn comes.

    Attributes
    ----------
    driver : the one at work.
    since : the first generation that is its own; it counts its generations from there.
    """

    def __init__(self, config: ExperimentConfig, space: SearchSpace, start: Array, folder: Path) -> None:
        self._config, self._space, self._folder = config, space, folder
        self._plan = config.plan()
        for stage in self._plan:
            if stage.begin == stage.since:
                tried = make_driver(config, space, start, folder, stage)
            enter(tried, stage)
        self.driver: Driver = make_driver(config, space, start, folder, self._plan[0])
        self.since = 0

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on with the state of a checkpoint."""
        # What is only asked belongs to the coming generation, what is told to the one before.
        stage = self.stage(checkpoint.generation if checkpoint.asked else checkpoint.generation - 1)
        if stage.since:
            self._begin(stage, read_numbers(self._start(stage)))
        self.driver.load_state_dict(checkpoint.driver)

    def stage(self, generation: int) -> Stage:
        """Return the stage of a generation."""
        return next(stage for stage in self._plan if generation < stage.end)

    def enter(self, stage: Stage) -> None:
        """Put the driver of a stage to work, at the mean of the one before it if its turn begins; see `enter`."""
        if stage.since != self.since:
            write_vector(self._start(stage), self.driver.mean)
            self._begin(stage, self.driver.mean)
        enter(self.driver, stage)

    def following(self, stage: Stage) -> int:
        """Return the generation with which the next driver's turn begins, or the end of the search."""
        return next((later.begin for later in self._plan if later.since > stage.since), self._plan[-1].end)

    def _start(self, stage: Stage) -> Path:
        return self._folder / "start" / f"driver-{stage.since}.npy"

    def _begin(self, stage: Stage, start: Array) -> None:
        self.driver, self.since = make_driver(self._config, self._space, start, self._folder, stage), stage.since
