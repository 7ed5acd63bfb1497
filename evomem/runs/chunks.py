"""Run: how many candidates are evaluated as one batch: chosen once by measurement, and halved where memory ends.

A batch's shape moves results in the last digits, so its size is part of the run: what was chosen is an event of the
journal, and so is every halving, with the phase and generation from which on it counts. A resumed run and its workers
take the sizes from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from evomem.devices import CURES
from evomem.drivers.base import Population
from evomem.errors import OutOfMemoryError
from evomem.runs.journal import Record
from evomem.workers.units import digest

DEFAULT = 32
"""Candidates of a batch on the processor, and where nothing can be measured."""
EVENT = "chunk"
_PHASES = ("train", "oracle", "reference", "select", "check", "sealed")


@dataclass(frozen=True)
class Chunk:
    """A number of candidates that are one batch from a phase of a generation on.

    Attributes
    ----------
    size : candidates.
    phase, generation : see `evomem.workers.units.Unit`; None both: from the beginning.
    """

    size: int
    phase: str | None = None
    generation: int | None = None

    def begins(self) -> tuple[float, int]:
        """Return what orders these by when they begin."""
        if self.phase is None:
            return -1, 0
        place = _PHASES.index(self.phase) if self.phase in _PHASES else len(_PHASES)
        return math.inf if self.generation is None else self.generation, place


class Chunks:
    """The sizes of a run's batches.

    Parameters
    ----------
    known : what was chosen and halved so far; the first one counts from the beginning.
    note : told of a halving, with its reason.
    """

    def __init__(self, known: Iterable[Chunk], note: Callable[[Chunk, str], None] = lambda chunk, reason: None) -> None:
        self._known = list(known) or [Chunk(DEFAULT)]
        self._note = note

    def at(self, phase: str, generation: int | None) -> int:
        """Return how many candidates are a batch in a phase (of a generation)."""
        now = Chunk(0, phase, generation).begins()
        return min(chunk.size for chunk in self._known if chunk.begins() <= now)

    @property
    def sizes(self) -> list[int]:
        """Return all sizes so far, the first one first."""
        return [chunk.size for chunk in self._known]

    def halve(self, phase: str, generation: int | None, candidates: int, error: OutOfMemoryError) -> None:
        """Take half of the batch from here on.

        Parameters
        ----------
        candidates : of the largest batch that there was.

        Raises
        ------
        OutOfMemoryError : there is one candidate a batch already.
        """
        size = min(self.at(phase, generation), candidates)
        if size <= 1:
            raise OutOfMemoryError(
                f"{error} One candidate alone does not fit. {CURES[error.memory]} Then resume the run", error.memory
            ) from error
        chunk = Chunk(size // 2, phase, generation)
        self._known.append(chunk)
        self._note(chunk, str(error))


def chunks_of(
    records: Iterable[Record], size: int | None, note: Callable[[Chunk, str], None] = lambda chunk, reason: None
) -> Chunks:
    """Return the sizes that a journal tells of; of a run without such events, ``size`` from the beginning."""
    known = [
        Chunk(int(record["chunk"]), record.get("phase"), record.get("generation"))
        for record in records
        if record["kind"] == "event" and record["event"] == EVENT
    ]
    if not known or known[0].phase is not None:
        known.insert(0, Chunk(size or DEFAULT))
    return Chunks(known, note)


def digests(population: Population, size: int) -> set[str]:
    """Return what the journal calls the candidates of a population, a batch each of ``size`` (`Unit.digest`)."""
    parts = [slice(begin, begin + size) for begin in range(0, len(population.vectors), size)]
    return {digest(population.vectors[part], population.seeds[part]) for part in parts}
