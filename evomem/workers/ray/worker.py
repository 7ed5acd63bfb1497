"""Workers: what runs in a worker process: the model, put together around shared weights, and units evaluated."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from evomem.devices import let_go, memory_that_ended
from evomem.evaluation.measurement import Evaluation
from evomem.workers.context_exchange import SharedReadings, nbytes
from evomem.workers.units import Evaluate, Recipe, Unit

FETCH_SECONDS = 60.0
TRIM_SECONDS = 0.2
"""After so much work a worker gives freed memory back to the system, which takes a few milliseconds."""


@dataclass(frozen=True)
class Order:
    """A piece of work as it is sent.

    Attributes
    ----------
    unit : what to evaluate.
    candidate : the index of the only candidate to evaluate; None: all.
    offers : where readings of the unit's sample can be fetched, by key.
    """

    unit: Unit
    candidate: int | None = None
    offers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What came of an `Order`.

    Attributes
    ----------
    evaluations : one a candidate (one in all for an order with `candidate`), or None.
    error : what was raised.
    seconds : wall time.
    sizes : bytes of the readings that go with the answer, by key.
    """

    evaluations: list[Evaluation] | None
    error: Exception | None
    seconds: float
    sizes: dict[str, int]


class RayWorker:
    """An actor. One call evaluates a few orders, and returns answers and, apart, the contexts that had to be read.

    Parameters
    ----------
    shared : the reference to the recipe's parts, in a list so that Ray does not fetch it before this code runs.
    build : `Recipe.build`, pickled.
    threads : of the arithmetic.
    """

    def __init__(self, shared: Sequence[Any], build: bytes, threads: int) -> None:
        import ray
        import torch

        torch.set_num_threads(threads)
        self._ray = ray
        self._readings = SharedReadings(self._fetch)
        self._broken: Exception | None = None
        try:
            self._evaluate: Evaluate = pickle.loads(build)(ray.get(shared[0]), self._readings)
        except Exception as error:  # told by `where`, whole: of what is raised here, Ray would pass on a text only
            self._broken = portable(error)

    def _fetch(self, where: Any) -> Mapping[str, Any]:
        """Return the arrays of a reading: ``where`` is (reference to a call's readings, index of the order, key)."""
        reference, order, key = where
        arrays: Mapping[str, Any] = self._ray.get(reference, timeout=FETCH_SECONDS)[order][key]
        return arrays

    def where(self) -> dict[str, Any]:
        """Return this worker's process and machine; an answer says that it is ready, an error that it never will be."""
        if self._broken is not None:
            raise self._broken
        return {"pid": os.getpid(), "node": self._ray.get_runtime_context().get_node_id(), "host": os.uname().nodename}

    def evaluate(self, orders: Sequence[Order]) -> tuple[list[Answer], list[dict[str, Any]]]:
        """Return an answer an order, and an entry an order: what was read for it, as arrays."""
        answers, read = [], []
        for order in orders:
            answer, fresh = self._carry_out(order)
            answers.append(answer)
            read.append(fresh)
        if sum(answer.seconds for answer in answers) > TRIM_SECONDS:
            give_back()
        return answers, read

    def _carry_out(self, order: Order) -> tuple[Answer, dict[str, Any]]:
        begin = time.perf_counter()
        self._readings.offer(order.offers)
        try:
            evaluations: list[Evaluation] | None = self._evaluate(alone(order.unit, order.candidate))
            if order.candidate is not None and evaluations is not None:
                evaluations = [evaluations[order.candidate]]
            error = None
        except Exception as caught:
            evaluations, error = None, portable(caught)
            if memory_that_ended(caught) is not None:
                let_go(caught)  # so that a smaller unit finds room
        fresh = self._readings.give()
        sizes = {key: nbytes(arrays) for key, arrays in fresh.items()}
        return Answer(evaluations, error, time.perf_counter() - begin, sizes), fresh

    def memory(self) -> dict[str, int]:
        """Return bytes of this process: ``private`` (nobody else's), ``resident`` (with what it shares).

        Private is what Linux calls anonymous. Its other count, of pages that only one process has mapped, would also
        take in shared contexts that no other worker has happened to look at.
        """
        totals = {"Anonymous": 0, "Rss": 0}
        with open("/proc/self/smaps_rollup", encoding="ascii") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name in totals:
                    totals[name] = int(value.split()[0]) * 1024
        return {"private": totals["Anonymous"], "resident": totals["Rss"]}


def alone(unit: Unit, candidate: int | None) -> Unit:
    """Return the unit with one candidate, by its index, in every row.

    The candidate is tried alone in a batch of the same shape: another shape would move its numbers in the last digits.
    """
    if candidate is None or unit.vectors is None:
        return unit
    vectors = np.repeat(unit.vectors[candidate : candidate + 1], unit.candidates, axis=0)
    return replace(unit, vectors=vectors, seeds=np.repeat(unit.seeds[candidate : candidate + 1], unit.candidates))


def portable(error: Exception) -> Exception:
    """Return the error, or one that says the same, so that it can travel; its traceback goes along as a note."""
    error.add_note("in a worker:\n" + "".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def give_back() -> None:
    """Return freed memory to the system: the C library would keep the peak of every worker for itself."""
    with contextlib.suppress(OSError, AttributeError):  # there is no such call outside glibc
        ctypes.CDLL(None).malloc_trim(0)


def pickled(recipe: Recipe) -> bytes:
    """Return `Recipe.build` as bytes that another process can load, functions defined on the spot included."""
    from ray import cloudpickle

    dumps: Callable[[Any], bytes] = cloudpickle.dumps
    return dumps(recipe.build)
