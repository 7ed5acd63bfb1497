"""Run: units evaluated once each: what the journal holds is taken from there, the rest goes to a worker pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from evomem.devices import out_of_memory
from evomem.errors import EvomemError, RunError
from evomem.evaluation.measurement import Evaluation
from evomem.runs.journal import Journal, Record, evaluations_of, unit_record
from evomem.tracking.base import logger
from evomem.workers.units import Unit, WorkerPool


class JournaledPool:
    """Evaluates units through a pool, once each: what the journal holds is taken from there.

    Parameters
    ----------
    journal : of the run.
    known : unit lines of the journal, by key; see `UnitEvaluator` for what they hold.
    """

    def __init__(self, pool: WorkerPool, journal: Journal, known: Iterable[Record]) -> None:
        self._pool = pool
        self._journal = journal
        self._warned: set[str] = set()
        self._known = {(record["key"], record["candidates"]): record for record in known}

    def evaluate(self, units: Sequence[Unit]) -> dict[str, list[Evaluation]]:
        """Return the evaluations of all units by key.

        Raises
        ------
        RunError : a unit failed on every attempt; a sample is no longer the one that the journal knows by its name.
            Errors of evomem itself are passed on at once.
        OutOfMemoryError : a unit does not fit into memory.
        """
        results: dict[str, list[Evaluation]] = {}
        missing = []
        for unit in units:
            record = self._known.get((unit.key, unit.digest))
            evaluations = None if record is None else self._of_journal(record, unit)
            if evaluations is None:
                missing.append(unit)
            else:
                results[unit.key] = evaluations
        attempts: Counter[str] = Counter()
        for outcome in self._pool.evaluate(missing):
            key = outcome.unit.key
            if outcome.error is None:
                for message, candidate in zip(outcome.quarantined, outcome.digests, strict=True):
                    if candidate not in self._warned:
                        logger.warning(message)
                        self._warned.add(candidate)
                    self._journal.event("quarantined", key=key, candidate=candidate, message=message)
                record = unit_record(outcome)
                self._journal.append(record)
                if outcome.unit.generation is None:  # units outside a generation are asked for again
                    self._known[key, outcome.unit.digest] = record
                results[key] = outcome.evaluations
                continue
            attempts[key] += 1
            self._journal.event(
                "attempt_failed",
                key=key,
                attempt=attempts[key],
                seconds=outcome.seconds,
                error=f"{type(outcome.error).__name__}: {outcome.error}",
            )
            if isinstance(outcome.error, EvomemError):
                raise outcome.error
            if not outcome.again:  # at first it is tried once more: another process may have had the memory
                ended = out_of_memory(outcome.error, f"unit {key} of {outcome.unit.candidates} candidates")
                if ended is not None:
                    raise ended
                raise RunError(
                    f"unit {key} failed {attempts[key]} times; the last time: "
                    f"{type(outcome.error).__name__}: {outcome.error}. "
                    "What is finished is kept: mend the cause and resume the run"
                ) from outcome.error
        return results

    def agrees(self, generation: int, candidates: set[str]) -> bool:
        """Whether the journal has evaluated some of these candidates in a generation, or nothing of it."""
        known = {
            digest
            for (_, digest), record in self._known.items()
            if record["generation"] == generation and record["phase"] == "train"
        }
        return not known or not known.isdisjoint(candidates)

    def _of_journal(self, record: Record, unit: Unit) -> list[Evaluation] | None:
        """Return what the journal says of a unit; None if it is damaged, so that the unit is evaluated again."""
        content = record.get("content", unit.sample.digest)  # older lines have none
        if content != unit.sample.digest:
            raise RunError(
                f"unit {unit.key}: sample {unit.sample.id} is another one than when it was evaluated ({content} -> "
                f"{unit.sample.digest}): the data of its task, or the package that makes it, has changed since the run "
                "began. Put it back to resume this run, or begin another one in another folder"
            )
        try:
            evaluations = evaluations_of(record, unit.measurement)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            evaluations = []
        if len(evaluations) != unit.candidates or any(one.sample != unit.sample.id for one in evaluations):
            message = f"journal.jsonl: the line of unit {unit.key} is damaged; it is evaluated again"
            logger.warning(message)
            self._journal.event("warning", message=message)
            return None
        return evaluations

    def forget(self, generation: int) -> None:
        """Drop what is known of generations up to this one; they do not come back."""
        self._known = {
            key: record
            for key, record in self._known.items()
            if record["generation"] is None or record["generation"] > generation
        }
