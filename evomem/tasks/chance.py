"""Task: the chance check, whether a task measures anything about memory on a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evomem.errors import TaskError
from evomem.statistics import percentile_interval

MINIMUM_GAIN = 0.1
"""Nats per answer token that the full context must be worth at least."""


@dataclass(frozen=True)
class ChanceReport:
    """Verdict of the chance check.

    Attributes
    ----------
    task : name of the task.
    passed : the context makes a difference on this model.
    gain : mean of full minus no-context log-likelihood, nats per answer token.
    interval : 95 % bootstrap interval of the gain.
    exact : mean exact score with the full cache; None when none was measured.
    chance : exact score that guessing gets.
    samples : number of pairs.
    message : one sentence for a person.
    """

    task: str
    passed: bool
    gain: float
    interval: tuple[float, float]
    exact: float | None
    chance: float
    samples: int
    message: str

    def require(self) -> None:
        """Raise `TaskError` with the message unless the check was passed."""
        if not self.passed:
            raise TaskError(self.message)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON-serialisable dictionary."""
        return {**self.__dict__, "interval": list(self.interval)}


def check(
    task_name: str,
    full_cache_exact: Sequence[float],
    chance: float,
    loglik_full: Sequence[float],
    loglik_without_context: Sequence[float],
) -> ChanceReport:
    """Decide whether reading the whole context helps the model to answer.

    The test is a paired bootstrap of the gain in log-likelihood: its 95 % interval must lie above zero and its mean
    above `MINIMUM_GAIN`. The exact score is reported and does not decide: a task may be too hard to be answered in
    full, and its likelihood can still tell managers apart.

    Parameters
    ----------
    task_name
        For the message.
    full_cache_exact
        Exact scores (samples,) with the full cache; may be empty.
    chance
        Exact score that guessing gets.
    loglik_full, loglik_without_context
        Mean log-likelihood per answer token (samples,), nats, of the same samples in the same order, with the whole
        context and with the question alone.

    Raises
    ------
    TaskError : the two sequences differ in length, have fewer than two values, or hold a value that is not finite.
    """
    full = np.asarray(loglik_full, dtype=np.float64)
    without = np.asarray(loglik_without_context, dtype=np.float64)
    if full.shape != without.shape or full.ndim != 1 or len(full) < 2:
        raise TaskError(
            f"chance check of task {task_name}: needs the same samples with and without context, at least 2; "
            f"got {full.shape} and {without.shape}"
        )
    difference = full - without
    if not np.isfinite(difference).all():
        where = int(np.flatnonzero(~np.isfinite(difference))[0])
        raise TaskError(
            f"chance check of task {task_name}: sample {where} has log-likelihoods {full[where]} and {without[where]}; "
            "they must be finite"
        )
    interval = percentile_interval(difference)
    gain, low, high = interval.mean, interval.low, interval.high
    passed = low > 0.0 and gain > MINIMUM_GAIN
    exact = float(np.mean(full_cache_exact)) if len(full_cache_exact) else None

    figures = f"{gain:+.3f} nats per answer token ({low:+.3f} to {high:+.3f}, {len(difference)} samples)"
    if exact is not None:
        figures += f", exact score {exact:.2f} where guessing gets {chance:.2f}"
    if passed:
        message = f"task {task_name} measures memory on this model: the context is worth {figures}"
    else:
        message = (
            f"task {task_name} measures nothing on this model: with the full cache the context is worth only "
            f"{figures}; choose an easier task, a shorter length or a stronger model"
        )
    return ChanceReport(task_name, passed, gain, (low, high), exact, chance, len(difference), message)
