"""Report: what a comparison says in sentences: who wins on likelihood, and on net where memory has a price."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TypeVar

from evomem.evaluation.rows import BYTES_TOLERANCE, Row, is_trivial, reference_budget
from evomem.statistics import DIGITS, verdict

AnyRow = TypeVar("AnyRow", bound=Row)


def sentences(rows: Sequence[Row]) -> list[str]:
    """Return what rows say: per model, task and budget whether the subject beats the best heuristic of equal memory.

    Beside it stands the best trivial manager (`evomem.evaluation.rows.TRIVIAL`), where one was measured.
    Where memory has a price also who wins on net, per model and task: the subject against every other subject, against
    the heuristic with the largest net, and against the full cache.
    """
    lines = []
    several = len({(row.model, row.task) for row in rows}) > 1
    for (model, task), group in by_scenario(rows):
        sections = [list(section) for _, section in groupby(group, key=lambda row: row.budget)]
        texts = [text for text in map(_sentence, sections) if text is not None]
        lines += [f"{task} on {model}: {text}" if several else text for text in texts + _net_sentences(group)]
    return lines


def best_heuristic(rows: Sequence[AnyRow]) -> AnyRow | None:
    """Return the row of the field with the largest log-likelihood that holds no more memory than the subject.

    Where all hold more, the best of them.
    """
    field = [row for row in rows if row.role == "field" and math.isfinite(row.loglik)]
    fair = [row for row in field if row.bytes_ratio is None or row.bytes_ratio <= 1 + BYTES_TOLERANCE]
    return max(fair or field, key=lambda row: row.loglik, default=None)


def best_trivial(rows: Sequence[AnyRow]) -> AnyRow | None:
    """Return the row of the best trivial manager in the field (`evomem.evaluation.rows.TRIVIAL`), as `best_heuristic`.

    None where none was measured.
    """
    return best_heuristic([row for row in rows if is_trivial(row.manager)])


def best_on_net(rows: Sequence[AnyRow]) -> AnyRow | None:
    """Return the row of the field with the largest net, whatever memory it holds: that is in the price."""
    field = [row for row in rows if row.role == "field"]
    return max((row for row in field if _net(row) > -math.inf), key=_net, default=None)


def first_subjects(rows: Sequence[AnyRow]) -> list[AnyRow]:
    """Return the rows of the subject that all differences are taken of, one per budget."""
    # The others' differences are from the first subject; further subjects have differences themselves.
    return [row for row in rows if row.role == "subject" and row.difference is None]


def _sentence(rows: Sequence[Row]) -> str | None:
    subject = next(iter(first_subjects(rows)), None)
    best = best_heuristic(rows)
    if subject is None or best is None or best.difference is None:
        return None
    where = f"on {best.samples} {best.split} samples at {_size(subject)}"
    name = f"the best heuristic ({best.manager})"
    text = f"{subject.manager} {_outcome(name, best.difference, best.interval)} {where}"
    if verdict(best.interval) == "unknown":
        text += "; too few samples"
    trivial = best_trivial(rows)
    if trivial is best:
        text += f"; {best.manager} is a trivial manager"
    elif trivial is not None and trivial.difference is not None:
        name = f"the best trivial manager ({trivial.manager})"
        text += f"; it {_outcome(name, trivial.difference, trivial.interval)}"
    if best.bytes_ratio is not None and not best.equal_bytes:
        text += f"; {best.manager} holds {_more(best.bytes_ratio)} memory"
    for row in rows:
        # Honest about those that do better with more memory than their budget says: ragged caches are padded.
        if row.role == "field" and row.loglik > best.loglik and row.bytes_ratio and row.difference is not None:
            advantage = f"{row.difference:+.3f} {signed_span(row.interval)}".rstrip()
            text += f"; against {row.manager}, which holds {_more(row.bytes_ratio)} memory: {advantage}"
    return text + "."


def _outcome(rival: str, difference: float, interval: Sequence[float] | None) -> str:
    """Return what a subject does to a rival, by how much and how sure that is.

    Parameters
    ----------
    difference, interval : of the subject's value minus the rival's.
    """
    amount = f"{abs(difference):z.{DIGITS}f} nats per answer token"
    signed = f"{difference:+z.{DIGITS}f} nats per answer token"
    low, high = interval if interval is not None else (math.nan, math.nan)
    who = verdict(interval)
    if who == "unknown":
        return f"is {signed} from {rival}"
    if who == "wins":
        return f"beats {rival} by {amount} {_span(low, high)}"
    if who == "loses":
        return f"loses to {rival} by {amount} {_span(-high, -low)}"
    return f"cannot be told from {rival}: {signed} {_span(low, high)}"


def _net_sentences(rows: Sequence[Row]) -> list[str]:
    """Return who wins on net in one scenario, a sentence per row of the subject; nothing where memory has no price."""
    priced = [row for row in rows if _net(row) > -math.inf]
    subjects = first_subjects(priced)
    budgets = [row.budget for row in subjects]
    at_several = {row.manager for row in priced if sum(one.manager == row.manager for one in priced) > 1}

    def called(row: Row) -> str:
        name = f"{row.manager} at budget {row.budget}" if row.manager in at_several else row.manager
        return f"{name} ({row.net:.{DIGITS}f}; {row.slots:.1f} slots per head, {kib(row.bytes_mean)} KiB)"

    lines = []
    for subject in subjects:
        against = [row for row in priced if row.manager != subject.manager and row.net_difference is not None]
        against = [row for row in against if reference_budget(row.budget, budgets) == subject.budget]
        others: dict[str, Row] = {}
        for row in sorted((row for row in against if row.role == "subject"), key=_net):
            others[row.manager] = row  # where it was measured at several budgets, its best
        rivals = [(called(row), row) for row in reversed(others.values())]
        best = best_on_net(against)
        rivals += [] if best is None else [(f"the best heuristic on net, {called(best)}", best)]
        rivals += [
            (called(row).replace(row.manager, "the full cache", 1), row) for row in against if row.role == "full"
        ]
        outcomes = [_outcome(name, row.net_difference or 0.0, row.net_interval) for name, row in rivals]
        if any(verdict(row.net_interval) == "unknown" for _, row in rivals):
            outcomes.append("too few samples")
        if rivals:
            lines.append(f"{called(subject)} {'; '.join(outcomes)}.")
    lines[1:] = [f"On net, {line}" for line in lines[1:]]
    largest = max((row for row in priced if row.role != "oracle"), key=_net, default=None)
    if largest is not None and len({row.budget for row in priced if row.role != "full"}) > 1:
        lines.append(f"{'The' if lines else 'the'} largest net is that of {called(largest)}.")
    if lines:  # all lines are at one price, on the same samples: it is said once
        first = priced[0]
        lines[0] = f"At {_price(first)}, on {first.samples} {first.split} samples: {lines[0]}"
    return lines


def _price(row: Row) -> str:
    return f"{row.price_per_megabyte:g} {'nat' if row.price_per_megabyte == 1 else 'nats'} per MB"


def _net(row: Row) -> float:
    """Return a row's net value, minus infinity where it has none."""
    return row.net if row.net is not None and math.isfinite(row.net) else -math.inf


