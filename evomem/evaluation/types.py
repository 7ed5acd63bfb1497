"""Evaluation: what is measured, and under which protocol."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class EvaluationProtocol(BaseModel):
    """How a candidate is put to the test.

    ``compress_once``: the whole context is read, the manager decides once, then the model answers.
    ``streaming``: the manager decides every ``every`` tokens while the context is still being read.
    ``query_agnostic``: the question comes after the decision(s). ``query_aware``: the question is part of what is read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["compress_once", "streaming"] = "compress_once"
    mode: Literal["query_agnostic", "query_aware"] = "query_agnostic"
    every: int = Field(default=512, ge=1, description="streaming only: tokens between decisions")

    def __str__(self) -> str:
        kind = self.kind if self.kind == "compress_once" else f"streaming:{self.every}"
        return f"{kind}/{self.mode}"


@dataclass(frozen=True)
class Evaluation:
    """One candidate on one sample.

    Attributes
    ----------
    sample : id of the sample.
    loglik : mean natural-log likelihood per answer token, teacher-forced (nats, <= 0).
    exact : the task's exact metric of the greedily generated text in [0, 1]; None when generation was not asked for.
    slots : slots per KV head that the decision left, mean over layers and heads.
    bytes_peak, bytes_mean : measured bytes of the tensors that one sequence's cache held: while answering in
        ``compress_once`` (reading is shared and full by definition), while reading and answering in ``streaming``.
        Observations count in ``streaming`` only: after the one decision of ``compress_once`` nothing needs them.
    tokens : tokens that the model processed for this evaluation, generated ones too (shared reading counts once, at the
        first candidate).
    seconds : wall time of the batch divided by its candidates.
    heads : per layer and KV head, the share of the attention paid to the context by question and answer that falls on
        the kept slots; only when ``attention`` was measured (then nothing is generated and ``loglik`` is NaN).
    """

    sample: str
    loglik: float
    exact: float | None
    slots: float
    bytes_peak: float
    bytes_mean: float
    tokens: int
    seconds: float
    heads: tuple[tuple[float, ...], ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON-serialisable dictionary."""
        return asdict(self)
