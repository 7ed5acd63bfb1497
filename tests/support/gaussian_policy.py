"""A policy that draws points around its parameters: how a driver that takes rollouts is told of any fitness."""

from __future__ import annotations

import numpy as np

from evomem.drivers.base import Fitness
from evomem.drivers.estimators import Rollouts
from evomem.evaluation.measurement import Step


def sphere(vectors):
    return -(vectors**2).sum(axis=1)


SPREAD = 0.4


def tell(driver, population, fitness):
    """Tell the fitness; to a driver that takes rollouts also what came of them, without a result where there is none.

    The policy draws a point around its parameters, by the rollout's seed, and is rewarded for where that is.
    """
    driver.tell(population, Fitness(fitness, **parts(driver, population, fitness)))


def parts(driver, population, fitness):
    """What a driver is told besides the values, by the name of the part."""
    count, dim = population.vectors.shape
    if "costs" in driver.uses:
        return {"costs": np.abs(population.vectors[:, 0])}
    if "rollouts" not in driver.uses:
        return {}
    if len(fitness) != count:
        return {"rollouts": ()}
    drawing, found = population.vectors if population.behaviour is None else population.behaviour[None], []
    for number in range(2):
        noise = np.stack([np.random.default_rng([seed, number]).normal(size=dim) for seed in population.seeds])
        points = drawing + SPREAD * noise
        away = (points - population.vectors) / SPREAD**2
        ratio = np.exp(((points - drawing) ** 2 - (points - population.vectors) ** 2).sum(1) / (2 * SPREAD**2))
        high, low = (Step.pack(gradient) for gradient in ((ratio * (r * away.T)).T for r in (ratio < 1.2, ratio > 0.8)))
        size = 4 * dim
        steps = [(Step(high[i * size :][:size], lower=low[i * size :][:size], choices=dim),) for i in range(count)]
        rewards = np.where(np.isfinite(fitness), sphere(points), fitness)
        found.append(Rollouts(0.5, rewards[:, None], steps))
    return {"rollouts": tuple(found)}
