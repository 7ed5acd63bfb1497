"""Report: what a comparison measured, as tables for a terminal, as Markdown, and as a file of rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from rich.table import Table
from rich.text import Text

from evomem.errors import EvomemError
from evomem.evaluation.rows import BYTES_TOLERANCE, Budget, Row
from evomem.files.atomic import write_atomically
from evomem.report.sentences import (
    AnyRow,
    best_heuristic,
    best_on_net,
    by_scenario,
    first_subjects,
    kib,
    sentences,
    signed_span,
)
from evomem.runs.folder_reading import of_shape, read_json

FEW = 10
"""Samples below which a bootstrap interval is not to be trusted: it can only be made of the values that are there."""

_COLUMNS = (
    "manager", "loglik", "advantage", "net", "net advantage", "exact", "slots", "min-max", "total", "KiB", "recovered",
)  # fmt: skip
_OF_WORDS = ("manager", "advantage", "net advantage", "total", "advantage [95 %]", "net advantage [95 %]")
_INTERVAL = " [95 %]"


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as a JSON list."""
    write_atomically(path, rows_json(rows).encode())


def samples_file(path: Path) -> Path:
    """Return the file of a comparison's samples, beside its rows."""
    return path.with_name(f"{path.stem}.samples.jsonl")


def partial_file(output: str | None) -> Path | None:
    """Return the file in which finished samples wait for the rest."""
    return None if output is None or output == "-" else Path(f"{output}.partial.jsonl")


def repriced_samples(output: str | None, price_per_megabyte: float | None) -> Path | None:
    """Return the samples of a finished comparison whose rows have another price: they need not be measured again.

    None where there are no rows, or rows of this very price: then a repetition is wanted.
    """
    if output is None or output == "-":
        return None
    path = Path(output)
    try:
        rows: list[Row] = read_rows(path) if path.exists() else []
    except EvomemError:  # damaged rows are replaced
        return None
    other = any(row.price_per_megabyte != price_per_megabyte for row in rows)
    return samples_file(path) if other else None


