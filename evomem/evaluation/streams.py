"""Evaluation: managers on a memory that reads a stream of requests; the candidates are rows of one memory.

A read is right where the memory gives back the item's newest value. From it follow

* ``exact``: the share of reads that are right, which on a cache is its hit rate;
* ``loglik``: the mean log-likelihood of the value that was asked for, in nats a read, of a reader who believes the
  memory and guesses among the stream's items where it has nothing: p = (1 - ε)(w + (1 - W)/K) + ε/K with w the weight
  of slots that hold the value, W that of all slots that were read, K the number of items, and ε = `DOUBT`, so that a
  wrong value costs something finite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from evomem.errors import ConfigError, TaskError
from evomem.evaluation.byte_meter import Meter, head_memory
from evomem.evaluation.evaluator import Evaluator
from evomem.evaluation.measurement import LOGLIK, Evaluation, EvaluationProtocol, Measurement
from evomem.evaluation.measures import Draws
from evomem.evaluation.objectives.loglik import batches_alike, drawing
from evomem.evaluation.population import Deciding, PopulationPolicy
from evomem.evaluation.rollouts import RolloutPolicy, sample_number
from evomem.evaluation.sample_tokens import Reach, Tokens
from evomem.evaluation.store import Reading, Readings
from evomem.managers.allocation.probed import observes_heads
from evomem.managers.base import MemoryManager
from evomem.memory.explicit import ExplicitCache
from evomem.memory.kv.due import turns
from evomem.models import LoadedModel
from evomem.modes import outside_inference_mode
from evomem.tasks.base import Sample, Task
from evomem.tasks.streams.base import Stream, StreamTask

DOUBT = 0.01
"""ε: how often a reader takes what the memory says for wrong."""
MEASURED = frozenset({"loglik", "exact", "head_memory", "rollout"})
"""Quantities that mean something on a stream."""


def evaluator_of(
    loaded: LoadedModel, protocol: EvaluationProtocol | None = None, *, store: Readings | None = None
) -> Evaluator:
    """Return the evaluator of a model: of texts, or of streams where the model is a memory by itself."""
    kind = StreamEvaluator if reads_streams(loaded) else Evaluator
    return kind(loaded, protocol, store=store)


def reads_streams(loaded: LoadedModel) -> bool:
    """Whether a model is a memory that reads streams."""
    return bool(getattr(loaded.model, "reads_streams", False))


@dataclass
class _Score:
    """What reads have come to so far, for every row."""

    right: Tensor
    loglik: Tensor
    reads: int = 0

    def add(self, right: Tensor, probability: Tensor, reads: Tensor) -> None:
        """Add the reads among some requests: right and probability (rows, requests), reads (requests,) bool."""
        self.right = self.right + (right & reads).sum(-1).double()
        self.loglik = self.loglik + torch.where(reads, probability, 1.0).double().log().sum(-1)
        self.reads += int(reads.sum())


class StreamEvaluator(Evaluator):
    """Evaluates managers on streams of requests; see `Evaluator`.

    Parameters
    ----------
    loaded : a memory that reads streams (`evomem.models.architectures.pair_memory`).
    protocol : ``streaming``, with a decision every ``every`` requests: the memory holds up to so many pairs more than
        the budget before a decision.
    store : not used; what a memory reads depends on what it has kept.

    Raises
    ------
    ConfigError : another protocol: one decision at the end of a stream decides nothing.
    """

    def __init__(
        self, loaded: LoadedModel, protocol: EvaluationProtocol | None = None, *, store: Readings | None = None
    ) -> None:
        super().__init__(loaded, protocol, store=store)
        if self.protocol.kind != "streaming" or self.protocol.mode != "query_agnostic":
            raise ConfigError(
                f"protocol {self.protocol}: model {loaded.name!r} reads streams of requests, about which managers "
                "decide while they last; give --protocol streaming:1 (in an experiment protocol: {kind: streaming, "
                "every: 1}), or a larger number of requests between decisions"
            )

    @outside_inference_mode()
    @torch.no_grad()
    def evaluate(
        self,
        managers: Sequence[MemoryManager],
        sample: Sample,
        task: Task,
        measurement: Measurement = LOGLIK,
        draws: Draws | None = None,
    ) -> list[Evaluation]:
        """Measure every manager on one stream; see `Evaluator.evaluate`.

        Raises
        ------
        ConfigError : the task has no streams; something is measured that a stream does not have; a manager observes
            what this memory has not.
        """
        stream = self._stream_of(task, sample)
        if others := sorted({one.name for one in measurement.quantities} - MEASURED):
            raise ConfigError(
                f"measurement {', '.join(others)}: a stream has {', '.join(sorted(MEASURED))} only; take objective "
                "exact (the hit rate) or loglik"
            )
        if measurement.options("rollout").get("listens"):
            raise ConfigError(
                "fitness.reading: rewards for what is read are likelihoods of a text's tokens, and a stream has no "
                "text; leave it out"
            )
        for manager in managers:
            if observes_heads(manager):
                raise ConfigError(
                    f"manager {manager.name!r}: allocation {manager.allocation.name!r} looks at what attention heads "
                    f"do, and model {self.loaded.name!r} has none; take another allocation"
                )
        if "rollout" in measurement:
            return self._rollouts(managers, stream, sample, measurement, draws or Draws())
        ready = [self.scheduled(manager) for manager in managers]
        evaluations: dict[int, Evaluation] = {}
        for members in batches_alike(ready):
            begin = time.perf_counter()
            batch = self._run(PopulationPolicy([ready[i] for i in members]), stream, sample, measurement)
            seconds = (time.perf_counter() - begin) / len(members)
            for i, (values, rest) in zip(members, batch, strict=True):
                evaluations[i] = Evaluation(sample=sample.id, values=values, seconds=seconds, **rest)
        return [evaluations[i] for i in range(len(managers))]

    def _rollouts(
        self,
        managers: Sequence[MemoryManager],
        stream: Stream,
        sample: Sample,
        measurement: Measurement,
        draws: Draws,
    ) -> list[Evaluation]:
        """Return rollouts of one stochastic policy, each with decisions drawn by another seed."""
        older, other = (None if one is None else self.scheduled(one) for one in (draws.behaviour, draws.reference))
        manager = self.scheduled(drawing(managers, draws))
        policy = RolloutPolicy(manager, list(draws.seeds), sample_number(sample.id), older, other)
        begin = time.perf_counter()
        batch = self._run(policy, stream, sample, measurement)
        seconds = (time.perf_counter() - begin) / len(batch)
        return [
            Evaluation(sample=sample.id, values=values, seconds=seconds, steps=policy.steps(place), **rest)
            for place, (values, rest) in enumerate(batch)
        ]

    def _run(
        self, policy: Deciding, stream: Stream, sample: Sample, measurement: Measurement
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Feed a stream to one memory with a row a candidate; returns the values and sizes of every candidate."""
        model: Any = self.loaded.model
        cache: ExplicitCache = model.decided_cache(policy)
        requests = _Requests.of(stream, sample, model, policy.size)
        meter, every = Meter(policy), self.protocol.every
        nothing = torch.zeros(policy.size, dtype=torch.float64, device=model.device)
        score = _Score(nothing, nothing)
        held, at, steps = torch.zeros(policy.size, dtype=torch.float64), 0, 0
        for end, due in turns(0, len(stream), (0,), every):
            before = meter.bytes_by_row(cache) if at else torch.zeros(policy.size, dtype=torch.float64)
            requests.feed(cache, slice(at, end), score)
            meter.add(before, meter.bytes_by_row(cache), end - at)
            if any(due):
                cache.decide()
                held = held + torch.stack([counts.double().mean(-1) for counts in cache.slots_held()]).mean(0).cpu()
                steps += 1
            at = end
        memory = head_memory(cache, meter) if "head_memory" in measurement else [{}] * policy.size
        right, loglik = (score.right / score.reads).tolist(), (score.loglik / score.reads).tolist()
        slots = (held / steps).tolist() if steps else [float(len(stream))] * policy.size
        return [
            (
                {"loglik": loglik[i]} | ({"exact": right[i]} if "exact" in measurement else {}) | memory[i],
                {
                    "slots": slots[i],
                    "bytes_peak": float(meter.peak[i]),
                    "bytes_mean": float(meter.mean[i]),
                    "tokens": len(stream),
                },
            )
            for i in range(policy.size)
        ]

    # ---- what of a model of texts there is ------------------------------------------------------------------------

    def check_positions(self, samples: Sequence[Sample], *, exact: bool = False) -> Reach:
        """Return how long streams are: a memory has no positions."""
        return Reach(max((len(sample.context.split()) for sample in samples), default=0), None)

    def kv_heads(self) -> list[int]:
        """Return how many sets the memory has."""
        model: Any = self.loaded.model
        return [int(model.config.num_attention_heads)]

    def loglik_without_context(self, sample: Sample) -> float:
        """Log-likelihood of a reader without a memory, who guesses."""
        return -math.log(items_of(sample))

    def evaluate_plainly(
        self, manager: MemoryManager, sample: Sample, task: Task, measurement: Measurement = LOGLIK
    ) -> Evaluation:
        """One candidate alone: candidates of a batch do not see each other, so this is `evaluate`."""
        return self.evaluate([manager], sample, task, measurement)[0]

    def tokens(self, sample: Sample) -> Tokens:
        """Refuse; raises `ConfigError`."""
        self._refuse("tokens of a text")

    def reading(self, tokens: Tensor, observes: frozenset[str]) -> Reading:
        """Refuse; raises `ConfigError`."""
        self._refuse("a context that is read once for all")

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigError(
            f"model {self.loaded.name!r} reads streams of requests, and this needs {what}: a manager with statistics "
            "to calibrate, an oracle, traces and allocate are for language models"
        )

    def _stream_of(self, task: Task, sample: Sample) -> Stream:
        if not isinstance(task, StreamTask):
            raise ConfigError(
                f"task {task.name!r} is a text, and model {self.loaded.name!r} reads streams of requests; take a task "
                "of streams, such as zipf (evomem list tasks), or a language model"
            )
        stream = task.stream(sample)
        if not stream.reads.any():
            raise TaskError(f"sample {sample.id}: nothing is read in this stream, so there is nothing to measure")
        return stream