def signed_span(interval: Sequence[float] | None) -> str:
    """Return an interval of an advantage as it stands in tables."""
    return "" if interval is None else f"[{interval[0]:+.{DIGITS}f}, {interval[1]:+.{DIGITS}f}]"


def _span(low: float, high: float) -> str:
    return f"[{low:z.{DIGITS}f}, {high:z.{DIGITS}f}]"


def kib(size: float) -> str:
    """Return bytes as KiB, as they stand in tables."""
    return f"{size / 1024:,.0f}"


def _more(ratio: float) -> str:
    return f"{abs(ratio - 1):.1%} {'more' if ratio > 1 else 'less'}"


def _size(row: Row) -> str:
    """Return a row's budget and what was measured at it.

    Where the input decides the total, in streaming, and where texts are shorter, other slots are held than it says.
    """
    budget, measured = row.budget, f"{kib(row.bytes_mean)} KiB measured"
    if isinstance(budget, int) and abs(row.slots - budget) > BYTES_TOLERANCE * budget:
        return f"a budget of {budget} slots per head ({row.slots:.1f} held, {measured})"
    if isinstance(budget, float):
        return f"{budget:.0%} of the tokens ({measured})"
    return f"{f'{row.slots:.0f}' if budget is None else budget} slots per head ({measured})"


def by_scenario(rows: Iterable[Row]) -> Iterable[tuple[tuple[str, str], list[Row]]]:
    """Yield the rows of every model and task: ((model, task), rows)."""
    for place, group in groupby(rows, key=lambda row: (row.model, row.task)):
        yield place, list(group)
