"""Evaluation: rows of a comparison, from evaluations to means, differences and intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from typing import Any, Literal, Self

from evomem.bounds import LARGE
from evomem.errors import ConfigError, EvomemError
from evomem.evaluation.measurement import Evaluation, Table
from evomem.files.strict_json import as_float
from evomem.statistics import bootstrap_mean, paired_bootstrap, recovered_share

Budget = int | float | None
Role = Literal["subject", "field", "full", "oracle"]

BYTES_TOLERANCE = 0.02
"""Relative difference of mean measured bytes up to which two managers count as equally large."""

TRIVIAL = ("protected_random", "streaming_llm", "fifo")
"""Managers that know nothing of the text: a lot between protected ends, sinks and the newest tokens, the newest tokens.

The best of those that were measured is the floor of a comparison: what `Row.recovered` starts from.
"""


def is_trivial(manager: str) -> bool:
    """Whether a manager is one of `TRIVIAL` by its spec, ``streaming_llm(sinks=8)`` included; a wrapped one is not."""
    return manager.partition("(")[0] in TRIVIAL


@dataclass(frozen=True)
class Row:
    """One manager at one budget on one task of one model.

    Attributes
    ----------
    role : ``subject`` (what the comparison is about), ``field``, ``full`` (the reference without eviction), or
        ``oracle`` (a decision that knows the future).
    budget : slots per head or share of the tokens read; None: the manager's own, or none.
    score, loglik : means over samples of the exact metric in [0, 1] (None where there is none) and of the
        log-likelihood in nats per answer token.
    interval, interval_score : 95 % paired bootstrap interval of the first subject's value minus this row's; None for
        the first subject itself, and with fewer than two samples.
    difference, difference_score : the means that these intervals are of.
    interval_loglik : 95 % bootstrap interval of ``loglik`` itself.
    bytes_peak, bytes_mean : measured bytes of the cache, means over samples.
    bytes_ratio : ``bytes_mean`` over the first subject's.
    slots : per head, mean over layers, heads and samples.
    floor : the trivial manager (`TRIVIAL`) with the largest log-likelihood at this budget; ``random`` where none of
        them was measured and it was; None: neither was.
    recovered : (this - floor) / (full - floor) in log-likelihood; None without a floor or without the full cache. In
        rows of before ``floor`` is None and this is of ``random``.
    seconds : wall time per sample.
    prefix : what the tokenizer puts before every context, as it spells it; "": nothing.
    chat_template : hash of the chat template that the samples are asked in; "": plain text.
    remark : what else a reader must know of the samples: how few there are, how a small file was divided.
    longest, positions : tokens of the longest sample, and the fewer positions that a rotary model was made for; both
        None where it was made for all of them.
    head_slots, head_bytes : per layer, one number a KV head: the slots that hold a token and the bytes that the head
        costs when the context has been read, means over samples. None: not measured.
    dtype, device : type of the model's weights, and where they lay (`evomem.devices.named`); None if that is not known.
    total_range : fewest and most slots of all layers and heads that one sample has when its context has been read.
        None: not measured.
    repeated_tokens : tokens that are read again, after the whole context, before the manager decides; None: none are.
    price_per_megabyte : nats per 10^6 bytes of mean memory; None: memory has no price, nor have the next three a value.
    net : mean over samples of the log-likelihood minus the price of the sample's ``bytes_mean``.
    net_difference, net_interval : as ``difference`` and ``interval``, of net, whose bytes are those of each sample.
    """

    model: str
    task: str
    manager: str
    budget: Budget
    protocol: str
    split: str
    role: Role
    samples: int
    score: float | None
    loglik: float
    bytes_peak: float
    bytes_mean: float
    slots: float
    seconds: float
    interval: list[float] | None = None
    interval_score: list[float] | None = None
    difference: float | None = None
    difference_score: float | None = None
    interval_loglik: list[float] | None = None
    bytes_ratio: float | None = None
    floor: str | None = None
    recovered: float | None = None
    prefix: str = ""
    chat_template: str = ""
    remark: str = ""
    longest: int | None = None
    positions: int | None = None
    dtype: str | None = None
    device: str | None = None
    head_slots: list[list[float]] | None = None
    head_bytes: list[list[float]] | None = None
    total_range: list[float] | None = None
    repeated_tokens: float | None = None
    price_per_megabyte: float | None = None
    net: float | None = None
    net_difference: float | None = None
    net_interval: list[float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields, numbers that are not finite as None."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the row that `to_json` wrote; fields that it does not know are left out."""
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        if values.get("loglik", 0.0) is None:
            values["loglik"] = math.nan
        return cls(**values)

    @property
    def equal_bytes(self) -> bool:
        """Whether this row's memory is within `BYTES_TOLERANCE` of the first subject's."""
        return self.bytes_ratio is not None and abs(self.bytes_ratio - 1) <= BYTES_TOLERANCE


