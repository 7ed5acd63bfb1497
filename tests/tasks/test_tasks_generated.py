"""The made-up tasks can be solved from their text alone by a reader that knows nothing of how they were made."""

import re
from collections import Counter

import pytest
from scipy.stats import chisquare

from evomem.tasks import Split, build
from evomem.tasks.text.prose import load_prose
from evomem.tasks.text.words import words
from tests.support.toy_tokenizer import ToyTokenizer

NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.(?=\s|$)")
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"

# haystack, value, hidden needles (None: as many as fit), keys asked, values a key
DEFINITIONS = {
    "single_1": ("noise", "number", 1, 1, 1),
    "single_2": ("essay", "number", 1, 1, 1),
    "single_3": ("essay", "uuid", 1, 1, 1),
    "multikey_1": ("essay", "number", 4, 1, 1),
    "multikey_2": ("needle", "number", None, 1, 1),
    "multikey_3": ("needle", "uuid", None, 1, 1),
    "multivalue": ("essay", "number", 4, 1, 4),
    "multiquery": ("essay", "number", 4, 4, 1),
}


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_needles_answer_their_question(name):
    haystack, value, hidden, asked, per_key = DEFINITIONS[name]
    task = build(name, ToyTokenizer(), 600)
    for sample in task.samples(Split.SEALED, 10, seed=0):
        found = NEEDLE.findall(sample.context)
        assert len(found) == hidden if hidden is not None else len(found) > 3
        assert {kind for kind, _, _ in found} == {f"{value}s"}
        shape = UUID if value == "uuid" else r"[1-9]\d{6}"
        assert all(re.fullmatch(shape, v) for _, _, v in found)

        one = asked * per_key == 1
        opening = f"A special magic {value} is hidden" if one else f"Some special magic {value}s are hidden"
        noun = value if one else f"{value}s"
        assert sample.context.startswith(f"{opening} within the following text. Make sure to memorize it. I will quiz")
        query = re.fullmatch(
            rf"\nWhat {'is' if one else 'are all'} the special magic {noun} for (.+) mentioned in the provided text\? "
            rf"The special magic {noun} for \1 mentioned in the provided text {'is' if one else 'are'}",
            sample.question,
        ).group(1)
        keys = re.split(r", and |, ", query)
        assert len(keys) == asked
        assert len(sample.references) == asked * per_key
        assert len({key for _, key, _ in found}) == len(found) // per_key
        read = Counter(v for _, key, v in found if key in keys)
        assert read == Counter(sample.references)
        assert sample.answer == " " + ", ".join(sample.references)
        # What is left is haystack and nothing else.
        rest = NEEDLE.sub("", sample.context.split("\n", 1)[1])
        noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
        if haystack == "noise":
            assert not rest.replace(noise, "").strip()
        if haystack == "needle":
            assert not rest.strip()
        if haystack == "essay":
            assert len(rest.split()) > 100


def test_partial_answers_score_their_share():
    task = build("multiquery", ToyTokenizer())
    (sample,) = task.samples(Split.TRAIN, 1, seed=0)
    for known in range(5):
        assert task.score(sample, " and ".join(sample.references[:known])) == known / 4
    uuids = build("single_3", ToyTokenizer())
    (sample,) = uuids.samples(Split.TRAIN, 1, seed=0)
    assert uuids.score(sample, f"it is {sample.references[0].upper()}!") == 1.0


@pytest.mark.parametrize("name", ["multikey_1", "multikey_2"])
def test_words_and_prose_of_a_split_stay_there(name):
    keys, sentences = {}, {}
    for split in Split:
        samples = build(name, ToyTokenizer(), 400).samples(split, 30, seed=0)
        found = [key for sample in samples for _, key, _ in NEEDLE.findall(sample.context)]
        keys[split] = {part for key in found for part in key.split("-")}
        text = " ".join(sample.context for sample in samples)
        sentences[split] = {s for other in Split for s in load_prose(other).sentences if s in text}
        assert sentences[split] <= set(load_prose(split).sentences)
    assert not keys[Split.TRAIN] & keys[Split.SEALED] - (set(words("noun")) & set(words("adjective")))
    assert not keys[Split.SELECT] & keys[Split.SEALED] - (set(words("noun")) & set(words("adjective")))


