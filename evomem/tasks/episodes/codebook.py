"""Task: what the tokens of an episode stand for, and an episode as text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Codebook:
    """Returns-to-go and observations that have a token; an action's token is its number.

    Attributes
    ----------
    returns : (return_codes,) fp64, in the environment's units.
    states : (state_codes, state_dim) fp32.
    actions : how many there are.
    """

    returns: NDArray[np.float64]
    states: NDArray[np.float32]
    actions: int

    def return_code(self, value: float) -> int:
        """Return the number of the code next to a return-to-go."""
        return int(np.abs(self.returns - value).argmin())

    def state_code(self, observation: NDArray[np.float32]) -> int:
        """Return the number of the code next to an observation (state_dim,)."""
        return int(np.square(self.states - observation).sum(-1).argmin())


@dataclass(frozen=True)
class Episode:
    """What happened, in codes, step by step.

    Attributes
    ----------
    returns : the return-to-go before each step: the sum of the rewards from there to the end.
    states : what was observed.
    actions : what was done.
    intended : what the policy meant to do; differs from ``actions`` where it explored.
    clear : whether that was no close call.
    total : sum of all rewards.
    """

    returns: tuple[int, ...]
    states: tuple[int, ...]
    actions: tuple[int, ...]
    intended: tuple[int, ...]
    clear: tuple[bool, ...]
    total: float

    def __len__(self) -> int:
        return len(self.states)

    def first(self, steps: int) -> Episode:
        """Return the first ``steps`` steps, or all if there are fewer; the returns are those of the whole episode."""
        columns = (self.returns, self.states, self.actions, self.intended)
        returns, states, actions, intended = (column[:steps] for column in columns)
        return Episode(returns, states, actions, intended, self.clear[:steps], self.total)

    def text(self, steps: int) -> str:
        """Return the first ``steps`` steps as words: ``r3 s17 a0 r3 s42 a1``."""
        codes = zip(self.returns[:steps], self.states[:steps], self.actions[:steps], strict=True)
        return " ".join(f"r{r} s{s} a{a}" for r, s, a in codes)

    def prompt(self, step: int) -> str:
        """Return what stands before the action of a step: ``r3 s42``."""
        return f"r{self.returns[step]} s{self.states[step]}"
