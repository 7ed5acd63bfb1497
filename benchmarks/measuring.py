"""Evaluation: what all benchmarks share: the model, the sizes, and pairs of timings taken in turns."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from evomem import models, tasks
from evomem.errors import EvomemError
from evomem.managers import MemoryManager
from evomem.models import LoadedModel
from evomem.search_space.space import SearchSpace, load_space
from evomem.tasks import Sample, Split, Task

Side = Callable[[], float]
"""Does one side of a comparison once and returns its seconds."""


@dataclass(frozen=True)
class Line:
    """One measured number.

    Attributes
    ----------
    name : what was measured.
    value : median over the repeats.
    unit : of the value.
    spread : smallest and largest of the repeats.
    """

    name: str
    value: float
    unit: str
    spread: tuple[float, float]


def line(name: str, values: Sequence[float], unit: str = "ratio") -> Line:
    """Return the line of the repeats' values."""
    return Line(name, statistics.median(values), unit, (min(values), max(values)))


@dataclass(frozen=True)
class Sizes:
    """How much each benchmark does; lengths in tokens."""

    population: int = 32
    plain: int = 3  # candidates that the plain side is timed with, scaled to the population
    context: int = 1000
    budget: int = 64
    streaming_context: int = 1024
    streaming_every: int = 512
    streaming_budget: int = 128
    prefill: int = 2048
    decode_context: int = 1024
    decode_steps: int = 64
    decode_batches: tuple[int, ...] = (1, 8)
    quarter_context: int = 4096
    quarter_batch: int = 8
    quarter_steps: int = 8
    namm_context: int = 4096
    namm_every: int = 512
    namm_budget: int = 1024
    ray_context: int = 500
    ray_population: int = 32
    ray_samples: int = 8
    ray_workers: tuple[int, ...] = (1, 2, 3)
    gradient_context: int = 160
    gradient_samples: int = 20_000
    gradient_groups: int = 32
    rollout_context: int = 500


QUICK = Sizes(
    population=4, plain=1, context=160, budget=16, streaming_context=64, streaming_every=32, streaming_budget=16,
    prefill=64, decode_context=32, decode_steps=4, decode_batches=(1, 2), quarter_context=64, quarter_batch=2,
    quarter_steps=2, namm_context=128, namm_every=32, namm_budget=48,
    ray_context=160, ray_population=4, ray_samples=2, ray_workers=(2,), gradient_context=160, gradient_samples=16,
    gradient_groups=3, rollout_context=160,
)  # fmt: skip
"""Sizes that only show that the plumbing holds; their ratios mean nothing."""


@dataclass
class Setting:
    """What a benchmark is run with.

    Attributes
    ----------
    name : of the model, as `evomem.models.load` takes it; it is loaded at its first use, once.
    sizes : how much to do.
    repeats : rounds of every comparison; None: each benchmark's own number.
    """

    name: str = "smollm2-135m"
    sizes: Sizes = field(default_factory=Sizes)
    repeats: int | None = None

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model with stock SDPA attention, read through once so that nothing happens for the first time later."""
        loaded = models.load(self.name, attn="sdpa")
        with torch.no_grad():
            loaded.model(input_ids=self.random_tokens(loaded, 1, 64))
        return loaded

    def tokens(self, rows: int, length: int) -> torch.Tensor:
        """Return random token ids (rows, length), the same at every call."""
        return self.random_tokens(self.loaded, rows, length)

    @staticmethod
    def random_tokens(loaded: LoadedModel, rows: int, length: int) -> torch.Tensor:
        """Return random token ids (rows, length) of a model's vocabulary."""
        generator = torch.Generator().manual_seed(0)
        size = min(int(loaded.model.config.vocab_size), len(loaded.tokenizer))
        return torch.randint(size, (rows, length), generator=generator).to(loaded.model.device)

    def rounds(self, usual: int) -> int:
        """Return how many rounds to measure, ``usual`` unless the user said otherwise."""
        return self.repeats or usual

    def needle(self, length: int) -> tuple[Task, Sample]:
        """Return the needle task and one sample whose context is about ``length`` tokens."""
        task = tasks.build("multikey_1", self.loaded.tokenizer, length)
        return task, task.samples(Split.TRAIN, 1, 0)[0]


def candidates(space: str, count: int, **options: object) -> list[MemoryManager]:
    """Return ``count`` different managers, drawn as the first generation of a search in ``space`` would be."""
    config = load_space(space, {"manager": {"options": options}})
    searched = SearchSpace(config)
    random = np.random.default_rng(0)
    return [
        searched.decode(searched.start + searched.sigma * random.standard_normal(searched.dim)) for _ in range(count)
    ]


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that ``work`` takes; garbage is collected before, not during."""
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    finally:
        gc.enable()


def in_turns(name: str, sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Time all sides in turns, A B A B …, so that a slower moment of the machine meets all of them.

    Returns the seconds of every side, round by round: what is compared is taken from the same round.

    Raises
    ------
    EvomemError : fewer than one round.
    """
    if rounds < 1:
        raise EvomemError(f"benchmark {name}: {rounds} rounds measure nothing; give at least 1")
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        for side, work in sides.items():
            seconds[side].append(work())
        progress(name, number + 1, rounds, "  ".join(f"{side} {taken[-1]:.3f} s" for side, taken in seconds.items()))
    return seconds


def progress(name: str, done: int, total: int, what: str) -> None:
    """Say on the terminal how far a benchmark is."""
    print(f"{name}  {done}/{total}  {what}", file=sys.stderr, flush=True)


def ratios(above: Sequence[float], below: Sequence[float], scale: float = 1.0) -> list[float]:
    """Return scale · above / below, round by round."""
    return [scale * a / b for a, b in zip(above, below, strict=True)]