def check_price(price_per_megabyte: float | None) -> None:
    """Raise `ConfigError` for a price that is none: no number, NaN, below zero, or larger than a search may have."""
    price = price_per_megabyte
    number = isinstance(price, Real) and not isinstance(price, bool)
    if price is not None and not (number and 0 <= price <= LARGE):
        raise ConfigError(
            f"price_per_megabyte: {price!r}; give nats per 10^6 bytes, from 0 to {LARGE:g}, for example 0.1"
        )


def budget_size(budget: Budget) -> float:
    """Return a number that orders budgets: counts, then shares (the context's length is not known here), then none."""
    if budget is None:
        return math.inf
    return 1e9 * (1 + budget) if isinstance(budget, float) else float(budget)


@dataclass(frozen=True)
class Measured:
    """What one manager was measured to do at one budget in one scenario (model and task): what a row is made of.

    ``evaluations`` are in the order of the samples, which is the same for all managers of a scenario; the last
    fields are the `Row`'s.
    """

    model: str
    task: str
    manager: str
    budget: Budget
    protocol: str
    split: str
    role: Role
    evaluations: Sequence[Evaluation]
    prefix: str = ""
    chat_template: str = ""
    remark: str = ""
    longest: int | None = None
    positions: int | None = None
    dtype: str | None = None
    device: str | None = None


def rows_of(subject: str, measured: Sequence[Measured], price_per_megabyte: float | None = None) -> list[Row]:
    """Return the rows of one scenario (model and task): by budget, the best first, the full cache last.

    The best has the largest log-likelihood; where memory has a price, the largest net. What a row is set against:
    `reference_budget`.

    Raises
    ------
    ConfigError : the price is none, see `check_price`.
    EvomemError : a manager has no evaluation.
    """
    check_price(price_per_megabyte)
    evaluations = {(one.manager, one.budget): one.evaluations for one in measured}
    budgets = [one.budget for one in measured if one.manager == subject]
    rows = []
    for one in measured:
        if not one.evaluations:
            raise EvomemError(
                f"{one.manager} on {one.task}, {one.model}: no sample was measured; there is no row of it"
            )
        reference = evaluations[subject, reference_budget(one.budget, budgets)]
        row = _row(one, subject, reference, floor_at(one.budget, measured), evaluations.get(("full", None)))
        if price_per_megabyte is not None:
            row = _priced(row, one.evaluations, None if one.manager == subject else reference, price_per_megabyte)
        rows.append(row)

    def order(row: Row) -> tuple[float, float]:
        value = row.loglik if row.net is None else row.net
        return budget_size(row.budget), -value if math.isfinite(value) else math.inf

    return sorted(rows, key=order)


def reference_budget(budget: Budget, budgets: Sequence[Budget]) -> Budget:
    """Return the subject's budget at which it is set against a row: the row's own, or else the nearest.

    A subject that takes no budget is set against all rows; a row without a budget (the full cache), against the
    subject's largest.

    Parameters
    ----------
    budget : of the row.
    budgets : of the subject.
    """
    if budget in budgets:
        return budget
    sized = [b for b in budgets if b is not None]
    if not sized or None in budgets:
        return None
    if budget is None:
        return max(sized, key=budget_size)
    return min(sized, key=lambda b: abs(budget_size(b) - budget_size(budget)))


def floor_at(budget: Budget, measured: Sequence[Measured]) -> Measured | None:
    """Return what `Row.floor` names at a budget: the best of the trivial managers, or else ``random``; None: neither.

    Of equal ones the first in `TRIVIAL` that was measured; one whose log-likelihood is no number is none.
    """
    here = [one for one in measured if one.budget == budget and one.role not in ("full", "oracle")]
    finite = [one for one in here if math.isfinite(_mean_loglik(one.evaluations))]
    trivial = sorted(
        (one for one in finite if is_trivial(one.manager)), key=lambda one: TRIVIAL.index(one.manager.partition("(")[0])
    )
    candidates = trivial or [one for one in finite if one.manager == "random"]
    return max(candidates, key=lambda one: _mean_loglik(one.evaluations), default=None)