@pytest.mark.parametrize("name", ["single_1", "single_2", "multikey_1", "multikey_2", "passkey"])
def test_asked_needles_stand_at_every_depth(name):
    task = build(name, ToyTokenizer(), 600)
    tenths = Counter()
    for sample in task.samples(Split.TRAIN, 150, seed=0):
        body = sample.context.split("\n", 1)[1]
        tenths[min(4, 5 * body.index(sample.references[0]) // len(body))] += 1
    assert all(tenths[fifth] >= 8 for fifth in range(5)), tenths


def test_hundreds_of_contexts_are_distinct():
    samples = build("multikey_1", ToyTokenizer(), 500).samples(Split.TRAIN, 300, seed=0)
    assert len({NEEDLE.sub("", sample.context) for sample in samples}) > 200


def test_the_same_needles_are_hidden_at_every_length():
    short, long = (build("multikey_1", ToyTokenizer(), length).samples(Split.TRAIN, 8, 0) for length in (300, 900))
    for a, b in zip(short, long, strict=True):
        assert a.question == b.question
        assert NEEDLE.findall(a.context) == NEEDLE.findall(b.context)


@pytest.mark.parametrize("haystack", ["noise", "essay"])
def test_passkey_says_its_key_twice(haystack):
    for sample in build(f"passkey:haystack={haystack}", ToyTokenizer(), 400).samples(Split.SELECT, 20, 0):
        first, second = re.search(
            r"The pass key is (\d{5})\. Remember it\. (\d{5}) is the pass key\.", sample.context
        ).groups()
        assert sample.references == (first,) == (second,)
        assert sample.answer == f" {first}"
        assert sample.context.count(first) == 2
        assert sample.question == "\nWhat is the pass key? The pass key is"


@pytest.mark.parametrize("length", [64, 128, 256, 512])
@pytest.mark.parametrize("separator", ["comma", "none"])
@pytest.mark.parametrize("name", ["mqar", "forgetting_mqar"])
def test_recall_asks_for_the_newest_value(name, separator, length):
    task = build(name, ToyTokenizer(), length, separator=separator, filler="words")
    pairs = round(1 / task.uniform_chance)
    samples = task.samples(Split.TRAIN, 20, seed=0)
    nouns, changed = set(words("noun", Split.TRAIN)), 0
    for sample in samples:
        text = sample.context.replace(",", "").split()
        stated = [(k, v) for k, v in zip(text[::2], text[1::2], strict=True) if k in nouns]
        memory, history = {}, {}
        for key, value in stated:
            memory[key] = value
            history.setdefault(key, set()).add(value)
        key = sample.question.strip()
        assert len(memory) == pairs
        assert memory[key] == sample.references[0] == sample.answer.strip()
        assert not set(memory) & set().union(*history.values())
        # Every other key was asked for once before, and answered with its newest value.
        tail = stated[-(pairs - 1) :]
        assert {k for k, _ in tail} == set(memory) - {key}
        assert all(memory[k] == v for k, v in tail)
        changed += len(history[key]) > 1
        assert sample.meta["restated"] is (len(history[key]) > 1)
        assert sum(len(values) > 1 for values in history.values()) == (0 if name == "mqar" else pairs // 2)
    assert changed == 0 if name == "mqar" else changed >= len(samples) / 2


def test_recall_gaps_follow_the_power_law():
    task = build("mqar:pairs=1,length=37,power=0.5", ToyTokenizer())
    gaps = Counter(sample.meta["gap"] for sample in task.samples(Split.TRAIN, 2000, seed=0))
    weights = [gap**-0.5 for gap in range(1, 12)]
    observed = [gaps[gap] for gap in range(1, 12)]
    assert sum(observed) == 2000
    assert chisquare(observed, [2000 * weight / sum(weights) for weight in weights]).pvalue > 1e-3


def test_recall_scores_the_first_token():
    task = build("mqar", ToyTokenizer())
    (sample,) = task.samples(Split.TRAIN, 1, seed=0)
    (value,) = sample.references
    assert task.score(sample, value) == task.score(sample, f" {value}, and more") == 1.0
    assert task.score(sample, f" more {value}") == task.score(sample, f"{value}s") == 0.0


def test_book_reads_on(tmp_path):
    path = tmp_path / "book.txt"
    text = " ".join(f"Sentence {i} tells what happened on day {i} of the journey." for i in range(900))
    path.write_text(text, encoding="utf-8")
    task = build("book", ToyTokenizer(), 400, essay=str(path), continuation=64)
    breaks = 0
    for sample in task.samples(Split.TRAIN, 20, seed=0):
        whole = sample.context + sample.question + sample.answer
        breaks += whole not in text
        assert 64 - 6 <= len(ToyTokenizer().encode(sample.answer, add_special_tokens=False)) <= 64
        assert sample.answer.strip() not in sample.context
    assert breaks <= 10, "only where one of the split's stretches of the text ends and the next begins"
