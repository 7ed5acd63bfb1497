"""Task: act at the end of an episode that was read (models: `evomem.models.architectures.decision_transformer`).

The context is the episode so far, three words a step: return-to-go, observation, action. The question is the next
return-to-go and observation, the answer the expert's action. Needs ``gymnasium``.
"""

from __future__ import annotations

from abc import abstractmethod
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from evomem.bounds import LENGTH, LISTED
from evomem.errors import TaskError
from evomem.installing import require
from evomem.tasks.base import Sample, Split, tasks
from evomem.tasks.generated import GeneratedTask, TaskOptions

if TYPE_CHECKING:
    from evomem.tasks.episodes.codebook import Episode

WORDS = 3
"""Words of a step, each one token of the models that read episodes."""


class EpisodeOptions(TaskOptions):
    """Options of the tasks made of episodes."""

    length: int = Field(
        default=480, ge=6, le=LENGTH, description="words of context, question and answer, three a step, at most"
    )

    @property
    def step(self) -> int:
        """The last step whose action can be asked for, counted from 0."""
        return self.length // WORDS - 1


class _Episodes(GeneratedTask[Any]):
    """What both tasks share: an episode, cut at the last step that fits and at which the action is no close call."""

    divides = "layouts of the maze, seeds of the cart"
    packages: ClassVar[tuple[str, ...]] = ("gymnasium",)

    @abstractmethod
    def episode(self, random: Random, split: Split) -> Episode:
        """Return an episode with such a step."""

    def sample(self, random: Random, split: Split, number: int, identity: str) -> Sample:
        """Return one sample."""
        episode = self.episode(random, split)
        step = self.last_clear(episode)
        answer = f"a{episode.intended[step]}"
        return Sample(
            id=identity,
            context=episode.text(step),
            question=" " + episode.prompt(step),
            answer=" " + answer,
            references=(answer,),
            max_new_tokens=self.counts.following(answer),
            meta={"step": step},
        )

    def last_clear(self, episode: Episode) -> int:
        """Return the step that is asked about; 0, before anything was read, if there is none."""
        return max((step for step in range(self.options.step + 1) if episode.clear[step]), default=0)

    def score(self, sample: Sample, output: str) -> float:
        """Return 1 if the first word of the output is the right action, else 0."""
        return float(tuple(output.split()[:1]) == sample.references)


class TMazeOptions(EpisodeOptions):
    """Options of the maze."""

    cues: int = Field(default=6, ge=1, le=8, description="colours of which there are doors")
    visits: int = Field(default=2, ge=1, le=LISTED, description="doors of each colour; the arrow on the newest counts")


@tasks.register("tmaze")
class TMaze(_Episodes):
    """Which exit did the arrow on the last door of this colour point to? A corridor of distractions lies between."""

    name: ClassVar[str] = "tmaze"
    Options = TMazeOptions
    options: TMazeOptions
    uniform_chance = 0.25

    def episode(self, random: Random, split: Split) -> Episode:
        """Return an episode whose corridor ends where the action is asked for."""
        step, cues, visits = self.options.step, self.options.cues, self.options.visits
        if step < cues * visits:
            raise TaskError(
                f"task {self.name}: a corridor of {step} steps has no place for {cues} times {visits} doors; ask for a "
                f"length of at least {WORDS * (cues * visits + 1)}, or for fewer doors"
            )
        episode: Episode = environments().maze_episode(random, split, step, cues, visits)
        return episode


class CartPoleOptions(EpisodeOptions):
    """Options of the cart."""

    length: int = Field(
        default=480, ge=6, le=600, description="words of context, question and answer, three a step, at most"
    )


@tasks.register("cartpole")
class CartPole(_Episodes):
    """Which way does the controller push the cart now? It sees velocities, the episode does not show them."""

    name: ClassVar[str] = "cartpole"
    Options = CartPoleOptions
    options: CartPoleOptions
    uniform_chance = 0.5

    def episode(self, random: Random, split: Split) -> Episode:
        """Return an episode in which the pole stands long enough."""
        while True:
            episode: Episode = environments().cart_episode(random, split)
            if len(episode) > self.options.step and self.last_clear(episode):
                return episode


def environments() -> Any:
    """Return `evomem.tasks.episodes.environments`, which needs gymnasium.

    Raises
    ------
    MissingPackagesError : it is not installed.
    """
    require([("gymnasium", "the episodes of a task")])
    from evomem.tasks.episodes import environments

    return environments
