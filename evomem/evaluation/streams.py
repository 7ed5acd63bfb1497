"""Evaluation: managers on a memory that reads a stream of requests; the candidates are rows of one memory.

A read is right where the memory gives back the item's newest value. From it follow

* ``exact``: the share of reads that are right, which on a cache is its hit rate;
* ``loglik``: the mean log-likelihood of the value that was asked for, in nats a read, of a reader who believes the
  memory and guesses among the stream's items where it has nothing: p = (1 - ε)(w + (1 - W)/K) + ε/K with w the weight
  of slots that hold the value, W that of all slots that were read, K the number of items, and ε = `DOUBT`
  (`evomem.evaluation.stream_requests`), so that a wrong value costs something finite.

A policy gradient may credit every decision with the reads until the next one (``fitness.reading``): the reward is then
the share of them that are right.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from evomem.errors import ConfigError, TaskError
from evomem.evaluation.byte_meter import Meter, head_memory
from evomem.evaluation.evaluator import Evaluator
from evomem.evaluation.measurement import LOGLIK, Evaluation, EvaluationProtocol, Measurement, Step
from evomem.evaluation.measures import Draws
from evomem.evaluation.objectives.loglik import WITHOUT_CONTEXT, batches_alike, drawing
from evomem.evaluation.population import Deciding, PopulationPolicy
from evomem.evaluation.rollouts import rollout_policy
from evomem.evaluation.sample_tokens import Reach, Tokens
from evomem.evaluation.store import Reading, Readings
from evomem.evaluation.stream_requests import Requests, Score, items_of
from evomem.managers.allocation.probed import observes_heads
from evomem.managers.base import MemoryManager
from evomem.memory.explicit import ExplicitCache
from evomem.memory.kv.due import turns
from evomem.models import LoadedModel
from evomem.tasks.base import Sample, Task
from evomem.tasks.streams.base import Stream, StreamTask

ROWS = 256
"""Rows of a memory that are read side by side, unless more managers are measured on one stream."""
PIECE = 64
"""Requests that are fed at once, at most: what that takes grows with their number times the pairs held."""
MEASURED = frozenset({"loglik", "exact", "head_memory", "rollout", WITHOUT_CONTEXT})
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

    def check_protocol(self) -> None:
        """Raise `ConfigError` unless managers decide while a stream lasts."""
        if self.protocol.kind != "streaming" or self.protocol.mode != "query_agnostic":
            raise ConfigError(
                f"protocol {self.protocol}: model {self.loaded.name!r} reads streams of requests, about which managers "
                "decide while they last; give --protocol streaming:1 (in an experiment protocol: {kind: streaming, "
                "every: 1}), or a larger number of requests between decisions"
            )

    def samples_at_once(self, managers: int) -> int:
        """Return how many streams are read side by side: rows of one memory, at most `ROWS`."""
        return max(1, ROWS // managers) if managers else 1

    def on_samples(
        self,
        managers: Sequence[MemoryManager],
        samples: Sequence[Sample],
        task: Task,
        measurement: Measurement,
        draws: Draws,
    ) -> list[list[Evaluation]]:
        """Measure every manager on every stream, each pair of them a row of one memory.

        Raises
        ------
        ConfigError : the task has no streams; something is measured that a stream does not have; a manager observes
            what this memory has not; a stream is over before a decision has mattered.
        """
        self._check(managers, measurement)
        streams = [self._stream_of(task, sample) for sample in samples]
        if (shortest := min(map(len, streams))) <= self.protocol.every:
            raise ConfigError(
                f"protocol {self.protocol}: a stream of {shortest} requests ends before a decision has mattered, so "
                "every manager would be measured as the full memory; decide more often: "
                f"streaming:{max(1, shortest // 2)} or less, or take longer streams"
            )
        if len({len(stream) for stream in streams}) > 1:  # rows end together
            return [self.on_samples(managers, [sample], task, measurement, draws)[0] for sample in samples]
        run = partial(self._run, streams, samples, measurement)
        if "rollout" in measurement:
            policy = rollout_policy(self, drawing(managers, draws), samples, draws, measurement)
            return run(policy, steps=policy.steps)
        ready = [self.scheduled(manager) for manager in managers]
        evaluations: list[dict[int, Evaluation]] = [{} for _ in samples]
        for members in batches_alike(ready):
            batch = run(PopulationPolicy([ready[i] for _ in samples for i in members]))
            for by_manager, of_sample in zip(evaluations, batch, strict=True):
                by_manager.update(zip(members, of_sample, strict=True))
        return [[by_manager[i] for i in range(len(managers))] for by_manager in evaluations]

    def _check(self, managers: Sequence[MemoryManager], measurement: Measurement) -> None:
        if others := sorted({one.name for one in measurement.quantities} - MEASURED):
            raise ConfigError(
                f"measurement {', '.join(others)}: a stream has {', '.join(sorted(MEASURED))} only; take objective "
                "exact (the hit rate) or loglik"
            )
        for manager in managers:
            self._require_forgetting(manager)
            self._require_no_heads(manager)

    def _run(
        self,
        streams: Sequence[Stream],
        samples: Sequence[Sample],
        measurement: Measurement,
        policy: Deciding,
        steps: Callable[[int], tuple[Step, ...]] | None = None,
    ) -> list[list[Evaluation]]:
        """Feed streams to one memory, whose rows are those of the policy: as many for each stream, one after another.

        steps : returns the drawn decisions of a row.
        """
        begin, model = time.perf_counter(), cast(Any, self.loaded.model)
        cache: ExplicitCache = model.decided_cache(policy)
        each, length = policy.size // len(samples), len(streams[0])
        requests = Requests.of(streams, samples, model, each)
        meter, every = Meter(policy), self.protocol.every
        score = Score.of(policy.size, model.device)
        held, at, decisions = torch.zeros(policy.size, dtype=torch.float64), 0, 0
        after = torch.zeros(policy.size, dtype=torch.float64)
        for end, due in turns(0, length, (0,), every):
            right, reads = score.right, score.reads
            before = after if at == 0 else meter.bytes_by_row(cache)
            for begun in range(at, end, PIECE):
                requests.feed(cache, slice(begun, min(begun + PIECE, end)), score)
            policy.observe_rewards(score.right - right, score.reads - reads)
            after = meter.bytes_by_row(cache)
            meter.add(before, after, end - at)
            if any(due):
                cache.decide()
                held = held + torch.stack([counts.double().mean(-1) for counts in cache.slots_held()]).mean(0).cpu()
                decisions += 1
            at = end
        memory = head_memory(cache, meter) if "head_memory" in measurement else [{}] * policy.size
        nothing = WITHOUT_CONTEXT in measurement
        hit_rates, logliks = (score.right / score.reads).tolist(), (score.loglik / score.reads).tolist()
        slots = (held / decisions).tolist() if decisions else [float(length)] * policy.size
        rows = [
            Evaluation(
                sample=samples[row // each].id,
                values={"loglik": logliks[row]}
                | ({"exact": hit_rates[row]} if "exact" in measurement else {})
                | ({WITHOUT_CONTEXT: self.loglik_without_context(samples[row // each])} if nothing else {})
                | memory[row],
                seconds=(time.perf_counter() - begin) / policy.size,
                slots=slots[row],
                bytes_peak=float(meter.peak[row]),
                bytes_mean=float(meter.mean[row]),
                tokens=length,
                steps=None if steps is None else steps(row),
            )
            for row in range(policy.size)
        ]
        return [rows[first : first + each] for first in range(0, policy.size, each)]

    # ---- what of a model of texts there is ------------------------------------------------------------------------

    def check_positions(self, samples: Sequence[Sample], *, exact: bool = False) -> Reach:
        """Return how long streams are: a memory has no positions."""
        return Reach(max(map(self.length_of, samples), default=0), None)

    def refusal(self, manager: MemoryManager) -> str:
        """Return why the memory cannot be decided about by a manager; "" if it can."""
        try:
            self._require_forgetting(manager)
            self._require_no_heads(manager)
        except ConfigError as error:
            return str(error)
        return super().refusal(manager)

    def _require_no_heads(self, manager: MemoryManager) -> None:
        if observes_heads(manager):
            raise ConfigError(
                f"manager {manager.name!r}: allocation {manager.allocation.name!r} looks at what attention heads do, "
                f"and model {self.loaded.name!r} has none; take another allocation"
            )

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

    def length_of(self, sample: Sample) -> int:
        """Return how many requests a sample has."""
        return len(sample.context.split())

    def tokens(self, sample: Sample) -> Tokens:
        """Refuse; raises `ConfigError`."""
        self._refuse("tokens of a text")

    def reading(self, tokens: Tensor, observes: frozenset[str]) -> Reading:
        """Refuse; raises `ConfigError`."""
        self._refuse("a context that is read once for all")

    def _require_forgetting(self, manager: MemoryManager) -> None:
        """Raise `ConfigError` if a manager lets slots fade and the memory's reads do not depend on that."""
        if manager.forgets and self.loaded.model.config.beta is None:
            raise ConfigError(
                f"manager {manager.name!r} lets slots fade, and model {self.loaded.name!r} is read by names, which "
                "finds a slot however far it has faded; leave out its action forget, or take the model pair-memory-soft"
            )

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigError(
            f"model {self.loaded.name!r} reads streams of requests, and this needs {what}: a manager with statistics "
            "to calibrate, an oracle, traces and allocate are for language models (kv_policy has none with scale=head)"
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