def keep_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows, and give the finished samples their final name: ``rows.json`` and ``rows.samples.jsonl``."""
    write_rows(path, rows)
    partial = partial_file(str(path))
    if partial is not None and partial.exists():
        partial.replace(samples_file(path))


def rows_json(rows: Sequence[Row]) -> str:
    """Return rows as a JSON list, one row a line."""
    lines = ",\n".join(json.dumps(row.to_json(), ensure_ascii=False, allow_nan=False) for row in rows)
    return f"[\n{lines}\n]\n"


def read_rows(path: Path, kind: type[AnyRow] = Row) -> list[AnyRow]:  # type: ignore[assignment]
    """Return the rows that `write_rows` wrote; raise `RunError` if the file is damaged."""
    cure = "delete it to compare again"
    with of_shape(path, cure):
        rows = read_json(path, cure)
        if not isinstance(rows, list):
            raise TypeError(f"a list of rows is expected, this is {type(rows).__name__}")
        return [checked_row(kind.from_json(data)) for data in rows]


def checked_row(row: AnyRow) -> AnyRow:
    """Return a row of a file; raise `TypeError` where a field is not of the kind that tables and pictures show."""
    texts = (row.model, row.task, row.manager, row.protocol, row.split, row.role)
    numbers = (row.loglik, row.bytes_peak, row.bytes_mean, row.slots, row.seconds)
    maybe = (
        row.score, row.difference, row.difference_score, row.bytes_ratio, row.recovered, row.budget,
        row.price_per_megabyte, row.net, row.net_difference, row.repeated_tokens,
    )  # fmt: skip
    spans = (row.interval, row.interval_score, row.interval_loglik, row.net_interval, row.total_range)
    named = isinstance(row.floor, str | None)
    if not named or not all(isinstance(text, str) for text in texts) or type(row.samples) is not int:
        raise TypeError("names are texts, and samples a number")
    if not all(map(_is_number, numbers)) or not all(value is None or _is_number(value) for value in maybe):
        raise TypeError("a number is none")
    for span in spans:
        if span is not None and not (isinstance(span, list) and len(span) == 2 and all(map(_is_number, span))):
            raise TypeError("an interval is two numbers")
    for heads in (row.head_slots, row.head_bytes):
        if heads is not None and not _is_table(heads):
            raise TypeError("heads have a number each, layer by layer")
    return row


def _is_table(value: object) -> bool:
    """Whether a value is a list of layers, each a list of one number a head."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(layer, list) and bool(layer) and all(map(_is_number, layer)) for layer in value)
    )


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value != value or abs(value) < 1e300


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return one table per model and task, a section per budget, the best first, the subject highlighted."""
    made = []
    for (model, task), group in by_scenario(rows):
        first = group[0]
        table = Table(
            title=f"{task} on {model}, {first.protocol}, {first.samples} {first.split} samples",
            title_justify="left", title_style="bold", header_style="dim", expand=False,
        )  # fmt: skip
        headings = _headings(group)
        for heading in ("budget", *headings):
            # On a narrow terminal words go on in the next line; a number is never cut.
            words = heading in _OF_WORDS
            table.add_column(
                heading, justify="left" if heading == "manager" else "right", no_wrap=not words, overflow="fold"
            )
        for budget, section in groupby(group, key=lambda row: row.budget):
            members = list(section)
            best = best_heuristic(members) if members[0].net is None else best_on_net(members)
            for place, row in enumerate(members):
                cells = [budget_text(budget) if place == 0 else "", *_cells(row, headings)]
                style = "bold green" if row.role == "subject" else "cyan" if row is best else ""
                table.add_row(*[Text(cell) for cell in cells], style=style)
            table.add_section()
        made.append(table)
    return made


def notes(rows: Sequence[Row]) -> list[str]:
    """Return what a reader of the table must know: what the columns mean, and whose memory is not equal."""
    lines = []
    if any(row.difference is not None for row in rows):
        subject = first_subjects(rows)[0].manager
        spread = "95 % paired bootstrap" if any(row.interval is not None for row in rows) else "of one sample"
        several = len({row.budget for row in rows if row.manager == subject}) > 1
        full = " (full: at its largest budget)" * (several and any(row.role == "full" for row in rows))
        text = f"loglik: nats per answer token. advantage: of {subject} over the row{full}, {spread}."
        for price in dict.fromkeys(row.price_per_megabyte for row in rows if row.price_per_megabyte is not None):
            text += f" net: loglik - {price:g} for every 10^6 bytes of the sample's mean memory."
        if any(row.recovered is not None for row in rows):
            text += f" recovered: share of what {_floors(rows)} loses."
        if any(row.head_slots is not None for row in rows):
            text += " slots: mean per KV head; min-max: over heads; total: of all heads, after the context"
            text += " (fewest-most of a sample)." if any(_totals_differ(row) for row in rows) else "."
        lines.append(text)
    for name, task, count in dict.fromkeys((r.manager, r.task, r.repeated_tokens) for r in rows if r.repeated_tokens):
        lines.append(f"{name} on {task}: before it decides, {count:,.0f} tokens are read again after the context.")
    for prefix in dict.fromkeys(row.prefix for row in rows if row.prefix):
        lines.append(f"Before every context stands {prefix}, as the tokenizer puts it before every text.")
    for (model, task), group in by_scenario(rows):
        remarks, count = [group[0].remark] if group[0].remark else [], group[0].samples
        if count == 1:
            remarks.append("of 1 sample there is no interval")
        elif count < FEW:
            remarks.append(f"an interval of {count} samples says little: it is too narrow as often as not")
        if remarks:
            lines.append(f"{task} on {model}: {'; '.join(remarks)}.")
    for task, model, longest, positions in dict.fromkeys(
        (row.task, row.model, row.longest, row.positions) for row in rows if row.positions is not None
    ):
        lines.append(
            f"{task} on {model}: samples of up to {longest:,} tokens, but the model was made for {positions:,} "
            "positions; it was not trained for later ones."
        )
    chats = dict.fromkeys(f"{row.task} on {row.model}" for row in rows if row.chat_template)
    if chats:
        lines.append(f"Asked in the words of the model's chat template: {', '.join(chats)}.")
    unequal = [row for row in rows if row.role != "full" and row.bytes_ratio is not None and not row.equal_bytes]
    if unequal:
        limit = f"{BYTES_TOLERANCE:.0%}"
        lines.append(f"*: measured memory differs from the subject's by more than {limit}.")
    return lines


def _floors(rows: Sequence[Row]) -> str:
    """Return what `Row.recovered` starts from; rows of before do not say it, and mean ``random``."""
    names = list(dict.fromkeys(row.floor or "random" for row in rows if row.recovered is not None))
    if names == ["random"]:
        return "random eviction"
    return f"the best trivial manager of the budget ({', '.join(names)})"


def markdown(rows: Sequence[Row], title: str = "Comparison") -> str:
    """Return the tables, notes and sentences as Markdown."""
    lines = [f"# {title}", ""]
    for sentence in sentences(rows):
        lines += [sentence, ""]
    for (model, task), group in by_scenario(rows):
        first = group[0]
        lines += [f"## {task} on {model}, {first.protocol}, {first.samples} {first.split} samples", ""]
        headings = _headings(group)
        lines += ["| budget | " + " | ".join(headings) + " |", "|---:|---" + "|---:" * (len(headings) - 1) + "|"]
        for row in group:
            cells = [cell.replace("|", r"\|") for cell in _cells(row, headings)]
            if row.role == "subject":
                cells[0] = f"**{cells[0]}**"
            lines.append(f"| {budget_text(row.budget)} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [note.replace("*:", r"\*:") for note in notes(rows)]
    return "\n".join(lines) + "\n"


def budget_text(budget: Budget) -> str:
    """Return a budget as it stands in tables."""
    return "-" if budget is None else str(budget)


def _headings(rows: Sequence[Row]) -> list[str]:
    """Return the columns in which any row says something; one sample has no interval."""
    empty = {
        "advantage": all(row.difference is None for row in rows),
        "net": all(row.net is None for row in rows),
        "net advantage": all(row.net_difference is None for row in rows),
        "exact": all(row.score is None for row in rows),
        "recovered": all(row.recovered is None for row in rows),
        "min-max": not any(_heads_differ(row) for row in rows),
        "total": all(row.head_slots is None for row in rows),
    }
    interval = _INTERVAL if any(row.interval is not None for row in rows) else ""
    return [name + interval * name.endswith("advantage") for name in _COLUMNS if not empty.get(name, False)]


def _cells(row: Row, headings: Sequence[str]) -> list[str]:
    """Return a row's text in the columns of some headings."""
    mark = "*" if row.role != "full" and row.bytes_ratio is not None and not row.equal_bytes else ""
    cells = {
        "manager": row.manager,
        "loglik": f"{row.loglik:.3f}",
        "advantage": _advantage(row.difference, row.interval),
        "net": "" if row.net is None else f"{row.net:.3f}",
        "net advantage": _advantage(row.net_difference, row.net_interval),
        "exact": "" if row.score is None else f"{row.score:.3f}",
        "slots": f"{row.slots:.1f}",
        "min-max": _range(row),
        "total": _total(row),
        "KiB": kib(row.bytes_mean) + mark,
        "recovered": "" if row.recovered is None else f"{row.recovered:.2f}",
    }
    return [cells[heading.removesuffix(_INTERVAL)] for heading in headings]


def _advantage(difference: float | None, interval: Sequence[float] | None) -> str:
    return "" if difference is None else f"{difference:+.3f} {signed_span(interval)}".rstrip()


def _total(row: Row) -> str:
    """Return the slots of all heads, mean over samples, with the fewest and most of a sample where they differ."""
    if row.head_slots is None:
        return ""
    mean = f"{sum(map(sum, row.head_slots)):,.0f}"
    if not _totals_differ(row) or row.total_range is None:
        return mean
    fewest, most = row.total_range
    return f"{mean} ({fewest:,.0f}-{most:,.0f})"


def _totals_differ(row: Row) -> bool:
    return row.total_range is not None and round(row.total_range[0]) != round(row.total_range[1])


def _heads_differ(row: Row) -> bool:
    return len({count for layer in row.head_slots or () for count in layer}) > 1


def _range(row: Row) -> str:
    """Return the slots of the head with the fewest and of the one with the most."""
    counts = [count for layer in row.head_slots or () for count in layer]
    if not counts:
        return ""
    least, most = f"{min(counts):.0f}", f"{max(counts):.0f}"
    return least if least == most else f"{least}-{most}"
