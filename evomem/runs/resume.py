"""Run: what a journal says of a search that goes on: its generations, its units, and who is quarantined."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from evomem.errors import RunError
from evomem.files.strict_json import as_float
from evomem.runs.journal import Record, measured
from evomem.tracking.base import GenerationRecord


def finished_generations(records: Iterable[Record]) -> dict[int, GenerationRecord]:
    """Return the summaries of the generations that a journal has, by number, the first one first."""
    generations = {r["generation"]: generation_record(r) for r in records if r["kind"] == "generation"}
    return dict(sorted(generations.items()))


def known_units(records: Iterable[Record], finished: int, warn: Callable[[str], None]) -> list[Record]:
    """Return the lines of a journal's units that a search may still ask for.

    What failed as a whole is evaluated again: the user has been told to mend the cause and resume. So is a unit of
    which two lines say different things: an evaluation has one result.

    Parameters
    ----------
    records : lines of the journal.
    finished : generations that the driver has learned from; their units are not asked for again.
    warn : told of lines that contradict each other.
    """
    units: list[Record] = []
    for record in records:
        if record["kind"] == "unit" and (record["generation"] is None or record["generation"] >= finished):
            units.append(record)
        elif record["kind"] == "event" and record["event"] == "all_failed":
            failed = (record["phase"], record["generation"])
            units = [unit for unit in units if (unit["phase"], unit["generation"]) != failed]
    lines: dict[tuple[str, str], list[Record]] = {}
    for unit in units:
        lines.setdefault((unit["key"], unit["candidates"]), []).append(unit)
    agreed = [_agreed(same, warn) for same in lines.values()]
    return [unit for unit in agreed if unit is not None]


def _agreed(units: list[Record], warn: Callable[[str], None]) -> Record | None:
    """Return the line of a unit that counts; None if there are several, and no two of them agree."""
    if len(units) == 1:
        return units[0]
    values = [repr(measured(unit)) for unit in units]
    most = max(range(len(units)), key=lambda index: values.count(values[index]))
    if len(set(values)) > 1:
        confirmed = values.count(values[most]) > 1
        what = "what two of them say counts" if confirmed else "it is evaluated again"
        warn(f"journal.jsonl: lines of unit {units[0]['key']} say different things; {what}")
        if not confirmed:
            return None
    return units[most]


def quarantined(records: Iterable[Record]) -> list[str]:
    """Return the digests of candidates that ended their workers in earlier processes of this run."""
    return [r["candidate"] for r in records if r["kind"] == "event" and r["event"] == "quarantined"]


def generation_record(record: Record) -> GenerationRecord:
    """Return the `GenerationRecord` of a journal line."""
    floats = ("best", "mean", "spread", "noise", "sigma", "seconds")
    try:
        return GenerationRecord(
            generation=record["generation"],
            stage=record["stage"],
            fitness=tuple(as_float(value) for value in record["fitness"]),
            failed=record["failed"],
            diagnostics={name: as_float(value) for name, value in record.get("diagnostics", {}).items()},
            evaluations=record["evaluations"],
            tokens=record["tokens"],
            **{name: as_float(record[name]) for name in floats},
        )
    except KeyError as error:
        raise RunError(f"journal.jsonl: a generation line has no {error}") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RunError(f"journal.jsonl: a generation line is damaged: {error}") from None
