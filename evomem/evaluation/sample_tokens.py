"""Evaluation: a sample in tokens, and whether the model has positions for them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from evomem.errors import TaskError
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.files.strict_json import shown
from evomem.memory.kv.positions import beyond, position_limit
from evomem.models import LoadedModel
from evomem.tasks.base import Sample
from evomem.tasks.encoding import TextEncoder

logger = logging.getLogger("evomem")

REQUEST = "\n\nRepeat the previous context exactly."
"""What stands before a context that is repeated (KVzip, arXiv 2505.23416)."""


@dataclass(frozen=True)
class Tokens:
    """A sample in tokens, each (1, length) int64.

    Attributes
    ----------
    read : what is read before the question, until the last decision of ``compress_once``.
    prompt : what is asked.
    answer : the answer.
    """

    read: Tensor
    prompt: Tensor
    answer: Tensor


def positions_needed(tokens: Tokens, following: int) -> int:
    """Return how many positions a sample and ``following`` tokens take; the last of these is not fed."""
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


class SampleEncoder:
    """Encodes samples for a model.

    Parameters
    ----------
    loaded : the model, its tokenizer and its device.
    query_aware : whether the question is read before the decision (`EvaluationProtocol.mode`).

    Attributes
    ----------
    texts : the encoder of single texts.
    """

    def __init__(self, loaded: LoadedModel, query_aware: bool) -> None:
        self._loaded = loaded
        self._query_aware = query_aware
        self.texts = TextEncoder(loaded.tokenizer)
        self._vocabulary: int | None = None
        with suppress(NotImplementedError):  # a model that reads no texts has no table of words
            self._vocabulary = getattr(loaded.model.get_input_embeddings(), "num_embeddings", None)

    def tokens(self, sample: Sample) -> Tokens:
        """Encode a sample; context, question and answer are encoded apart, so that no token straddles them.

        The context begins, once, with what the tokenizer puts before every text (`TextEncoder.prefix`), so that what is
        measured is what ``tokenizer(text)`` gives in use; in a chat, with the template's beginning (`Sample.head`).

        The prompt is the question; in ``query_aware`` mode the question's last token, because the others are read
        before the decision; without a question, the context's last token.

        Raises
        ------
        TaskError : nothing is left to read, there is no answer, or the model has no positions for so many tokens.
        """
        head = len(self.texts.head(sample))
        context = self.ids(self.texts.context(sample))
        question, answer = (self.ids(self.texts.following(text)) for text in (sample.question, sample.answer))
        if self._query_aware or not question.shape[1]:
            whole = torch.cat((context, question), 1)
            read, prompt = whole[:, :-1], whole[:, -1:]
        else:
            read, prompt = context, question
        for name, length in (("context", read.shape[1] - head), ("answer", answer.shape[1])):
            if length < 1:
                raise TaskError(
                    f"sample {sample.id}: its {name} has no token; give every sample a context and an answer"
                )
        encoded = Tokens(read, prompt, answer)
        self._require_positions(sample, encoded, answer.shape[1], "the answer")
        return encoded

    def check_positions(self, samples: Sequence[Sample], *, exact: bool = False) -> Reach:
        """Compare what samples need with the positions that the model has, before anything is measured.

        Parameters
        ----------
        exact : whether text will be generated too, up to `Sample.max_new_tokens`.

        Raises
        ------
        TaskError : a sample is longer than a model with a table of positions can read. Rotary models go on, at
            positions that they were not trained for; `Reach.limit` tells so.
        """
        longest = 0
        for sample in samples:
            tokens = self.tokens(sample)
            following = tokens.answer.shape[1]
            if exact and sample.max_new_tokens:
                following = max(following, sample.max_new_tokens)
                self._require_positions(sample, tokens, sample.max_new_tokens, "the text that is generated")
            longest = max(longest, positions_needed(tokens, following))
        limit = position_limit(self._loaded.model)
        return Reach(longest, None if limit is None or longest <= limit.tokens else limit.tokens)

    def _require_positions(self, sample: Sample, tokens: Tokens, following: int, text: str) -> None:
        limit, needed = position_limit(self._loaded.model), positions_needed(tokens, following)
        if limit is None or not limit.learned or needed <= limit.tokens:
            return
        raise TaskError(
            f"sample {shown(sample.id)}: {needed:,} tokens (context and question {positions_needed(tokens, 1):,}, then "
            f"{text}), but {beyond(self._loaded.model, limit)}. Ask for a shorter length (the option length of the "
            "task), a smaller max_new_tokens, or take a model with rotary positions"
        )

    def without_context(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Return the question by itself, as the beginning of a text, and the answer: each (1, length) int64."""
        question = self.ids(self.texts.without_context(sample))
        return question, self.ids(self.texts.following(sample.answer))

    def repetition(self, tokens: Tensor) -> Tensor:
        """Return what is read after a context (1, length) to repeat it: `REQUEST` in tokens, and the context.

        What the tokenizer puts before every text is not repeated. A tokenizer that does not know all words of the
        request goes without it.
        """
        prefix = list(self.texts.prefix)
        if prefix and tokens[0, : len(prefix)].tolist() == prefix:
            tokens = tokens[:, len(prefix) :]
        request, unknown = self.texts.following(REQUEST), self._loaded.tokenizer.unk_token_id
        return tokens if unknown in request else torch.cat((self.ids(request), tokens), 1)

    def ids(self, ids: list[int]) -> Tensor:
        """Return ids as (1, length) int64 on the model's device.

        Raises
        ------
        TaskError : the model has no embedding of an id.
        """
        size = self._vocabulary
        if size is not None and ids and max(ids) >= size:
            raise TaskError(
                f"token {max(ids):,} ({self._loaded.tokenizer.decode([max(ids)])!r}) is beyond the {size:,} that model "
                f"{self._loaded.name!r} has embeddings of; its tokenizer belongs to another model"
            )
        return torch.tensor([ids], dtype=torch.int64, device=self._loaded.model.device)


def warn_of_undecided(lengths: Mapping[str, int], protocol: EvaluationProtocol) -> None:
    """Warn of samples (tokens by id) that end before a decision of ``streaming`` falls due."""
    undecided = [sample for sample, length in lengths.items() if length < protocol.every]
    if undecided:
        logger.warning(
            "protocol %s: %d of %d samples (%s, say) have fewer than %d tokens, so no decision falls due on them, and "
            "every manager is measured as the full memory; decide more often, or take longer texts",
            protocol, len(undecided), len(lengths), undecided[0], protocol.every,
        )  # fmt: skip