def _row(
    one: Measured,
    subject: str,
    reference: Sequence[Evaluation],
    floor: Measured | None,
    full: Sequence[Evaluation] | None,
) -> Row:
    evaluations = one.evaluations
    loglik, bytes_mean = _mean_loglik(evaluations), _mean([as_float(e.bytes_mean) for e in evaluations])
    scores = [e.exact for e in evaluations if e.exact is not None]
    difference = difference_score = None
    if one.manager != subject:
        difference = paired_bootstrap(_logliks(reference), _logliks(evaluations))
        pairs = [(a.exact, b.exact) for a, b in zip(reference, evaluations, strict=True)]
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        if both:
            difference_score = paired_bootstrap([a for a, _ in both], [b for _, b in both])
    recovered = None
    if floor is not None and full is not None:
        recovered = recovered_share(loglik, _mean_loglik(floor.evaluations), _mean_loglik(full))
    return Row(
        model=one.model,
        task=one.task,
        manager=one.manager,
        budget=one.budget,
        protocol=one.protocol,
        split=one.split,
        role=one.role,
        samples=len(evaluations),
        score=_mean(scores) if scores else None,
        loglik=loglik,
        bytes_peak=_mean([as_float(e.bytes_peak) for e in evaluations]),
        bytes_mean=bytes_mean,
        slots=_mean([as_float(e.slots) for e in evaluations]),
        seconds=_mean([e.seconds for e in evaluations]),
        interval=difference.bounds() if difference else None,
        difference=difference.mean if difference else None,
        interval_score=difference_score.bounds() if difference_score else None,
        difference_score=difference_score.mean if difference_score else None,
        interval_loglik=bootstrap_mean(_logliks(evaluations)).bounds(),
        bytes_ratio=bytes_mean / _mean([as_float(e.bytes_mean) for e in reference]),
        floor=floor.manager if floor is not None else None,
        recovered=recovered,
        prefix=one.prefix,
        chat_template=one.chat_template,
        remark=one.remark,
        longest=one.longest,
        positions=one.positions,
        dtype=one.dtype,
        device=one.device,
        head_slots=_mean_table([e.table("head_slots") for e in evaluations]),
        head_bytes=_mean_table([e.table("head_bytes") for e in evaluations]),
        total_range=_total_range([e.table("head_slots") for e in evaluations]),
        repeated_tokens=_mean_of_all([e.number("repeated_tokens") for e in evaluations]),
    )


def _priced(row: Row, evaluations: Sequence[Evaluation], reference: Sequence[Evaluation] | None, price: float) -> Row:
    """Return a row with its net value; ``reference`` are the subject's evaluations, None for the subject itself."""
    net = _nets(evaluations, price)
    difference = None if reference is None else paired_bootstrap(_nets(reference, price), net)
    return replace(
        row,
        price_per_megabyte=price,
        net=_mean(net),
        net_difference=difference.mean if difference else None,
        net_interval=difference.bounds() if difference else None,
    )


def _nets(evaluations: Sequence[Evaluation], price: float) -> list[float]:
    """Return log-likelihood minus the price of the mean bytes, as a search charges them (`evomem.runs.fitness`)."""
    return [as_float(e.loglik) - price * as_float(e.bytes_mean) / 1e6 for e in evaluations]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    """Return the mean of values that were all measured; None if one was not."""
    measured = [value for value in values if value is not None]
    return _mean(measured) if measured and len(measured) == len(values) else None


def _mean_table(tables: Sequence[Table | None]) -> list[list[float]] | None:
    """Return the mean of tables of one number a layer and KV head; None if one was not measured (earlier versions)."""
    measured = [table for table in tables if table is not None]
    if len(measured) < len(tables):
        return None
    return [[_mean(values) for values in zip(*heads, strict=True)] for heads in zip(*measured, strict=True)]


def _total_range(tables: Sequence[Table | None]) -> list[float] | None:
    """Return the least and the largest sum of a table; None if one was not measured (earlier versions)."""
    totals = [sum(map(sum, table)) for table in tables if table is not None]
    return [min(totals), max(totals)] if len(totals) == len(tables) else None


def _mean_loglik(evaluations: Sequence[Evaluation]) -> float:
    return _mean(_logliks(evaluations))


def _logliks(evaluations: Sequence[Evaluation]) -> list[float]:
    return [as_float(evaluation.loglik) for evaluation in evaluations]


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
