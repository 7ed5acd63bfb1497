"""Task: the exact metrics of generated text, all in [0, 1]."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence


def substring_share(references: Sequence[str], output: str) -> float:
    """Return the share of the reference values that occur in the output, both lower-cased (RULER's metric)."""
    if not references:
        return 0.0
    text = output.lower()
    # A reference of nothing would be found everywhere.
    return sum(bool(reference.strip()) and reference.lower() in text for reference in references) / len(references)


def normalise(text: str) -> str:
    """Return a text lower-cased, without punctuation and articles, with single spaces (SQuAD)."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", kept).split())


def comparable(reference: str, output: str) -> tuple[str, str]:
    """Return both texts normalised; where that leaves nothing of the reference, lower-cased and with single spaces.

    So the answer "A" is not equal to every output of articles and punctuation, nor to no output at all.
    """
    expected = normalise(reference)
    if expected or not reference.strip():
        return expected, normalise(output)
    kept, said = (" ".join(text.lower().split()) for text in (reference, output))
    # With or without punctuation around it: "A", "(A)", "A."
    return kept.strip(string.punctuation) or kept, said.strip(string.punctuation + " ") or said


def exact_match(references: Sequence[str], output: str) -> float:
    """Return 1 if the normalised output equals a normalised reference (`comparable`), else 0."""
    return float(any(a == b for a, b in (comparable(reference, output) for reference in references)))


def token_f1(references: Sequence[str], output: str) -> float:
    """Return the F1 of the bags of normalised words, the largest over the references (SQuAD)."""
    return max(
        (_bag_f1(a.split(), b.split()) for a, b in (comparable(reference, output) for reference in references)),
        default=0.0,
    )


def rouge_l(references: Sequence[str], output: str) -> float:
    """Return ROUGE-L: the F1 of the longest common subsequence of words (Lin 2004), the largest over the references."""
    return max(
        (_subsequence_f1(reference.lower().split(), output.lower().split()) for reference in references), default=0.0
    )


def _bag_f1(reference: list[str], output: list[str]) -> float:
    if not reference or not output:
        return float(reference == output)
    return _f1((Counter(reference) & Counter(output)).total(), len(reference), len(output))


def _subsequence_f1(reference: list[str], output: list[str]) -> float:
    if not reference or not output:
        return float(reference == output)
    row = [0] * (len(output) + 1)
    for word in reference:
        diagonal = 0
        for j, other in enumerate(output, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return _f1(row[-1], len(reference), len(output))


def _f1(common: int, reference: int, output: int) -> float:
    # 2PR/(P+R) with P = common/output and R = common/reference
    return 2 * common / (reference + output)