def items_of(sample: Sample) -> int:
    """Return how many items a stream's reader chooses among when it guesses; at least 2."""
    return max(2, int(sample.meta["items"]))


@dataclass(frozen=True)
class _Requests:
    """A stream as tensors: (rows, sets, requests, …), rows being the same one."""

    keys: Tensor
    values: Tensor
    names: Tensor
    marks: Tensor
    reads: Tensor
    writes: Tensor
    items: int

    @classmethod
    def of(cls, stream: Stream, sample: Sample, model: Any, rows: int) -> _Requests:
        """Return the requests of a stream for the sets of a memory."""
        device, dtype = model.device, model.dtype
        names, marks = (torch.from_numpy(part).to(device) for part in (stream.ids, stream.values))
        reads, writes = (torch.from_numpy(part).to(device) for part in (stream.reads, stream.writes))
        keys = torch.from_numpy(stream.keys).to(device, dtype)
        values = torch.from_numpy(stream.value_vectors).to(device, dtype)[marks]
        sets = model.sets(names)

        def wide(part: Tensor) -> Tensor:
            return part.expand(rows, len(sets), *part.shape)

        return cls(
            wide(keys), wide(values), wide(names), wide(marks),
            (sets & reads).expand(rows, -1, -1), (sets & writes).expand(rows, -1, -1), items_of(sample),
        )  # fmt: skip

    def feed(self, cache: ExplicitCache, part: slice, score: _Score) -> None:
        """Let a memory read some requests, and add what came back to the score."""
        memory: Any = cache.layers[0]
        names, marks, reads = (x[:, :, part] for x in (self.names, self.marks, self.reads))
        soft = memory.beta is not None
        read = memory.feed(
            self.keys[:, :, part], self.values[:, :, part], names,
            marks=marks, reads=reads, writes=self.writes[:, :, part], absent=True, wants_values=soft,
        )  # fmt: skip
        asked = reads.any(1)[0]
        if soft:
            same = read.marks[:, :, None] == marks[..., None]
            weight, total = (read.weights * same).sum((1, 3)), read.weights.sum((1, 3))
            right = _heaviest_mark(read.weights, read.marks).eq(marks).logical_and(reads).any(1)
        else:
            right = (read.mark == marks).logical_and(read.hit).any(1)
            weight, total = right.float(), read.hit.any(1).float()
        probability = (1 - DOUBT) * (weight + (1 - total).clamp(min=0) / self.items) + DOUBT / self.items
        score.add(right, probability, asked)


def _heaviest_mark(weights: Tensor, marks: Tensor) -> Tensor:
    """Return the mark whose slots weigh most together: weights (..., requests, slots), marks (..., slots).

    (..., requests) int64; -1 where nothing was read.
    """
    together = (marks[..., :, None] == marks[..., None, :]).float()
    by_mark = torch.matmul(weights, together)
    best = by_mark.max(-1)
    return torch.where(
        best.values > 0, marks[..., None, :].expand(by_mark.shape).gather(-1, best.indices[..., None])[..., 0], -1
    )
