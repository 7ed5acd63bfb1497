"""Evaluation: the log-likelihood of an answer, from the logits of its tokens."""

from __future__ import annotations

from torch import Tensor

from evomem.errors import TaskError


def mean_loglik(logits: Tensor, answer: Tensor) -> list[float]:
    """Mean log-likelihood of the answer's tokens (1, length) per row of logits (rows, length, vocabulary).

    Raises
    ------
    TaskError : there is no token; the mean of nothing is no number.
    """
    if not answer.shape[1]:
        raise TaskError("an answer has no token; give every sample an answer")
    answers = answer.to(logits.device).expand(logits.shape[0], -1)
    chosen = logits.float().log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    means: list[float] = chosen.double().mean(1).tolist()
    return means
