"""The zoo's pairs with changing values: stories, samples, lessons, and the model that is trained on them."""

from collections import Counter
from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import evomem.models
from evomem.errors import TaskError
from evomem.evaluation import Evaluator
from evomem.managers import build as build_manager
from evomem.models.aliases import aliases
from evomem.tasks import Split, build
from evomem.tasks.splits import split_of
from evomem.tasks.text.zoo_forgetting import draw_story, tell
from evomem.tasks.text.zoo_words import KEYS, VALUES
from experiments.zoo.data import RESTATED, Lessons, forgetting_lesson, zoo_tokenizer
from experiments.zoo.publish import accuracy

TOKENIZER = zoo_tokenizer()


def stated(text: str) -> list[tuple[str, str]]:
    """Pairs in the order in which a reader finds them."""
    words = text.replace(",", " ").replace(".", " ").split()
    return [(a, b) for a, b in pairwise(words) if a in KEYS and b in VALUES]


def belongs(pairs: list[tuple[str, str]]) -> Split:
    return split_of("; ".join(sorted(f"{key} {value}" for key, value in pairs)))


@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize("options", [{}, {"pairs": 5, "restated": 0.4, "values": 4, "line": 1}, {"restated": 1.0}])
def test_the_answer_is_the_last_value_that_a_reader_finds(split, options):
    for number, sample in enumerate(build("zoo_forgetting", TOKENIZER, 256, **options).samples(split, 12, seed=4)):
        pairs, meta = stated(sample.context), sample.meta
        assert belongs(pairs) == split
        assert len({value for _, value in pairs}) == len(pairs) == meta["facts"]
        *before, newest = [value for key, value in pairs if key == meta["key"]]
        assert sample.answer == f" {newest}"
        assert sample.references == (newest,)
        assert before == meta["stale"]
        assert meta["restated"] == bool(before) == (number % 2 == 0 or options.get("restated") == 1.0)
        assert len(pairs) - 1 - pairs.index((meta["key"], newest)) == meta["after"]
        assert sample.question.endswith(f", {meta['key']}")
        last = dict(pairs)
        assert all(last[key] == value for key, value in stated(sample.question))
        assert newest not in sample.question.split()
        counts = Counter(Counter(key for key, _ in pairs).values())
        several = options.get("values", 2)
        assert set(counts) <= {1, several}
        assert counts[several] == max(1, round(options.get("restated", 0.5) * counts.total()))


@pytest.mark.parametrize("asked", [2, 5, 20])
def test_with_several_keys_asked_the_answer_goes_on_with_their_newest_values(asked):
    """The first question stays what it is; nothing that was said again is asked, nothing is asked twice."""
    task, alone = (build("zoo_forgetting", TOKENIZER, 256, pairs=12, **more) for more in ({"asked": asked}, {}))
    kinds = set()
    for sample, single in zip(*(one.samples(Split.TRAIN, 12, seed=4) for one in (task, alone)), strict=True):
        last = dict(stated(sample.context))
        assert dict(stated(single.context)) == last
        assert (sample.question, sample.references) == (single.question, single.references)
        assert sample.answer.startswith(single.answer)
        assert sample.max_new_tokens == single.max_new_tokens
        pairs = stated(f"{sample.meta['key']}{sample.answer}")
        said = dict(stated(sample.question))
        assert [key for key, _ in pairs] == [sample.meta["key"], *sample.meta["also"]]
        assert len(dict(pairs)) == len(pairs) == min(asked, 12 - len(said))
        assert not dict(pairs).keys() & said.keys()
        assert all(last[key] == value for key, value in pairs)
        assert task.score(sample, sample.answer) == 1
        kinds |= {sum(key == other for other, _ in stated(sample.context)) for key in sample.meta["also"]}
    assert kinds == {1, 2}


def test_old_values_are_as_likely_early_as_late():
    """Where the newest value of a restated key stands must not follow from anything but that it is the last one."""
    after = [
        sample.meta["after"] for sample in build("zoo_forgetting", TOKENIZER, 256).samples(Split.TRAIN, 400, 0)[::2]
    ]
    # The later of two places among 24 that are drawn at random: 24 - 2/3 * 25 = 7.33 from the end, standard error 0.4.
    assert sum(after) / len(after) == pytest.approx(22 / 3, abs=1.5)


def test_only_the_newest_value_counts():
    task = build("zoo_forgetting", TOKENIZER)
    sample = task.samples(Split.TRAIN, 1, 0)[0]
    (newest,), stale = sample.references, sample.meta["stale"][0]
    for output, score in ((f" {newest}, fox", 1), (newest, 1), (f"{stale} {newest}", 0), (stale, 0), ("", 0)):
        assert task.score(sample, output) == score


