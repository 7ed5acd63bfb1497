"""Evaluation: what is measured, and under which protocol."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from evomem.bounds import TOKENS


class EvaluationProtocol(BaseModel):
    """How a candidate is put to the test.

    ``compress_once``: the whole context is read, the manager decides once, then the model answers.
    ``streaming``: the manager decides every ``every`` tokens while the context is still being read.
    ``query_agnostic``: the question comes after the decision(s). ``query_aware``: the question is part of what is read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["compress_once", "streaming"] = "compress_once"
    mode: Literal["query_agnostic", "query_aware"] = "query_agnostic"
    every: int = Field(default=512, ge=1, le=TOKENS, description="streaming only: tokens between decisions")

    def __str__(self) -> str:
        kind = self.kind if self.kind == "compress_once" else f"streaming:{self.every}"
        return f"{kind}/{self.mode}"


@dataclass(frozen=True)
class Step:
    """One decision of a rollout, for a policy gradient.

    Attributes
    ----------
    gradient, lower : little-endian fp32 numbers, one a parameter (`numbers`). ``gradient`` is ∇θ log π of the decision;
        where the decision was drawn by an older policy, with the clipped ratio of every choice in front (PPO): this one
        for a positive advantage, ``lower`` for a negative one (empty: the same). With ``ascent`` it is an
        estimate of the fitness' own gradient, and no advantage is wanted.
    reward : mean log-likelihood of the tokens that were read between this decision and the next, if it was asked for.
    log_prob : log π of the decision, summed over layers and heads.
    reference : the same by the reference policy; 0 without one.
    choices : random choices that it consists of.
    clipped : share of the choices whose ratio was clipped.
    """

    gradient: bytes
    ascent: bool = False
    lower: bytes = b""
    reward: float = 0.0
    log_prob: float = 0.0
    reference: float = 0.0
    choices: int = 0
    clipped: float = 0.0

    @staticmethod
    def numbers(packed: bytes) -> NDArray[np.float64]:
        """Return packed numbers."""
        return np.frombuffer(packed, dtype="<f4").astype(np.float64)

    @staticmethod
    def pack(numbers: NDArray[Any]) -> bytes:
        """Return numbers as they are kept and sent."""
        return np.ascontiguousarray(numbers, dtype="<f4").tobytes()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON-serialisable dictionary; packed numbers in base64."""
        return {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the step that `to_json` wrote, to the bit."""
        packed = {name: base64.b64decode(data[name]) for name in ("gradient", "lower")}
        return cls(**{**data, **packed})


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
        the kept slots, or minus the cost of its ranking; only when that was measured *instead* of the likelihood (then
        nothing is generated and ``loglik`` is NaN).
    steps : the decisions of a rollout in their order, if a policy gradient was asked for.
    oracle : how the decision compares with one that knows the future, by name, if asked for.
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
    steps: tuple[Step, ...] | None = None
    oracle: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON-serialisable dictionary; what only some evaluations have is left out if None."""
        fields = {k: v for k, v in asdict(self).items() if v is not None or k not in ("steps", "oracle")}
        return fields if self.steps is None else {**fields, "steps": [step.to_json() for step in self.steps]}
