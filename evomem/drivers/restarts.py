"""Driver: when a search has converged, how big and how wide the next one starts (IPOP, BIPOP)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from evomem.bounds import POPULATION

Strategy = Literal["none", "ipop", "bipop"]


@dataclass(frozen=True)
class Regime:
    """How one descent of a restarted search is run.

    Attributes
    ----------
    kind : ``large`` doubles its population every time, ``small`` draws population and step size at random.
    popsize : candidates of a generation.
    sigma : first step size.
    limit : evaluations after which the descent ends; None: until it converges.
    """

    kind: Literal["large", "small"]
    popsize: int
    sigma: float
    limit: int | None = None


@dataclass(frozen=True)
class RestartState:
    """The ledger from which the next regime follows; a pure value, saved with the search.

    Attributes
    ----------
    regime : the descent that is running.
    descents : descents begun, the running one included.
    doublings : how often the large regime has doubled the population.
    used_large, used_small : evaluations that ended descents of each regime have used.
    last_large : evaluations of the last ended descent of the large regime.
    """

    regime: Regime
    descents: int = 1
    doublings: int = 0
    used_large: int = 0
    used_small: int = 0
    last_large: int = 0


def first_descent(popsize: int, sigma: float) -> RestartState:
    """Return the ledger at the beginning."""
    return RestartState(Regime("large", popsize, sigma))


def next_descent(
    strategy: Strategy, state: RestartState, used: int, popsize: int, sigma: float, seed: int
) -> RestartState | None:
    """Return the ledger after the running descent has ended, or None if there is no restart.

    IPOP (Auger and Hansen 2005) doubles the population at every restart, here up to `POPULATION`. BIPOP (Hansen 2009,
    "Benchmarking a BI-population CMA-ES on the BBOB-2009 function testbed") has a second regime with populations
    floor(l0 (l_large / (2 l0))^(U^2)), step sizes sigma0 10^(-2U) and at most half the evaluations of the last large
    descent; the regime that has used fewer evaluations is next.

    Parameters
    ----------
    used : evaluations of the descent that has ended.
    popsize, sigma : l0 and sigma0.
    seed : of the search; the draws are a pure function of it and of the number of descents.
    """
    if strategy == "none":
        return None
    if state.regime.kind == "large":
        state = replace(state, used_large=state.used_large + used, last_large=used)
    else:
        state = replace(state, used_small=state.used_small + used)
    state = replace(state, descents=state.descents + 1)
    # The first descent has the default population and counts for neither regime (Hansen 2009, section 2).
    first_ended = state.descents == 2
    if strategy == "bipop" and not first_ended and state.used_small < state.used_large:
        large = popsize * 2**state.doublings
        exponent, width = np.random.default_rng([seed, state.descents, 2]).random(2)
        small = max(3, int(popsize * (large / popsize / 2) ** (exponent**2)))
        regime = Regime("small", small, sigma * 10.0 ** (-2.0 * width), max(small, state.last_large // 2))
        return replace(state, regime=regime)
    doublings = state.doublings + (popsize * 2 ** (state.doublings + 1) <= POPULATION)
    used_large = 0 if first_ended else state.used_large
    return replace(
        state, regime=Regime("large", popsize * 2**doublings, sigma), doublings=doublings, used_large=used_large
    )
