"""Tasks in which samples of equal length state few or many things: how long they are, and how much they state."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from evomem.errors import ConfigError, TaskError
from evomem.tasks import Sample, Split, build
from evomem.tasks.amounts import amounts, chance
from evomem.tasks.fitting import UnitCounts
from tests.support.toy_tokenizer import ToyTokenizer
from tests.tasks.test_splits import PARTS
from tests.tasks.test_tasks_generated import NEEDLE

COUNT = UnitCounts(ToyTokenizer())


def pairs_of_recall(sample: Sample) -> list[tuple[str, str]]:
    """Keys and values in the order in which they stand, queries among them."""
    return re.findall(r" ([a-z]+) ([a-z]+),", sample.context)


def stated_by_recall(sample: Sample) -> int:
    return len({key for key, _ in [*pairs_of_recall(sample), (sample.question.strip(), "")]})


def stated_by_zoo(sample: Sample) -> int:
    lines = [unit for unit in sample.context.split(".") if "," in unit or len(unit.split()) == 2]
    return sum(len(line.split(",")) for line in lines)


def stated_by_needles(sample: Sample) -> int:
    return len({key for _, key, _ in NEEDLE.findall(sample.context)})


# spec, amounts, what counts them in the text, by how many tokens lengths may differ
TASKS = {
    "mqar:length=256,pairs=16,fewest_pairs=2": ((2, 4, 8, 16), stated_by_recall, 0),
    "mqar:length=200,pairs=12,fewest_pairs=5,filler=words": ((5, 10, 12), None, 0),
    "forgetting_mqar:length=256,pairs=8,fewest_pairs=1": ((1, 2, 4, 8), stated_by_recall, 0),
    "zoo_recall:length=256,pairs=16,fewest_pairs=3": ((3, 6, 12, 16), stated_by_zoo, 12),
    "multikey_mix:length=500": ((1, 2, 4, 8), stated_by_needles, 60),
    "multikey_mix:length=500,needles=6,fewest_needles=6": ((6,), stated_by_needles, 60),
}


@given(st.integers(1, 500), st.integers(1, 500))
def test_amounts_double_from_the_fewest_to_the_most(fewest, most):
    if fewest > most:
        with pytest.raises(ConfigError, match=f"task t: fewest_pairs {fewest} is more than the {most}"):
            amounts("t", "fewest_pairs", fewest, most)
        return
    found = amounts("t", "fewest_pairs", fewest, most)
    assert (found[0], found[-1]) == (fewest, most)
    assert all(b == 2 * a for a, b in pairwise(found[:-1]))
    assert all(a < b <= 2 * a for a, b in pairwise(found))
    assert 1 / most <= chance(found) <= 1 / fewest
    assert amounts("t", "fewest_pairs", None, most) == (most,)


@pytest.mark.parametrize("spec", TASKS)
def test_samples_are_of_equal_length_whatever_they_state(spec):
    expected, stated, tolerance = TASKS[spec]
    task = build(spec, ToyTokenizer())
    samples = task.samples(Split.SELECT, 60, seed=0)
    told = [sample.meta.get("pairs") or sample.meta.get("facts") or sample.meta["needles"] for sample in samples]
    if stated is not None:
        assert [stated(sample) for sample in samples] == told
    assert set(told) == set(expected)
    assert len(expected) == 1 or chisquare(list(Counter(told).values())).pvalue > 1e-4
    sizes = [COUNT.from_start(sample.context + sample.question + sample.answer) for sample in samples]
    assert max(sizes) - min(sizes) <= tolerance
    assert max(sizes) <= task.options.length
    if spec.startswith("multikey"):
        assert task.uniform_chance == 0
    else:
        assert task.uniform_chance == pytest.approx(sum(1 / n for n in expected) / len(expected))


@pytest.mark.parametrize("spec", [spec for spec in TASKS if "mqar" in spec and "words" not in spec])
def test_recall_can_be_solved_from_its_text_and_pairs_stand_anywhere(spec):
    first = {}
    for sample in build(spec, ToyTokenizer()).samples(Split.TRAIN, 60, seed=1):
        newest = dict(pairs_of_recall(sample))  # the last one counts
        assert newest[sample.question.strip()] == sample.answer.strip() == sample.references[0]
        where = sample.context.index(sample.question + " ") / len(sample.context)
        first.setdefault(sample.meta["pairs"], []).append(where)
    few = first[min(first)]
    assert min(few) < 0.2
    assert max(few) > 0.3


@pytest.mark.parametrize("spec", TASKS)
def test_splits_share_nothing(spec):
    parts = PARTS[spec.partition(":")[0]]
    found = {
        split: {
            part
            for seed in (0, 1)
            for one in build(spec, ToyTokenizer()).samples(split, 8, seed)
            for part in parts(one)
        }
        for split in Split
    }
    assert all(found.values())
    for one, other in combinations(Split, 2):
        assert not found[one] & found[other]


@pytest.mark.parametrize("spec", TASKS)
def test_more_samples_begin_with_fewer(spec):
    task = build(spec, ToyTokenizer())
    assert task.samples(Split.SEALED, 2, 5) == task.samples(Split.SEALED, 6, 5)[:2]
    again = build(spec.partition(":")[0], ToyTokenizer(), **task.describe())
    assert again.samples(Split.SEALED, 2, 5) == task.samples(Split.SEALED, 2, 5)


EARLIER = {
    "mqar:length=128": ["21715a14288721f3", "6e901f138623367b"],
    "forgetting_mqar:length=128": ["f478d4e7fee0982d", "c036d9811283541e"],
    "zoo_recall:length=120": ["f4a4cef2320e86b9", "d73293ee0368e71c"],
    "multikey_1:length=300": ["8b57cf27b2f60292", "b7b5d789bac3bd71"],
}
"""Samples that a version without these options made."""


@pytest.mark.parametrize("spec", EARLIER)
def test_what_does_not_use_an_added_option_is_what_it_was(spec):
    task = build(spec, ToyTokenizer())
    assert [sample.digest for sample in task.samples(Split.SEALED, 2, 3)] == EARLIER[spec]
    assert not {"fewest_pairs", "fewest_needles"} & set(task.describe())


@pytest.mark.parametrize(
    "spec", ["multikey_mix:fewest_needles=9", "mqar:fewest_pairs=17,pairs=16", "zoo_recall:fewest_pairs=25"]
)
def test_fewest_are_not_more_than_the_most(spec):
    with pytest.raises(ConfigError, match=r"fewest_(pairs|needles) \d+ is more than the \d+"):
        build(spec, ToyTokenizer(), 300)


class Merging(ToyTokenizer):
    """Makes one token of two dots."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return super().encode(text.replace(" . .", " .."), add_special_tokens=add_special_tokens)


def test_a_tokenizer_with_which_lengths_would_differ_is_refused():
    with pytest.raises(TaskError, match="fewest_pairs needs samples of equal length"):
        build("mqar:length=256,pairs=16,fewest_pairs=2", Merging()).samples(Split.TRAIN, 1, 0)
    assert build("mqar:length=256,pairs=16,fewest_pairs=2,filler=words", Merging()).samples(Split.TRAIN, 1, 0)
