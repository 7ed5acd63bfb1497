"""Task: text as the ids that a model reads: the tokenizer's own prefix once, and parts that are encoded apart."""

from __future__ import annotations

from evomem.errors import TaskError
from evomem.tasks.base import Sample, Tokenizer

_PROBES = ("a", "1", "r0 s0 a0", "the 1.")
"""Texts that show what a tokenizer puts around a text; one alone may hide it (an unknown word may be the prefix)."""

_BREAK = "\n"
"""What stands before a text that goes on, for tokenizers that treat the beginning of every text in a way of its own."""


class TextEncoder:
    """Encodes texts as ``tokenizer(text)`` does, the beginning and what follows it apart.

    Attributes
    ----------
    prefix : ids that ``tokenizer(text)`` puts before every text: a token for the beginning on Gemma, Llama and Mistral,
        nothing on SmolLM2, Qwen and GPT-2. What it puts behind a text is left out: more text follows.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.prefix = tuple(_prefix(tokenizer))
        alone, after = self._plain("a"), self._plain(f"{_BREAK}a")
        before = self._plain(_BREAK)
        # Tokenizers of the SentencePiece kind put a blank before every text, which a text that goes on does not have.
        apart = after[: len(before)] == before and after[len(before) :] != alone
        self._before = before if apart else []

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def beginning(self, text: str) -> list[int]:
        """Return the ids of a text from its beginning on, the prefix among them.

        A text that begins with the prefix itself gets no second one.
        """
        ids, prefix = self._plain(text), list(self.prefix)
        return ids if prefix and ids[: len(prefix)] == prefix else prefix + ids

    def following(self, text: str) -> list[int]:
        """Return the ids of a text that follows another one."""
        if not self._before or not text:
            return self._plain(text)
        ids = self._plain(_BREAK + text)
        return ids[len(self._before) :] if ids[: len(self._before)] == self._before else self._plain(text)

    def context(self, sample: Sample) -> list[int]:
        """Return the ids of a sample's context, with what stands before it: a chat template's head, or the prefix."""
        return self.beginning(sample.context) if sample.head is None else self._plain(sample.head + sample.context)

    def head(self, sample: Sample) -> list[int]:
        """Return the ids before a sample's context: a chat template's head, or the prefix."""
        return list(self.prefix) if sample.head is None else self._plain(sample.head)

    def without_context(self, sample: Sample) -> list[int]:
        """Return the ids of a sample's question as the beginning of a text: nothing but it is read."""
        if sample.head is not None:
            return self._plain(sample.head + sample.question)
        return self.beginning(sample.question)

    @property
    def spelled(self) -> str:
        """The prefix as the tokenizer spells it, for records: ``<bos>``; "" if there is none."""
        spell = getattr(self._tokenizer, "convert_ids_to_tokens", None)
        return " ".join(map(str, spell(list(self.prefix)) if spell is not None else self.prefix))


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """Return what ``tokenizer(text)`` puts before a text, and only that."""
    possible: set[tuple[int, ...]] = set()
    for probe in _PROBES:
        plain, whole = tokenizer.encode(probe, add_special_tokens=False), tokenizer.encode(probe)
        if not plain:
            continue
        ends = range(len(whole) - len(plain) + 1)
        prefixes = {tuple(whole[:at]) for at in ends if whole[at : at + len(plain)] == plain}
        if not prefixes:
            raise TaskError(
                f"tokenizer {type(tokenizer).__name__}: {probe!r} alone and with special tokens around it have no ids "
                "in common, so what it puts before a text cannot be told; give the model another tokenizer"
            )
        possible = possible & prefixes if possible else prefixes
    shortest = sorted(possible, key=len)
    return list(shortest[0]) if shortest else []
