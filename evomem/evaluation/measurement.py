"""Evaluation: what the evaluator measures, under which protocol, and its results.

A `Measurement` names the quantities to measure. It goes whole from the objective through plan, unit and worker to the
evaluator, which returns one `Evaluation` a candidate. A value that was not measured is absent from an evaluation; NaN
is a measured value that is no number.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from evomem.bounds import TOKENS
from evomem.errors import ConfigError, EvaluationError
from evomem.files.strict_json import as_float


class EvaluationProtocol(BaseModel):
    """When a candidate decides, and whether it sees the question.

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


Option = bool | int | float | str
"""Value of an option of a quantity."""


@dataclass(frozen=True)
class Quantity:
    """One thing to measure: the name of a registered measure (`evomem.evaluation.measures`) and its options.

    Attributes
    ----------
    options : (name, value) pairs, sorted by name.
    """

    name: str
    options: tuple[tuple[str, Option], ...] = ()

    @classmethod
    def of(cls, name: str, **options: Option) -> Self:
        """Return the quantity called ``name`` with these options."""
        return cls(name, tuple(sorted(options.items())))


@dataclass(frozen=True)
class Measurement:
    """The quantities that the evaluator measures.

    Attributes
    ----------
    quantities : what to measure, no name twice, in the order in which it is measured.
    observes : observations that are recorded besides what the managers need, so that calls with other managers find the
        same reading in the store.
    """

    quantities: tuple[Quantity, ...] = ()
    observes: frozenset[str] = frozenset()

    @classmethod
    def of(cls, *quantities: str | Quantity) -> Self:
        """Return the measurement of some quantities, by name or with options."""
        made = cls()
        for one in quantities:
            made = made.also(cls((Quantity(one) if isinstance(one, str) else one,)))
        return made

    def also(self, other: Measurement) -> Self:
        """Return the measurement of both.

        Raises
        ------
        ConfigError : both measure a quantity, with different options.
        """
        known = {one.name: one for one in self.quantities}
        for one in other.quantities:
            if known.setdefault(one.name, one) != one:
                raise ConfigError(
                    f"measurement: {one.name!r} is asked for twice, with options {dict(known[one.name].options)} and "
                    f"{dict(one.options)}; an evaluation has one value of a name"
                )
        return replace(self, quantities=tuple(known.values()), observes=self.observes | other.observes)

    def observing(self, observes: frozenset[str]) -> Self:
        """Return the measurement with more observations recorded."""
        return replace(self, observes=self.observes | observes)

    def with_options(self, name: str, **options: Option) -> Self:
        """Return the measurement with some options of one of its quantities set."""
        changed = Quantity.of(name, **{**self.options(name), **options})
        return replace(self, quantities=tuple(changed if one.name == name else one for one in self.quantities))

    def __contains__(self, name: object) -> bool:
        return any(one.name == name for one in self.quantities)

    def options(self, name: str) -> dict[str, Option]:
        """Return the options that a quantity is asked for with; none if it is not."""
        return next((dict(one.options) for one in self.quantities if one.name == name), {})

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-serialisable dictionary."""
        return {
            "quantities": [[one.name, dict(one.options)] for one in self.quantities],
            "observes": sorted(self.observes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the measurement that `to_json` wrote."""
        made = cls.of(*(Quantity.of(name, **options) for name, options in data["quantities"]))
        return made.observing(frozenset(data["observes"]))


NOTHING = Measurement()
"""No quantity."""
LOGLIK = Measurement.of("loglik")
"""The answer's log-likelihood."""
EXACT = Measurement.of("loglik", "exact")
"""The answer's log-likelihood, and the task's exact metric of what is generated."""

HEAD_MEMORY = Measurement.of("head_memory")
"""What every layer and KV head holds when the context has been read."""

