"""Evaluation: candidates on one sample, as a batch, with the context read once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from evomem.cache import Decision, LayerView, SlotCache, attached
from evomem.evaluation.attention import FutureAttention, retained_attention
from evomem.evaluation.population import PopulationPolicy
from evomem.evaluation.store import PrefillStore, Reading, token_key
from evomem.evaluation.types import Evaluation, EvaluationProtocol
from evomem.managers.base import MemoryManager, Schedule
from evomem.models import LoadedModel
from evomem.tasks.base import Sample, Task


@dataclass(frozen=True)
class Recording:
    """A cache policy that only watches: it keeps everything and never decides."""

    observes: frozenset[str] = frozenset()
    schedule: Schedule = field(default_factory=Schedule)

    def decide(self, view: LayerView) -> Decision:
        """Keep everything."""
        return Decision(view.valid)


@dataclass(frozen=True)
class Tokens:
    """A sample in tokens, each (1, length) int64: what is read until the last decision, what is asked, the answer."""

    read: Tensor
    prompt: Tensor
    answer: Tensor


@dataclass
class _Bytes:
    """Peak and mean of the bytes of every row while tokens arrive one by one between two measurements."""

    peak: Tensor
    total: Tensor
    tokens: int = 0

    @classmethod
    def start(cls, rows: int) -> _Bytes:
        return cls(torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64))

    def grew(self, before: Tensor, after: Tensor, tokens: int) -> None:
        self.peak = torch.maximum(self.peak, after.double().cpu())
        self.total = self.total + (before + after).double().cpu() / 2 * tokens
        self.tokens += tokens


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
    """

    def __init__(
        self, loaded: LoadedModel, protocol: EvaluationProtocol | None = None, *, store: PrefillStore | None = None
    ) -> None:
        self.loaded = loaded
        self.protocol = protocol or EvaluationProtocol()
        self.store = store if store is not None else PrefillStore()
        self.future = FutureAttention()
        config = loaded.model.generation_config
        ends = getattr(config, "eos_token_id", None) if config is not None else None
        self._ends = {*(ends if isinstance(ends, list) else [ends]), loaded.tokenizer.eos_token_id} - {None}

    # ---- the fast way ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self,
        managers: Sequence[MemoryManager],
        sample: Sample,
        task: Task,
        *,
        exact: bool = False,
        attention: bool = False,
        observes: frozenset[str] = frozenset(),
    ) -> list[Evaluation]:
        """Evaluate every manager on one sample.

        ``exact`` also generates greedily and applies the task's metric. ``attention`` measures `Evaluation.heads`
        *instead* of the likelihood, without a model call (`evomem.evaluation.attention`). ``observes`` is recorded
        besides what the managers need, so that calls with other managers find the same reading in the store. Returns
        one `Evaluation` a manager, in order.
        """
        if not managers:
            return []
        if attention:
            return retained_attention(self, managers, sample)
        begin = time.perf_counter()
        tokens = self.tokens(sample)
        ready = [self.scheduled(manager) for manager in managers]
        with attached(self.loaded.model):
            if self.protocol.kind == "compress_once":
                cache, meter, read = self._compress(ready, tokens, observes)
            else:
                cache, meter, read = self._stream(ready, tokens)
            slots = torch.stack([held.float().mean(-1) for held in cache.slots_held()]).mean(0).tolist()
            texts = self._generate(cache.clone(), tokens, sample.max_new_tokens) if exact and task.has_exact else None
            before = cache.bytes_by_row()
            loglik = self._loglik(cache, tokens)
            asked = tokens.prompt.shape[1] + tokens.answer.shape[1] - 1
            meter.grew(before, cache.bytes_by_row(), asked)
        seconds = (time.perf_counter() - begin) / len(managers)
        mean = meter.total / meter.tokens
        return [
            Evaluation(
                sample=sample.id,
                loglik=loglik[i],
                exact=None if texts is None else task.score(sample, texts[i]),
                slots=slots[i],
                bytes_peak=float(meter.peak[i]),
                bytes_mean=float(mean[i]),
                tokens=asked + (read[0] if i == 0 else 0) + read[1],
                seconds=seconds,
            )
            for i in range(len(managers))
        ]

    def tokens(self, sample: Sample) -> Tokens:
        """Encode a sample; context, question and answer are encoded apart, so that no token straddles them."""
        context, question, answer = (self._encode(t) for t in (sample.context, sample.question, sample.answer))
        if self.protocol.mode == "query_aware":
            # One token of the question is left to ask with.
            return Tokens(torch.cat((context, question[:, :-1]), 1), question[:, -1:], answer)
        return Tokens(context, question, answer)

    def scheduled(self, manager: MemoryManager) -> MemoryManager:
        """Return the manager on the protocol's schedule."""
        every = None if self.protocol.kind == "compress_once" else self.protocol.every
        return manager if manager.schedule.every == every else manager.with_options(every=every)

    def watching(self, observes: frozenset[str]) -> Recording:
        """Return a cache policy that records and never decides."""
        return Recording(observes)

    def reading(self, tokens: Tensor, observes: frozenset[str]) -> Reading:
        """Return a context (1, length) as the model reads it, with observations; from the store if it is there."""
        names = ",".join(sorted(observes))
        key = f"{self.loaded.digest}/{self.loaded.model.dtype}/{token_key(tokens)}/{names}"
        return self.store.get(key, lambda: self._read(tokens, observes))

    def _read(self, tokens: Tensor, observes: frozenset[str]) -> Reading:
        with attached(self.loaded.model):
            cache = SlotCache.for_model(self.loaded.model, Recording(observes))
            cache.decides_after_forward = False
            self.forward(tokens, cache, 1)
        return Reading(tuple(layer.view() for layer in cache.layers), tokens.shape[1])

    def _compress(
        self, managers: Sequence[MemoryManager], tokens: Tokens, observes: frozenset[str]
    ) -> tuple[SlotCache, _Bytes, tuple[int, int]]:
        policy = PopulationPolicy(managers)
        misses = self.store.misses
        reading = self.reading(tokens.read, policy.observes | observes)
        cache = SlotCache.from_views(reading.views, Recording(), rows=len(managers), model=self.loaded.model)
        for layer, view in zip(cache.layers, reading.views, strict=True):
            layer.apply(policy.decide(view))
        read = reading.tokens if self.store.misses > misses else 0
        return cache, _Bytes.start(len(managers)), (read, 0)

    def _stream(self, managers: Sequence[MemoryManager], tokens: Tokens) -> tuple[SlotCache, _Bytes, tuple[int, int]]:
        """Read up to the first decision once, decide for all candidates, then go on with one row a candidate."""
        every, rows, length = self.protocol.every, len(managers), tokens.read.shape[1]
        policy, meter = PopulationPolicy(managers), _Bytes.start(len(managers))
        cache = SlotCache.for_model(self.loaded.model, Recording(policy.observes))
        cache.decides_after_forward = False
        shared = min(every, length)
        self.forward(tokens.read[:, :shared], cache, 1)
        for layer in cache.layers:
            view = layer.view()
            layer.expand(rows)
            if shared == every:
                layer.apply(policy.decide(view))
        cache.policy = policy
        meter.grew(torch.zeros(rows), torch.full((rows,), float(cache.bytes_per_token() * shared)), shared)
        for at in range(shared, length, every):
            end = min(length, at + every)
            before = cache.bytes_by_row()
            self.forward(tokens.read[:, at:end].expand(rows, -1), cache, 1)
            meter.grew(before, before + cache.bytes_per_token() * (end - at), end - at)
        return cache, meter, (shared, length - shared)

    # ---- answering ------------------------------------------------------------------------------------------------

    def _loglik(self, cache: SlotCache, tokens: Tokens) -> list[float]:
        """Mean log-likelihood of the answer's tokens, per row."""
        rows, count = cache.layers[0].slots.shape[0], tokens.answer.shape[1]
        fed = torch.cat((tokens.prompt, tokens.answer[:, :-1]), 1).expand(rows, -1)
        logits = self.forward(fed, cache, count)
        chosen = logits.float().log_softmax(-1).gather(-1, tokens.answer.expand(rows, -1)[..., None])[..., 0]
        means: list[float] = chosen.double().mean(1).tolist()
        return means

    def _generate(self, cache: SlotCache, tokens: Tokens, limit: int) -> list[str]:
        """Greedy continuation of the prompt, per row."""
        rows = cache.layers[0].slots.shape[0]
        following = self.forward(tokens.prompt.expand(rows, -1), cache, 1)[:, -1].argmax(-1)
        done = torch.zeros(rows, dtype=torch.bool, device=following.device)
        written: list[list[int]] = [[] for _ in range(rows)]
        for step in range(limit):
            for row, token in enumerate(following.tolist()):
                done[row] |= token in self._ends
                if not done[row]:
                    written[row].append(token)
            if bool(done.all()) or step == limit - 1:
                break
            following = self.forward(following[:, None], cache, 1)[:, -1].argmax(-1)
        return [str(self.loaded.tokenizer.decode(row, skip_special_tokens=True)) for row in written]

    def forward(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        """Logits of the last ``keep`` tokens: (rows, keep, vocabulary)."""
        # Indices, not a number: a slice of the hidden states is strided, and the head would run row by row.
        last = torch.arange(tokens.shape[1] - keep, tokens.shape[1], device=tokens.device)
        output = self.loaded.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=last)
        logits: Tensor = output.logits[:, -keep:]
        return logits

    def _encode(self, text: str) -> Tensor:
        ids = self.loaded.tokenizer.encode(text, add_special_tokens=False)
        return torch.tensor([ids], dtype=torch.int64, device=self.loaded.model.device)

    # ---- the plain way --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate_plainly(
        self, manager: MemoryManager, sample: Sample, task: Task, *, exact: bool = False
    ) -> Evaluation:
        """One candidate from an empty cache, through nothing but ``manager.attach``: what `evaluate` must equal."""
        begin = time.perf_counter()
        tokens, manager = self.tokens(sample), self.scheduled(manager)
        with manager.attach(self.loaded.model) as cache:
            with cache.reading():
                self.forward(tokens.read, cache, 1)
            held = cache.bytes_by_row()
            slots = float(torch.stack([s.float().mean() for s in cache.slots_held()]).mean())
            texts = self._generate(cache.clone(), tokens, sample.max_new_tokens) if exact and task.has_exact else None
            loglik = self._loglik(cache, tokens)[0]
        after = cache.bytes_by_row()
        asked = tokens.prompt.shape[1] + tokens.answer.shape[1] - 1
        streaming = self.protocol.kind == "streaming"
        return Evaluation(
            sample=sample.id,
            loglik=loglik,
            exact=None if texts is None else task.score(sample, texts[0]),
            slots=slots,
            bytes_peak=float(cache.bytes_peak if streaming else after[0]),
            bytes_mean=float(cache.bytes_mean if streaming else (held + after)[0] / 2),
            tokens=tokens.read.shape[1] + asked,
            seconds=time.perf_counter() - begin,
        )

    @torch.no_grad()
    def loglik_without_context(self, sample: Sample) -> float:
        """Mean log-likelihood of the answer when nothing but the question is read: what a task must beat."""
        tokens = Tokens(self._encode(""), self._encode(sample.question), self._encode(sample.answer))
        with attached(self.loaded.model):
            cache = SlotCache.for_model(self.loaded.model, Recording())
            fed = torch.cat((tokens.prompt, tokens.answer[:, :-1]), 1)
            logits = self.forward(fed, cache, tokens.answer.shape[1])
        chosen = logits.float().log_softmax(-1).gather(-1, tokens.answer[..., None])
        return float(chosen.double().mean())
