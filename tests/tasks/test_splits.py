"""No task shows in one split what it measures in another: every registered task, and any that somebody adds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from itertools import combinations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem.errors import TaskError
from evomem.tasks import Sample, Split, build, tasks
from evomem.tasks.generated import GeneratedTask, TaskOptions
from evomem.tasks.splits import deal, divide, draw_of_split, of_split, split_of
from evomem.tasks.text.prose import load_prose
from evomem.tasks.text.zoo_words import DIGITS, KEYS, VALUES
from tests.support.toy_tokenizer import ToyTokenizer

SMALL = {"mqar": 64, "forgetting_mqar": 64, "zoo_needle": 120, "zoo_recall": 120, "zoo_forgetting": 160, "tmaze": 120,
         "cartpole": 60, "book": 400, "passkey": 150}  # fmt: skip


def key_words(sample: Sample) -> Iterable[str]:
    """Both words of every key that a context states; of keys that are UUIDs, the whole."""
    for key in re.findall(r"magic \w+ for (\S+) is:", sample.context):
        yield from key.split("-") if re.fullmatch(r"[a-z]+-[a-z]+", key) else [key]


PROSE = {split: load_prose(split).sentences for split in Split}


def prose(sample: Sample) -> Iterable[str]:
    return (sentence for share in PROSE.values() for sentence in share if sentence in sample.context)


def needle(sample: Sample) -> Iterable[str]:
    return [*key_words(sample), *prose(sample)]


def recalled(sample: Sample) -> Iterable[str]:
    return re.findall(r"[a-z]+", sample.context + sample.question + sample.answer)


def zoo_facts(sample: Sample) -> Iterable[str]:
    digit, pairs = "|".join(DIGITS), rf"({'|'.join(KEYS)}) ({'|'.join(VALUES)})\b"
    found = re.findall(rf"magic (\w+) ((?:{digit})(?: (?:{digit})){{3}})", sample.context)
    return ["; ".join(sorted(f"{key} {value}" for key, value in found or re.findall(pairs, sample.context)))]


def whole(sample: Sample) -> Iterable[str]:
    return [sample.context]


PARTS: dict[str, Callable[[Sample], Iterable[str]]] = {
    **dict.fromkeys(("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3"), needle),
    **dict.fromkeys(("multivalue", "multiquery", "multikey_mix"), needle),
    **dict.fromkeys(("mqar", "forgetting_mqar"), recalled),
    **dict.fromkeys(("zoo_needle", "zoo_recall", "zoo_forgetting"), zoo_facts),
    "book": prose,
}
"""What a task promises to be in one split only; where nothing is said here, the whole context."""


def small(name: str, path) -> object:
    if name == "file":
        rows = [{"context": f"Text {i}.", "question": "Which?", "answers": [f"t{i}"]} for i in range(60)]
        path.write_text("\n".join(map(json.dumps, rows)))
        return build(f"file:{path}", ToyTokenizer())
    return build(name, ToyTokenizer(), SMALL.get(name, 300))


@pytest.mark.parametrize("name", tasks.names())
def test_splits_of_every_task_are_disjoint(name, tmp_path):
    task, parts = small(name, tmp_path / "rows.jsonl"), PARTS.get(name, whole)
    found: dict[Split, set[str]] = {split: set() for split in Split}
    for split in Split:
        for seed in (0, 1) if name != "file" else (0,):
            for sample in task.samples(split, 6, seed):
                mine = set(parts(sample))
                assert mine
                found[split] |= mine
    for one, other in combinations(Split, 2):
        assert not found[one] & found[other], (one, other)


class Colours(GeneratedTask[TaskOptions]):
    """A task whose author thought of no splits."""

    name, Options = "colours", TaskOptions

    def sample(self, random: Random, split: Split, number: int, identity: str) -> Sample:
        colour = f"{random.choice('abcdefghij')}{random.choice('abcdefghij')}"
        return Sample(identity, f"The sky is {colour}.", "Which?", f" {colour}", (colour,), 4)


class Dull(Colours):
    """One whose contexts are all the same: it cannot be divided by them."""

    def sample(self, random: Random, split: Split, number: int, identity: str) -> Sample:
        return Sample(identity, "The sky is blue.", f"{random.random()}?", " blue", ("blue",), 4)


def test_a_task_that_says_nothing_is_separated_all_the_same():
    task = Colours(ToyTokenizer())
    contexts = [{s.context for s in task.samples(split, 200, seed=2)} for split in Split]
    assert sum(map(len, contexts)) == len(set().union(*contexts)) > 90
    assert [s.digest for s in task.samples(Split.SEALED, 3, 2)] == [
        s.digest for s in task.samples(Split.SEALED, 9, 2)[:3]
    ]
    mine = split_of("The sky is blue.")
    assert Dull(ToyTokenizer()).samples(mine, 1, 0)
    for split in set(Split) - {mine}:
        with pytest.raises(TaskError, match=f"draws of contexts belongs to the {split} split"):
            Dull(ToyTokenizer()).samples(split, 1, 0)


def test_every_generated_task_says_what_it_divides():
    for name in tasks.names():
        kind = tasks.get(name)
        assert not issubclass(kind, GeneratedTask) or kind.divides, name


@settings(max_examples=60, deadline=None)
@given(st.sets(st.text(max_size=6), min_size=1, max_size=30), st.sampled_from([5, 10]))
def test_every_way_of_dividing_gives_each_thing_to_one_split(things, regions):
    listed = sorted(things)
    by_word = [of_split(listed, split) for split in Split]
    dealt = list(deal(listed, regions).values())
    rows = list(divide(listed, str, lambda row: None)[0].values()) if len(listed) > 2 else by_word
    for shares in (by_word, dealt, rows):
        assert sorted(thing for share in shares for thing in share) == listed
    assert all(len(listed) < 3 or share for share in rows)
    assert all(list(share) == [thing for thing in listed if thing in share] for share in (*by_word, *dealt))


def test_a_draw_belongs_to_its_split_or_is_refused():
    for split in Split:
        random = Random(0)
        assert split_of(draw_of_split(lambda r=random: str(r.random()), str, split, "numbers")) is split
    for split in set(Split) - {split_of("always")}:
        with pytest.raises(TaskError, match=f"none of 10,000 draws of numbers belongs to the {split} split"):
            draw_of_split(lambda: "always", str, split, "numbers")
