"""Evaluation: candidates on one sample, as a batch, with the context read once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from evomem.devices import devices_of, stacked
from evomem.errors import ConfigError, UnsupportedModelError
from evomem.evaluation.byte_meter import Meter, head_memory
from evomem.evaluation.future import FutureAttention, KnownSamples
from evomem.evaluation.greedy import greedy_texts
from evomem.evaluation.likelihood import mean_loglik
from evomem.evaluation.measurement import LOGLIK, Evaluation, EvaluationProtocol, Measurement
from evomem.evaluation.measures import Draws, run_measures
from evomem.evaluation.population import Deciding, Recording
from evomem.evaluation.reference import evaluate_plainly, loglik_without_context
from evomem.evaluation.sample_tokens import Reach, SampleEncoder, Tokens, warn_of_undecided
from evomem.evaluation.store import PrefillStore, Reading, Readings, token_key
from evomem.managers.allocation.base import Allocation
from evomem.managers.allocation.probed import on_model
from evomem.managers.base import MemoryManager
from evomem.memory import SlotCache, attached
from evomem.memory.kv.attach import has_own_memory
from evomem.memory.kv.due import check_heads, decisions, turns
from evomem.memory.kv.parallel import degree
from evomem.memory.kv.policy import CachePolicy, wanted_of
from evomem.memory.kv.versions import passed
from evomem.memory.observations.repeated_attention import REPEATED
from evomem.memory.view import LayerView
from evomem.models import LoadedModel
from evomem.modes import outside_inference_mode
from evomem.tasks.base import Sample, Task
from evomem.tasks.streams.base import StreamTask

__all__ = ["Evaluator", "Reach", "Tokens"]

AnyManager = TypeVar("AnyManager", bound=MemoryManager)


class Evaluator:
    """Evaluates managers on samples of a task.

    Parameters
    ----------
    loaded : the frozen model and its tokenizer.
    protocol : when the manager decides, and whether it sees the question (`EvaluationProtocol`).
    store : contexts that were read; give one to share it between evaluators of the same model.

    Notes
    -----
    ``compress_once`` reads a context once for all candidates and generations; a candidate then costs its own decision,
    one gather, and the question's and answer's tokens as a row of a batch. In ``streaming`` the candidates share what
    is read up to the first decision. `evaluate_plainly` is the plain way to the same numbers, one candidate at a time.

    Readings are kept, and gradients may be taken through them later. So nothing is read in `torch.inference_mode`, even
    where the caller is in it.
    """

    def __init__(
        self, loaded: LoadedModel, protocol: EvaluationProtocol | None = None, *, store: Readings | None = None
    ) -> None:
        self.loaded = loaded
        self.protocol = protocol or EvaluationProtocol()
        self.check_protocol()
        self.store: Readings = store if store is not None else PrefillStore()
        self.future = FutureAttention()
        self.traces: KnownSamples | None = None
        self.sample_encoder = SampleEncoder(loaded, query_aware=self.protocol.mode == "query_aware")
        self.encoder = self.sample_encoder.texts
        self.known_rollouts: OrderedDict[tuple[object, ...], list[Evaluation]] = OrderedDict()
        self._one_device = len(devices_of(loaded.model)) <= 1
        if degree(loaded.model) > 1:
            raise UnsupportedModelError(
                f"model {loaded.name!r} is split over {degree(loaded.model)} processes (tensor parallel), each of "
                "which would measure its own part; spread it by layers instead (device_map)"
            )
        config = loaded.model.generation_config
        ends = getattr(config, "eos_token_id", None) if config is not None else None
        self.end_tokens = {*(ends if isinstance(ends, list) else [ends]), loaded.tokenizer.eos_token_id} - {None}

    def check_protocol(self) -> None:
        """Raise `ConfigError` for a protocol that means nothing for what the model reads; texts are read under all."""

    # ---- the fast way ---------------------------------------------------------------------------------------------

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
        """Measure every manager on one sample.

        Parameters
        ----------
        measurement : what is measured.
        draws : seeds and other policies, for what is measured of random decisions.

        Returns
        -------
        One `Evaluation` a manager, in order.
        """
        return self.on_samples(managers, [sample], task, measurement, draws or Draws())[0]

    @outside_inference_mode()
    @torch.no_grad()
    def evaluate_together(
        self,
        managers: Sequence[MemoryManager],
        samples: Sequence[Sample],
        task: Task,
        measurement: Measurement = LOGLIK,
        draws: Draws | None = None,
    ) -> list[list[Evaluation]]:
        """Return per sample what `evaluate` does, up to the rounding of batches of `samples_at_once` samples."""
        size, draws = max(1, self.samples_at_once(len(managers))), draws or Draws()
        parts = [samples[begin : begin + size] for begin in range(0, len(samples), size)]
        return [one for part in parts for one in self.on_samples(managers, part, task, measurement, draws)]

    def samples_at_once(self, managers: int) -> int:
        """Return how many samples so many managers are measured on as one batch; 1 where every sample is one."""
        return 1

    def on_samples(
        self,
        managers: Sequence[MemoryManager],
        samples: Sequence[Sample],
        task: Task,
        measurement: Measurement,
        draws: Draws,
    ) -> list[list[Evaluation]]:
        """Measure managers on samples, which `evaluate` and `evaluate_together` ask for; override this."""
        if isinstance(task, StreamTask):
            raise ConfigError(
                f"task {task.name!r} is a stream of requests to a memory, no text for a language model; measure it on "
                "one that reads streams: --model pair-memory (in an experiment model: {name: pair-memory})"
            )
        model = self.loaded.model
        managers, draws = on_model(managers, model), draws.for_model(model)
        return [run_measures(self, managers, sample, task, measurement, draws) for sample in samples]

    def answer(
        self, policy: Deciding, tokens: Tokens, sample: Sample, task: Task, measurement: Measurement
    ) -> list[Evaluation]:
        """Return every candidate's evaluation: read, decide and answer, the candidates as rows of one batch.

        The likelihood is always measured, the exact metric if the measurement has it. The caller attaches the model.
        """
        meter = Meter(policy)
        if self.protocol.kind == "compress_once":
            cache, tokens_shared, tokens_each = self._compress(policy, tokens, measurement.observes)
        else:
            cache, tokens_shared, tokens_each = self._stream(policy, tokens, meter)
        slots = stacked([counts.float().mean(-1) for counts in cache.slots_held()]).mean(0).tolist()
        memory = head_memory(cache, meter) if "head_memory" in measurement else [{}] * policy.size
        texts: list[str] | None = None
        # A row of a file may be of likelihood only.
        generates = "exact" in measurement and task.has_exact and sample.max_new_tokens > 0
        decides_once, length_decided = self.protocol.kind == "compress_once", cache.get_seq_length()
        if generates and not decides_once:  # decisions while it answers cannot be taken back: on a copy
            texts, generated = self.generate(cache.clone(), policy.independent_copy(), tokens, sample.max_new_tokens)
            tokens_each += generated
        fed = torch.cat((tokens.prompt, tokens.answer[:, :-1]), 1).expand(policy.size, -1)
        loglik = mean_loglik(self._feed(fed, cache, tokens.answer.shape[1], policy, meter), tokens.answer)
        tokens_each += fed.shape[1]
        if generates and decides_once:  # a copy would hold what every candidate kept a second time
            cache.crop(length_decided)
            texts, generated = self.generate(cache, policy, tokens, sample.max_new_tokens)
            tokens_each += generated
        return [
            Evaluation(
                sample=sample.id,
                values={"loglik": loglik[i]}
                | ({} if texts is None else {"exact": task.score(sample, texts[i])})
                | memory[i],
                slots=slots[i],
                bytes_peak=float(meter.peak[i]),
                bytes_mean=float(meter.mean[i]),
                tokens=tokens_each + (tokens_shared if i == 0 else 0),
            )
            for i in range(policy.size)
        ]

    def tokens(self, sample: Sample) -> Tokens:
        """Return a sample in tokens; see `SampleEncoder.tokens`."""
        return self.sample_encoder.tokens(sample)

    def length_of(self, sample: Sample) -> int:
        """Return how many tokens a sample has, those that are fed: all but the answer's last."""
        tokens = self.tokens(sample)
        return tokens.read.shape[1] + tokens.prompt.shape[1] + tokens.answer.shape[1] - 1

    def check_positions(self, samples: Sequence[Sample], *, exact: bool = False) -> Reach:
        """Compare samples with the positions that the model has; see `SampleEncoder.check_positions`.

        Warns of samples that end before a decision falls due: all that is measured on them is the full memory.
        """
        if self.protocol.kind == "streaming":
            warn_of_undecided({sample.id: self.length_of(sample) for sample in samples}, self.protocol)
        return self.sample_encoder.check_positions(samples, exact=exact)

    def refusal(self, manager: MemoryManager) -> str:
        """Return why the model's memory cannot be decided about by a manager; "" if it can.

        What a manager observes may mean nothing in this memory, or its allocation be of heads that this model has not.
        """
        model: Any = self.loaded.model
        policy = Recording(manager.observes)
        try:
            if has_own_memory(model):
                model.decided_cache(policy)
            else:
                wanted_of(policy)
                if REPEATED in manager.observes and self.protocol.kind != "compress_once":
                    return (
                        f"observation {REPEATED!r} is of a context that is read a second time before anything is "
                        f"decided, and under {self.protocol} decisions come while it is read; give --protocol "
                        "compress_once"
                    )
            counts = self.kv_heads()
            check_heads(manager, counts)
            parts = on_model([manager], model)[0].modules()
            return next(filter(None, (p.refusal(counts) for p in parts if isinstance(p, Allocation))), "")
        except (ConfigError, UnsupportedModelError) as error:
            return str(error)

    def scheduled(self, manager: AnyManager) -> AnyManager:
        """Return the manager on the protocol's schedule."""
        every = None if self.protocol.kind == "compress_once" else self.protocol.every
        return manager if manager.schedule.every == every else manager.with_options(every=every)

    def recording_policy(self, observes: frozenset[str]) -> Recording:
        """Return a cache policy that records and never decides."""
        return Recording(observes)

    @outside_inference_mode()
    def reading(self, tokens: Tensor, observes: frozenset[str]) -> Reading:
        """Return a context (1, length) as the model reads it, with observations; from the store if it is there."""
        names = ",".join(sorted(observes))
        key = f"{self.loaded.digest}/{self.loaded.model.dtype}/{token_key(tokens)}/{names}"
        return self.store.get(key, lambda: self._read(tokens, observes))

    def _read(self, tokens: Tensor, observes: frozenset[str]) -> Reading:
        if has_own_memory(self.loaded.model):
            raise ConfigError(
                f"model {self.loaded.name!r} has a memory of its own, about which managers decide while it reads: what "
                "it reads depends on what was kept, and is not read once for all; give --protocol streaming:1 (in an "
                "experiment protocol: {kind: streaming, every: 1}), or a larger number of tokens between decisions"
            )
        return self._read_all(tokens, observes)

    def repetition(self, tokens: Tensor) -> Tensor:
        """Return what is read after a context (1, length) to repeat it; see `SampleEncoder.repetition`."""
        return self.sample_encoder.repetition(tokens)

    @outside_inference_mode()
    @torch.no_grad()
    def all_kept(self, tokens: Tensor, observes: frozenset[str]) -> tuple[LayerView, ...]:
        """Return what a manager sees of every layer after a context (1, length) of which everything is kept."""
        if has_own_memory(self.loaded.model):
            return self._read_all(tokens, observes).views
        return self.reading(tokens, observes).views

    def _read_all(self, tokens: Tensor, observes: frozenset[str]) -> Reading:
        with attached(self.loaded.model):
            cache = SlotCache.for_model(self.loaded.model, Recording(observes))
            cache.decides_after_forward = False
            self.forward(tokens, cache, 1)
            if REPEATED in observes:
                cache.repeat(self.repetition(tokens))
        return Reading(tuple(layer.view() for layer in cache.layers), tokens.shape[1])

    @outside_inference_mode()
    @torch.no_grad()
    def kv_heads(self) -> list[int]:
        """Return how many KV heads every layer has, as managers see them; one token is read to find out."""
        with attached(self.loaded.model):
            cache = SlotCache.for_model(self.loaded.model, Recording())
            cache.decides_after_forward = False
            self.forward(self.sample_encoder.ids([0]), cache, 1)
        return [int(layer.view().slots.shape[1]) for layer in cache.layers]

    def _compress(self, policy: Deciding, tokens: Tokens, observes: frozenset[str]) -> tuple[SlotCache, int, int]:
        """Take the context from the store, or read it; decide for all candidates.

        Returns the cache, the tokens that were read for all together, and those that every candidate read by itself.
        """
        misses = self.store.misses
        reading = self.reading(tokens.read, policy.observes | observes)
        cache = SlotCache.from_views(reading.views, Recording(), rows=policy.size, model=self.loaded.model)
        for layer, decision in zip(cache.layers, decisions(policy, reading.views), strict=True):
            layer.apply(decision)
        again = self.repetition(tokens.read).shape[1] if REPEATED in policy.observes | observes else 0
        return cache, reading.tokens + again if self.store.misses > misses else 0, 0

    def _stream(self, policy: Deciding, tokens: Tokens, meter: Meter) -> tuple[SlotCache, int, int]:
        """Read up to the first decision once, decide for all, then read on with one row a candidate.

        Returns as `_compress`.
        """
        cache = SlotCache.for_model(self.loaded.model, Recording(policy.observes))
        cache.decides_after_forward = False
        length = tokens.read.shape[1]
        shared = min(self.protocol.every, length)
        self._feed(tokens.read[:, :shared], cache, 1, policy, meter)
        for layer in cache.layers:
            if len(layer.starts) < policy.size:  # no decision was due
                layer.expand(policy.size)
        if shared < length:
            rest = tokens.read[:, shared:].expand(policy.size, -1)
            self._feed(rest, cache, 1, policy, meter, wants_logits=policy.wants_logits)
        return cache, shared, length - shared

    def _feed(
        self, fed: Tensor, cache: SlotCache, keep: int, policy: Deciding, meter: Meter, *, wants_logits: bool = False
    ) -> Tensor:
        """Return the logits of the last ``keep`` of the tokens ``fed`` (rows, length); decide where it is due.

        The model is called once a piece between decisions, because bytes are at their peak just before one. With
        ``wants_logits`` the policy is shown how likely the tokens of every piece after the first decision are.
        """
        begin, length = cache.get_seq_length(), fed.shape[1]
        logits, at = [], 0
        for end, due in turns(begin, length, (0,), policy.schedule.every):
            logits_kept = max(0, end - max(at, length - keep))
            before = meter.bytes_by_row(cache) if begin + at else torch.zeros(1, dtype=torch.float64)
            shows = wants_logits and begin + at > 0 and end - at > 1
            scores = self.forward(fed[:, at:end], cache, end - at if shows else max(logits_kept, 1))
            meter.add(before, meter.bytes_by_row(cache), end - at)
            if shows:
                policy.observe_logits(scores[:, :-1], fed[:, at + 1 : end].expand(scores.shape[0], -1))
            if logits_kept:
                logits.append(scores[:, -logits_kept:])
            if any(due):
                self._decide(cache, policy)
            at = end
        return logits[0] if len(logits) == 1 else torch.cat(logits, 1)

    def forward_in_pieces(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        """Return what `forward` does; one pass a piece where the cache decides only at the end of a pass.

        So a manager that decides about all layers at once decides when the protocol says, like every other.
        """
        every, begin, length = cache.policy.schedule.every, cache.get_seq_length(), tokens.shape[1]
        logits, at = [], 0
        for end, _ in turns(begin, length, (0,), every if cache.whole_model else None):
            logits_kept = max(0, end - max(at, length - keep))
            scores = self.forward(tokens[:, at:end], cache, max(logits_kept, 1))
            if logits_kept:
                logits.append(scores)
            at = end
        return logits[0] if len(logits) == 1 else torch.cat(logits, 1)

    def _decide(self, cache: SlotCache, policy: Deciding) -> None:
        check_heads(policy, (layer.slots.shape[1] for layer in cache.layers))
        if policy.whole_model:
            views = [layer.view() for layer in cache.layers]
            made = policy.decide_all(views)
            del views
            for layer, decision in zip(cache.layers, made, strict=True):
                if len(layer.starts) < policy.size:
                    layer.expand(policy.size)
                layer.apply(decision)
            return
        for layer in cache.layers:
            view = layer.view()
            if len(layer.starts) < policy.size:
                layer.expand(policy.size)
            layer.apply(policy.decide(view))

    # ---- answering ------------------------------------------------------------------------------------------------

    def generate(self, cache: SlotCache, policy: CachePolicy, tokens: Tokens, limit: int) -> tuple[list[str], int]:
        """Return the greedy continuation of the prompt per row, and how many tokens a row was fed."""
        return greedy_texts(self, cache, policy, tokens, limit)

    def forward(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        """Return the logits of the last ``keep`` tokens: (rows, keep, vocabulary)."""
        # Indices, not a number: a slice of the hidden states is strided, and the head would run row by row.
        first = tokens.shape[1] - keep
        last: Any = torch.arange(first, tokens.shape[1], device=tokens.device)
        if not self._one_device:  # the last hidden states lie elsewhere than the tokens; plain numbers serve anywhere
            last = list(range(first, tokens.shape[1]))
        output = self.loaded.model(
            input_ids=tokens, use_cache=True, logits_to_keep=last, **passed(cache, self.loaded.model)
        )
        logits: Tensor = output.logits[:, -keep:]
        return logits

    def without_context(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Return question and answer in tokens, without the context; see `SampleEncoder.without_context`."""
        return self.sample_encoder.without_context(sample)

    # ---- the plain way --------------------------------------------------------------------------------------------

    def evaluate_plainly(
        self, manager: MemoryManager, sample: Sample, task: Task, measurement: Measurement = LOGLIK
    ) -> Evaluation:
        """One candidate from an empty cache: what `evaluate` must equal (`evomem.evaluation.reference`)."""
        return evaluate_plainly(self, manager, sample, task, measurement)

    def loglik_without_context(self, sample: Sample) -> float:
        """Mean log-likelihood of the answer when nothing but the question is read: what a task must beat."""
        return loglik_without_context(self, sample)