def test_lines_are_told_in_the_order_of_the_story():
    story = draw_story(Random(1), Split.TRAIN, 3, 3, 3)
    filler = [f"sentence {n}." for n in range(5)]
    for line in (1, 3):
        random = Random(line)
        told = tell(story, [random.random() for _ in range(12 // line)], filler, line)
        assert stated(told) == [(fact.key, fact.value) for fact in story.statements]
        assert [told.index(one) for one in filler] == sorted(told.index(one) for one in filler)


def test_too_many_pairs_are_a_clear_error():
    with pytest.raises(TaskError, match=f"40 pairs, 20 of them with 3 values.*{len(VALUES)} values"):
        build("zoo_forgetting", TOKENIZER, 1024, pairs=40, values=3).samples(Split.TRAIN, 1, 0)
    with pytest.raises(TaskError, match=f"{len(KEYS)} keys"):
        draw_story(Random(0), Split.TRAIN, len(KEYS) + 1, 0, 2)
    for values in range(2, 9):  # the default fits, however many values a key has
        for restated in (0.1, 0.5, 1.0):
            build("zoo_forgetting", TOKENIZER, 1024, values=values, restated=restated).samples(Split.TRAIN, 1, 0)


# ---- lessons ---------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), length=st.integers(32, 400))
def test_lessons_are_of_the_train_split_and_ask_for_every_newest_value(seed, length):
    context, questions = forgetting_lesson(Random(seed), length)
    pairs, asked = stated(context), stated(questions)
    assert belongs(pairs) == Split.TRAIN
    assert dict(asked) == dict(pairs)
    assert len(asked) == len(dict(pairs)) >= 2
    several = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    assert 0 < len(several) < len(asked)
    assert len(TOKENIZER.encode(f"{context} {questions}")) <= length


def test_answers_about_restated_keys_are_a_kind_of_their_own():
    lessons = Lessons(0, ("zoo_forgetting",))
    assert lessons.kinds == ("zoo_forgetting", RESTATED)
    batch = lessons.batch(step=3, length=96, tokens=480)
    for ids, answers, kinds in zip(batch.ids, batch.answers, batch.kinds, strict=True):
        words = TOKENIZER.convert_ids_to_tokens(ids)
        places = answers.nonzero()[:, 0].tolist()
        times = Counter(words[: places[0] - 2])  # before "again ,"
        assert {words[place - 1] for place in places} == {word for word in times if word in KEYS}
        for place in places:
            assert kinds[place] == (times[words[place - 1]] > 1)


def test_tasks_of_a_batch_take_turns():
    batch = Lessons(0, ("zoo_recall", "zoo_forgetting")).batch(step=3, length=96, tokens=480)
    kinds = [set(kinds[answers].tolist()) for kinds, answers in zip(batch.kinds, batch.answers, strict=True)]
    assert kinds == [{0}, {1, 2}, {0}, {1, 2}, {0}]


# ---- the model -------------------------------------------------------------------------------------------------------


def test_the_shipped_model_answers_the_newest_value_where_the_others_guess():
    assert "zoo-forgetting" in aliases
    found = {
        name: accuracy(evomem.models.load(name), "zoo_forgetting", 128, 24)
        for name in ("zoo-forgetting", "zoo-gpt-neox")
    }
    assert all(kinds["zoo_forgetting"][0] >= 0.95 for kinds in found.values())
    assert found["zoo-forgetting"][RESTATED][0] >= 0.95
    assert found["zoo-gpt-neox"][RESTATED][0] <= 0.8  # it was never told which of two values counts


def test_what_is_left_of_an_old_value_misleads_the_model():
    """Without the newest statement the model says the older one: what forgetting is worth is not nothing."""
    loaded = evomem.models.load("zoo-forgetting")
    task = build("zoo_forgetting", loaded.tokenizer, 256)
    stale = 0
    samples = task.samples(Split.SEALED, 20, 0)[::2]
    for sample in samples:
        key, (newest,) = sample.meta["key"], sample.references
        text = sample.context.replace(f"{key} {newest}", "fox") + sample.question
        with torch.no_grad():
            logits = loaded.model(torch.tensor([loaded.tokenizer.encode(text)])).logits[0, -1]
        stale += loaded.tokenizer.decode(logits.argmax()).strip() in sample.meta["stale"]
    assert stale >= 0.9 * len(samples)


def test_restated_keys_are_lost_with_their_slots():
    loaded = evomem.models.load("zoo-forgetting")
    task = build("zoo_forgetting", loaded.tokenizer, 256)
    evaluator = Evaluator(loaded)
    managers = [build_manager("full"), build_manager("streaming_llm", budget=16)]
    rows = [evaluator.evaluate(managers, sample, task) for sample in task.samples(Split.SEALED, 12, 0)]
    full, few = (sum(one.loglik for one in column) / len(column) for column in zip(*rows, strict=True))
    assert full > few + 1