Table = tuple[tuple[float, ...], ...]
"""One number a layer and KV head."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one candidate on one sample.

    Attributes
    ----------
    sample : id of the sample.
    values : what was measured, by name; what was not measured is absent. The measures that come with evomem give

        ``loglik``: mean natural-log likelihood per answer token, teacher-forced (nats, <= 0);
        ``exact``: the task's exact metric of the greedily generated text in [0, 1], absent where the task or the sample
        has none;
        ``without_context``: ``loglik`` of one who has read nothing but the question;
        ``head_attention``: per layer and KV head, the share of the attention paid to the context by question and answer
        that falls on the kept slots (larger is better);
        ``head_cost``: per layer and KV head, what the manager's ranking costs (smaller is better);
        ``head_slots``, ``head_bytes``: per layer and KV head, the slots that hold a token and the bytes that the head
        costs, when reading has ended;
        ``repeated_tokens``: tokens that were read again, after the whole context, before the manager decided;
        ``rank_correlation``, ``good_decisions``, ``sorted_cost``: how the decision compares with one that knows the
        future.
    slots : slots per KV head that the decision left, mean over layers and heads; None: no result.
    bytes_peak, bytes_mean : measured bytes of the tensors that one sequence's cache held: while answering in
        ``compress_once`` (reading is shared and full by definition), while reading and answering in ``streaming``.
        Observations count in ``streaming`` only: after the one decision of ``compress_once`` nothing needs them. None:
        not known.
    tokens : tokens that the model processed for this evaluation, generated ones too (shared reading counts once, at the
        first candidate).
    seconds : wall time of the batch divided by its candidates.
    steps : the decisions of a rollout in their order, if a policy gradient was asked for.
    """

    sample: str
    values: Mapping[str, float | Table] = field(default_factory=dict)
    slots: float | None = None
    bytes_peak: float | None = None
    bytes_mean: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    steps: tuple[Step, ...] | None = None

    @property
    def loglik(self) -> float | None:
        """Mean log-likelihood per answer token; None if it was not measured."""
        return self.number("loglik")

    @property
    def exact(self) -> float | None:
        """The task's exact metric; None if it was not measured."""
        return self.number("exact")

    def required(self, name: str) -> float:
        """Return a value that is one number.

        Raises
        ------
        EvaluationError : it was not measured.
        """
        value = self.number(name)
        if value is None:
            raise EvaluationError(f"{self.sample}: {name} was not measured; ask for it, or take a task that has it")
        return value

    def number(self, name: str) -> float | None:
        """Return a value that is one number; None if it was not measured.

        Raises
        ------
        ConfigError : the value has a number per head.
        """
        value = self.values.get(name)
        if isinstance(value, tuple):
            raise ConfigError(f"evaluation: {name!r} has a number per head, and one number is asked for")
        return value

    def table(self, name: str) -> Table | None:
        """Return a value that has a number per layer and head; None if it was not measured.

        Raises
        ------
        ConfigError : the value is one number.
        """
        value = self.values.get(name)
        if value is not None and not isinstance(value, tuple):
            raise ConfigError(f"evaluation: {name!r} is one number, and a number per head is asked for")
        return value

    def to_json(self) -> dict[str, Any]:
        """Return the fields and, under their own names, the values as a JSON-serialisable dictionary.

        What was not measured is left out.

        Raises
        ------
        ConfigError : a value has the name of a field.
        """
        taken = sorted(_FIELDS & self.values.keys())
        if taken:
            raise ConfigError(f"evaluation: {taken[0]!r} is a field of every evaluation; give the value another name")
        record = {"sample": self.sample, **self.values}
        numbers = {name: getattr(self, name) for name in ("slots", "bytes_peak", "bytes_mean", "tokens", "seconds")}
        record |= {name: value for name, value in numbers.items() if value is not None}
        return record if self.steps is None else {**record, "steps": [step.to_json() for step in self.steps]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], measurement: Measurement = LOGLIK) -> Self:
        """Return the evaluation that `to_json` wrote, also that of earlier versions.

        Earlier versions wrote NaN or None for what was not measured, and one field ``heads`` for two quantities.

        Parameters
        ----------
        measurement : what was asked for; it tells which of them ``heads`` is.

        Raises
        ------
        ValueError, TypeError, KeyError, AttributeError, OverflowError : the data are no evaluation, or not of this
            measurement.
        """
        known = dict(data)
        if "heads" in known or "oracle" in known or known.get("exact", 0) is None:
            known = _of_earlier(known, measurement)
        numbers = {name: as_float(known[name]) for name in ("slots", "bytes_peak", "bytes_mean") if name in known}
        steps = known.get("steps")
        return cls(
            sample=known["sample"],
            values={name: _value(value) for name, value in known.items() if name not in _FIELDS},
            **numbers,
            tokens=int(known["tokens"]),
            seconds=as_float(known["seconds"]),
            steps=None if steps is None else tuple(map(Step.from_json, steps)),
        )


_FIELDS = frozenset({one.name for one in fields(Evaluation)} | {"heads", "oracle"})


def _value(value: Any) -> float | Table:
    if isinstance(value, list):
        return tuple(tuple(as_float(number) for number in row) for row in value)
    if value is None or isinstance(value, bool | dict):
        raise ValueError("a value is a number, or a number per layer and head")
    return float(value)


def _of_earlier(data: dict[str, Any], measurement: Measurement) -> dict[str, Any]:
    """Return an evaluation of an earlier version as `Evaluation.to_json` writes it today."""
    heads, oracle = data.pop("heads", None), data.pop("oracle", None)
    if data.get("exact", 0) is None:
        del data["exact"]
    if heads is not None:
        del data["loglik"]  # NaN: heads were measured in its place
        if ("attention" in measurement) == ("ranking_cost" in measurement):
            raise ValueError("heads of an earlier version are not of this measurement")
        if "attention" in measurement:
            data["head_attention"] = heads
        else:
            data["head_cost"] = [[-as_float(value) for value in row] for row in heads]
    elif all(math.isnan(as_float(data[name])) for name in ("loglik", "slots", "bytes_peak", "bytes_mean")):
        del data["loglik"]  # a candidate that could not be evaluated
    if oracle is not None:
        data |= oracle
    return {
        name: value
        for name, value in data.items()
        if name not in ("slots", "bytes_peak", "bytes_mean") or not math.isnan(as_float(value))
    }
