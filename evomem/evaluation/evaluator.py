"""Evaluation: candidates on one sample, as a batch, with the context read once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from evomem.devices import devices_of, stacked
from evomem.errors import TaskError, UnsupportedModelError
from evomem.evaluation.byte_meter import Meter
from evomem.evaluation.future import FutureAttention, KnownSamples
from evomem.evaluation.likelihood import mean_loglik
from evomem.evaluation.measurement import LOGLIK, Evaluation, EvaluationProtocol, Measurement
from evomem.evaluation.measures import Draws, measured
from evomem.evaluation.population import Deciding, Recording
from evomem.evaluation.reference import evaluate_plainly, loglik_without_context
from evomem.evaluation.store import PrefillStore, Reading, Readings, token_key
from evomem.files.strict_json import shown
from evomem.managers.base import MemoryManager
from evomem.memory import SlotCache, attached
from evomem.memory.kv.cache import CachePolicy
from evomem.memory.kv.due import decisions, turns
from evomem.memory.kv.parallel import degree
from evomem.memory.kv.positions import beyond, position_limit
from evomem.memory.kv.versions import passed
from evomem.models import LoadedModel
from evomem.modes import outside_inference_mode
from evomem.tasks.base import Sample, Task
from evomem.tasks.encoding import TextEncoder

AnyManager = TypeVar("AnyManager", bound=MemoryManager)


@dataclass(frozen=True)
class Tokens:
    """A sample in tokens, each (1, length) int64: what is read until the last decision, what is asked, the answer."""

    read: Tensor
    prompt: Tensor
    answer: Tensor


def _needed(tokens: Tokens, following: int) -> int:
    """Return the positions that it takes to read a sample and ``following`` tokens, the last of which is not fed."""
    return tokens.read.shape[1] + tokens.prompt.shape[1] + following - 1


@dataclass(frozen=True)
class Reach:
    """How far samples reach.

    Attributes
    ----------
    longest : tokens of the longest sample, generated ones included.
    limit : positions that the model was made for, if that is fewer; else None.
    """

    longest: int
    limit: int | None


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

    What is read is kept, and gradients may be taken of it later: so nothing is read in `torch.inference_mode`, also
    where the caller is in it.
    """

    def __init__(
        self, loaded: LoadedModel, protocol: EvaluationProtocol | None = None, *, store: Readings | None = None
    ) -> None:
        self.loaded = loaded
        self.protocol = protocol or EvaluationProtocol()
        self.store: Readings = store if store is not None else PrefillStore()
        self.future = FutureAttention()
        self.traces: KnownSamples | None = None
        self.encoder = TextEncoder(loaded.tokenizer)
        self.drawn: OrderedDict[tuple[object, ...], list[Evaluation]] = OrderedDict()
        self._vocabulary: int | None = None
        with suppress(NotImplementedError):  # a model that reads no texts has no table of words
            self._vocabulary = getattr(loaded.model.get_input_embeddings(), "num_embeddings", None)
        self._one_device = len(devices_of(loaded.model)) <= 1
        if degree(loaded.model) > 1:
            raise UnsupportedModelError(
                f"model {loaded.name!r} is split over {degree(loaded.model)} processes (tensor parallel), each of "
                "which would measure its own part; spread it by layers instead (device_map)"
            )
        config = loaded.model.generation_config
        ends = getattr(config, "eos_token_id", None) if config is not None else None
        self._ends = {*(ends if isinstance(ends, list) else [ends]), loaded.tokenizer.eos_token_id} - {None}

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
        return measured(self, managers, sample, task, measurement, draws or Draws())

    def answered(
        self, policy: Deciding, tokens: Tokens, sample: Sample, task: Task, measurement: Measurement
    ) -> list[Evaluation]:
        """Read, decide and answer, the policy's candidates as rows of one batch.

        The likelihood is always measured, the exact metric if it is asked for. Managers are attached by the caller.
        """
        meter = Meter(policy)
        if self.protocol.kind == "compress_once":
            cache, shared, own = self._compress(policy, tokens, measurement.observes)
        else:
            cache, shared, own = self._stream(policy, tokens, meter)
        slots = stacked([held.float().mean(-1) for held in cache.slots_held()]).mean(0).tolist()
        texts: list[str] | None = None
        # A row of a file may be of likelihood only.
        writes = "exact" in measurement and task.has_exact and sample.max_new_tokens > 0
        once, decided = self.protocol.kind == "compress_once", cache.get_seq_length()
        if writes and not once:  # decisions while it answers cannot be taken back: on a copy
            texts, generated = self.generate(cache.clone(), policy.aside(), tokens, sample.max_new_tokens)
            own += generated
        asked = torch.cat((tokens.prompt, tokens.answer[:, :-1]), 1).expand(policy.size, -1)
        loglik = mean_loglik(self._feed(asked, cache, tokens.answer.shape[1], policy, meter), tokens.answer)
        own += asked.shape[1]
        if writes and once:  # a copy would hold what every candidate kept a second time
            cache.crop(decided)
            texts, generated = self.generate(cache, policy, tokens, sample.max_new_tokens)
            own += generated
        return [
            Evaluation(
                sample=sample.id,
                values={"loglik": loglik[i]} | ({} if texts is None else {"exact": task.score(sample, texts[i])}),
                slots=slots[i],
                bytes_peak=float(meter.peak[i]),
                bytes_mean=float(meter.mean[i]),
                tokens=own + (shared if i == 0 else 0),
            )
            for i in range(policy.size)
        ]

    def tokens(self, sample: Sample) -> Tokens:
        """Encode a sample; context, question and answer are encoded apart, so that no token straddles them.

        Before the context stands, once, what the tokenizer puts before every text (`TextEncoder.prefix`), so that what
        is measured is what ``tokenizer(text)`` gives in use; in a chat, the template's beginning (`Sample.head`).

        Something must be asked with: the question; in ``query_aware`` mode its last token, because the others are read
        before the decision; the context's last token if there is no question.

        Raises
        ------
        TaskError : nothing is left to read, there is no answer, or the model has no positions for so many tokens.
        """
        encoder, head = self.encoder, len(self.encoder.head(sample))
        context = self._ids(encoder.context(sample))
        question, answer = (self._ids(encoder.following(text)) for text in (sample.question, sample.answer))
        if self.protocol.mode == "query_aware" or not question.shape[1]:
            whole = torch.cat((context, question), 1)
            read, prompt = whole[:, :-1], whole[:, -1:]
        else:
            read, prompt = context, question
        for name, tokens in (("context", read.shape[1] - head), ("answer", answer.shape[1])):
            if tokens < 1:
                raise TaskError(
                    f"sample {sample.id}: its {name} has no token; give every sample a context and an answer"
                )
        found = Tokens(read, prompt, answer)
        self._require_positions(sample, found, answer.shape[1], "the answer")
        return found

    def check_positions(self, samples: Sequence[Sample], *, exact: bool = False) -> Reach:
        """Compare what samples need with the positions that the model has, before anything is measured.

        Parameters
        ----------
        exact : whether text will be generated too, up to `Sample.max_new_tokens`.

        Raises
        ------
        TaskError : a sample is longer than a model with a table of positions can read. Rotary models go on, at
            positions that they were not trained for; the return value tells of it.
        """
        longest = 0
        for sample in samples:
            tokens = self.tokens(sample)
            following = tokens.answer.shape[1]
            if exact and sample.max_new_tokens:
                following = max(following, sample.max_new_tokens)
                self._require_positions(sample, tokens, sample.max_new_tokens, "the text that is generated")
            longest = max(longest, _needed(tokens, following))
        limit = position_limit(self.loaded.model)
        return Reach(longest, None if limit is None or longest <= limit.tokens else limit.tokens)

    def _require_positions(self, sample: Sample, tokens: Tokens, following: int, what: str) -> None:
        limit, needed = position_limit(self.loaded.model), _needed(tokens, following)
        if limit is None or not limit.learned or needed <= limit.tokens:
            return
        raise TaskError(
            f"sample {shown(sample.id)}: {needed:,} tokens (context and question {_needed(tokens, 1):,}, then {what}), "
            f"but {beyond(self.loaded.model, limit)}. Ask for a shorter length (the option length of the task), a "
            "smaller max_new_tokens, or take a model with rotary positions"
        )

    def scheduled(self, manager: AnyManager) -> AnyManager:
        """Return the manager on the protocol's schedule."""
        every = None if self.protocol.kind == "compress_once" else self.protocol.every
        return manager if manager.schedule.every == every else manager.with_options(every=every)

    def watching(self, observes: frozenset[str]) -> Recording:
        """Return a cache policy that records and never decides."""
        return Recording(observes)

    @outside_inference_mode()
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

    @outside_inference_mode()
    @torch.no_grad()
    def kv_heads(self) -> list[int]:
        """Return how many KV heads every layer has, as managers see them: read one token, and keep nothing of it."""
        with attached(self.loaded.model):
            cache = SlotCache.for_model(self.loaded.model, Recording())
            cache.decides_after_forward = False
            self.forward(self._ids([0]), cache, 1)
        return [int(layer.view().slots.shape[1]) for layer in cache.layers]

    def _compress(self, policy: Deciding, tokens: Tokens, observes: frozenset[str]) -> tuple[SlotCache, int, int]:
        """Read, or take what was read; decide for all. Returns the cache, tokens read for all, tokens read by each."""
        misses = self.store.misses
        reading = self.reading(tokens.read, policy.observes | observes)
        cache = SlotCache.from_views(reading.views, Recording(), rows=policy.size, model=self.loaded.model)
        for layer, decision in zip(cache.layers, decisions(policy, reading.views), strict=True):
            layer.apply(decision)
        return cache, reading.tokens if self.store.misses > misses else 0, 0

    def _stream(self, policy: Deciding, tokens: Tokens, meter: Meter) -> tuple[SlotCache, int, int]:
        """Read up to the first decision once, decide for all, then go on with one row a candidate. As `_compress`."""
        cache = SlotCache.for_model(self.loaded.model, Recording(policy.observes))
        cache.decides_after_forward = False
        length = tokens.read.shape[1]
        shared = min(self.protocol.every, length)
        self._feed(tokens.read[:, :shared], cache, 1, policy, meter)
        for layer in cache.layers:
            if layer.slots.shape[0] < policy.size:  # no decision was due
                layer.expand(policy.size)
        if shared < length:
            rest = tokens.read[:, shared:].expand(policy.size, -1)
            self._feed(rest, cache, 1, policy, meter, listens=policy.listens)
        return cache, shared, length - shared

    def _feed(
        self, fed: Tensor, cache: SlotCache, keep: int, policy: Deciding, meter: Meter, *, listens: bool = False
    ) -> Tensor:
        """Logits of the last ``keep`` of the tokens ``fed`` (rows, length); decides where it is due, and measures.

        The model is called once a piece between decisions, because bytes are at their peak just before one. With
        ``listens`` the policy hears how likely what it reads is, which takes the logits of all tokens of a piece.
        """
        begin, length = cache.get_seq_length(), fed.shape[1]
        logits, at = [], 0
        for end, due in turns(begin, length, (0,), policy.schedule.every):
            wanted = max(0, end - max(at, length - keep))
            before = meter.held(cache) if begin + at else torch.zeros(1, dtype=torch.float64)
            hears = listens and begin + at > 0 and end - at > 1
            scores = self.forward(fed[:, at:end], cache, end - at if hears else max(wanted, 1))
            meter.grew(before, meter.held(cache), end - at)
            if hears:
                policy.heard(scores[:, :-1], fed[:, at + 1 : end].expand(scores.shape[0], -1))
            if wanted:
                logits.append(scores[:, -wanted:])
            if any(due):
                self._decide(cache, policy)
            at = end
        return logits[0] if len(logits) == 1 else torch.cat(logits, 1)

    def in_turns(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        """As `forward`; in one pass a piece between decisions, where the cache makes them at the end of a pass only.

        So a manager that decides about all layers at once decides when the protocol says, like all others.
        """
        every, begin, length = cache.policy.schedule.every, cache.get_seq_length(), tokens.shape[1]
        logits, at = [], 0
        for end, _ in turns(begin, length, (0,), every if cache.whole_model else None):
            wanted = max(0, end - max(at, length - keep))
            scores = self.forward(tokens[:, at:end], cache, max(wanted, 1))
            if wanted:
                logits.append(scores)
            at = end
        return logits[0] if len(logits) == 1 else torch.cat(logits, 1)

    def _decide(self, cache: SlotCache, policy: Deciding) -> None:
        if policy.whole_model:
            views = [layer.view() for layer in cache.layers]
            made = policy.decide_all(views)
            del views
            for layer, decision in zip(cache.layers, made, strict=True):
                if layer.slots.shape[0] < policy.size:
                    layer.expand(policy.size)
                layer.apply(decision)
            return
        for layer in cache.layers:
            view = layer.view()
            if layer.slots.shape[0] < policy.size:
                layer.expand(policy.size)
            layer.apply(policy.decide(view))

    # ---- answering ------------------------------------------------------------------------------------------------

    def generate(self, cache: SlotCache, policy: CachePolicy, tokens: Tokens, limit: int) -> tuple[list[str], int]:
        """Greedy continuation of the prompt, per row, and the tokens that a row took; the cache goes on with them."""
        most = position_limit(self.loaded.model)
        if most is not None and most.learned and _needed(tokens, limit) > most.tokens:
            raise TaskError(
                f"max_new_tokens {limit:,} after {_needed(tokens, 1):,} tokens: {beyond(self.loaded.model, most)}; ask "
                "for fewer"
            )
        cache.policy = policy  # decides while it answers
        rows = cache.layers[0].slots.shape[0]
        following = self.in_turns(tokens.prompt.expand(rows, -1), cache, 1)[:, -1].argmax(-1)
        fed = tokens.prompt.shape[1]
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
            fed += 1
        return [str(self.loaded.tokenizer.decode(row, skip_special_tokens=True)) for row in written], fed

    def forward(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        """Logits of the last ``keep`` tokens: (rows, keep, vocabulary)."""
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

    def _ids(self, ids: list[int]) -> Tensor:
        size = self._vocabulary
        if size is not None and ids and max(ids) >= size:
            raise TaskError(
                f"token {max(ids):,} ({self.loaded.tokenizer.decode([max(ids)])!r}) is beyond the {size:,} that model "
                f"{self.loaded.name!r} has embeddings of; its tokenizer belongs to another model"
            )
        return torch.tensor([ids], dtype=torch.int64, device=self.loaded.model.device)

    def without_context(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Tokens of the question by itself, as the beginning of a text, and of the answer: each (1, length) int64."""
        asked = self._ids(self.encoder.without_context(sample))
        return asked, self._ids(self.encoder.following(sample.answer))

    # ---- the plain way --------------------------------------------------------------------------------------------

    def evaluate_plainly(
        self, manager: MemoryManager, sample: Sample, task: Task, measurement: Measurement = LOGLIK
    ) -> Evaluation:
        """One candidate from an empty cache: what `evaluate` must equal (`evomem.evaluation.reference`)."""
        return evaluate_plainly(self, manager, sample, task, measurement)

    def loglik_without_context(self, sample: Sample) -> float:
        """Mean log-likelihood of the answer when nothing but the question is read: what a task must beat."""
        return loglik_without_context(self, sample)
