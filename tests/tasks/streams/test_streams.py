"""Streams of requests: what the text says, the arrays say; what an item's newest value is; what vectors promise."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from evomem.errors import ConfigError, TaskError
from evomem.tasks import Split, build, tasks
from evomem.tasks.streams.base import NOTHING, StreamTask, parse_requests
from evomem.tasks.streams.drawing import topic_items, topic_path, zipf
from tests.support.toy_tokenizer import ToyTokenizer

STREAMS = [name for name in tasks.names() if issubclass(tasks.get(name), StreamTask)]


def drawn(spec: str, n: int = 3, split: Split = Split.TRAIN, seed: int = 0):
    task = build(spec, ToyTokenizer())
    return task, [(sample, task.stream(sample)) for sample in task.samples(split, n, seed)]


@pytest.mark.parametrize("name", STREAMS)
def test_arrays_say_what_a_dictionary_that_reads_the_words_says(name):
    task, pairs = drawn(name)
    for sample, stream in pairs:
        newest: dict[str, str] = {}
        answers = []
        for number, word in enumerate(sample.context.split()):
            item, written, value = word.partition("=")
            read, write = not written, not item.endswith("?")
            item = item.removesuffix("?")
            if write:
                newest[item] = value or newest.get(item, item)
            if read:
                answers.append(newest[item])
            assert (str(stream.ids[number]), str(stream.values[number])) == (item, newest[item])
            assert (stream.reads[number], stream.writes[number]) == (read, write)
        assert len(stream) == task.options.length == len(sample.context.split())
        assert tuple(answers) == sample.references
        assert not stream.reads[stream.filler].any()


@pytest.mark.parametrize("name", STREAMS)
def test_vectors_are_of_norm_one_and_an_items_own(name):
    task, pairs = drawn(f"{name}:noise=0,length=400")
    for sample, stream in pairs:
        assert stream.keys.dtype == stream.value_vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(stream.keys, axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(stream.value_vectors, axis=1), 1, atol=1e-6)
        items, first, which = np.unique(stream.ids, return_index=True, return_inverse=True)
        assert (stream.keys == stream.keys[first][which]).all()
        assert len(np.unique(stream.keys, axis=0)) == len(items)
        assert len(np.unique(stream.value_vectors, axis=0)) == len(stream.value_vectors) > stream.values.max()
        again = task.stream(sample)
        assert all((getattr(again, part) == getattr(stream, part)).all() for part in vars(stream))
    other = pairs[1][1].keys, pairs[2][1].keys
    assert not (other[0][:50] == other[1][:50]).all(1).any(), "streams share key vectors"


@pytest.mark.parametrize("name", STREAMS)
def test_noise_is_on_what_is_read_and_has_the_norm_that_was_asked_for(name):
    clean, noisy = (drawn(f"{name}:noise={noise},length=400,dim=512", 1)[1][0][1] for noise in (0, 0.5))
    assert (clean.ids == noisy.ids).all()
    assert (clean.keys == noisy.keys)[~clean.reads].all()
    cosines = (clean.keys * noisy.keys).sum(1)[clean.reads]
    assert abs(cosines.mean() - 1 / np.sqrt(1 + 0.5**2)) < 0.02


@pytest.mark.parametrize("name", STREAMS)
def test_the_score_is_the_share_of_reads_with_the_right_word(name):
    task, [(sample, stream), *_] = drawn(f"{name}:length=300", 1)
    words = sample.answer.split()
    assert len(words) == stream.reads.sum() == sample.max_new_tokens
    half = [word if number % 2 else NOTHING for number, word in enumerate(words)]
    assert task.score(sample, " ".join(half)) == (len(words) // 2) / len(words)
    assert task.score(sample, " ".join(words[: len(words) // 2])) == (len(words) // 2) / len(words)


def test_an_unreadable_request_is_refused_with_its_word():
    for text, message in {
        "1 2 x": "request 2 is 'x'",
        "1=": "request 0 is '1='",
        "1?=2": "'1[?]=2'",
        "1 2?": "'2[?]', reads an item that has no value yet",
    }.items():
        with pytest.raises(TaskError, match=message):
            parse_requests(text, 10)
    requests = parse_requests("1 1=7 1? 3", 3)
    assert requests.values.tolist() == [1, 7, 7, 3]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zipf:keys=4", "4 keys are too few for 8 topics"),
        ("zipf:fewest_keys=500", "fewest_keys 500 is more than the 400"),
        ("noisy_recall:length=20", "ask for a length of at least 32"),
        ("key_overwrites:length=1", "one request"),
        ("zipf:filler=1", "filler"),
        ("zipf:dim=1", "dim"),
    ],
)
def test_what_cannot_be_drawn_is_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        build(spec, ToyTokenizer())


def test_ranks_follow_zipfs_law():
    draw = np.random.default_rng(0)
    counts = np.bincount(zipf(draw, 1.3, np.full(200_000, 5)), minlength=5) / 200_000
    expected = np.arange(1, 6) ** -1.3
    np.testing.assert_allclose(counts, expected / expected.sum(), atol=4e-3)
    mixed = np.tile([1, 3], 500)
    ranks = zipf(draw, 0.0, mixed)
    assert (ranks < mixed).all()
    assert set(ranks[1::2]) == {0, 1, 2}


def test_topics_change_as_often_as_asked_and_items_belong_to_theirs():
    draw = np.random.default_rng(0)
    path = topic_path(draw, 100_000, 5, 40)
    changes = (path[1:] != path[:-1]).mean()
    assert abs(changes - 1 / 40) < 2e-3
    items = topic_items(draw, 0.5, path, 13, 5)
    assert (items % 5 == path).all()
    assert set(items) == set(range(13))


def test_similarity_is_the_cosine_within_a_topic():
    _, pairs = drawn("context_switches:similarity=0.6,dim=256,topics=4,filler=0.2,filler_keys=3", 2)
    for _, stream in pairs:
        items, first = np.unique(stream.ids, return_index=True)
        topic = np.where(items < 240, items % 4, 4)
        cosines = stream.keys[first] @ stream.keys[first].T
        same = (topic[:, None] == topic) & ~np.eye(len(items), dtype=bool)
        assert abs(cosines[same].mean() - 0.6) < 0.02
        assert abs(cosines[topic[:, None] != topic].mean()) < 0.05


def test_few_and_many_items_at_equal_length_and_filler_that_adds_none():
    task, pairs = drawn("zipf:keys=200,fewest_keys=25,topics=4,scans=0.0,length=600", 40)
    rates = {}
    for sample, stream in pairs:
        assert len(stream) == 600
        rates.setdefault(sample.meta["items"], []).append(stream.distinct_rate)
    assert sorted(rates) == [25, 50, 100, 200]
    means = [np.mean(rates[items]) for items in sorted(rates)]
    assert all(2 * few > many > 1.3 * few for few, many in pairwise(means))
    assert task.uniform_chance == pytest.approx(np.mean([1 / 25, 1 / 50, 1 / 100, 1 / 200]))
    for share in (0.0, 0.3, 0.6):
        _, pairs = drawn(f"zipf:keys=40,exponent=0.2,filler={share},length=2000,scans=0", 2)
        for _, stream in pairs:
            assert abs(stream.filler.mean() - share) < 0.05
            assert len(np.unique(stream.ids[stream.reads])) == 40


def test_scans_ask_for_one_item_after_another():
    _, [(_, stream)] = drawn("zipf:scans=1,scan_length=25,keys=100,length=1000", 1)
    follows = (stream.ids[1:] - stream.ids[:-1]) % 100 == 1
    assert follows.mean() > 24 / 25 - 0.01
    _, [(_, stream)] = drawn("zipf:scans=0.3,scan_length=50,keys=400,length=20000", 1)
    follows = (stream.ids[1:] - stream.ids[:-1]) % 400 == 1
    assert abs(follows.mean() - 0.3) < 0.06


def test_every_write_gives_its_item_a_value_that_nobody_had():
    _, pairs = drawn("key_overwrites:length=3000,keys=30,reads=0.4")
    for _, stream in pairs:
        assert stream.values[stream.writes].tolist() == list(range(int(stream.writes.sum())))
        assert (stream.reads != stream.writes).all()
        assert abs(stream.reads.mean() - 0.4) < 0.05
        newest = dict(zip(stream.ids.tolist(), stream.values.tolist(), strict=True))
        assert len(set(newest.values())) == len(newest) == 30
        read, written = (np.bincount(stream.ids[part], minlength=30) for part in (stream.reads, stream.writes))
        assert read.max() > 2 * np.median(read)
        assert written.max() > 2 * np.median(written)


def test_every_pair_amid_noise_is_stated_as_often_as_asked_and_read_once_at_the_end():
    _, pairs = drawn("noisy_recall:length=200,keys=10,repeats=3,marker=0.8,noise=0,dim=128")
    for _, stream in pairs:
        written = stream.ids[stream.writes]
        assert len(written) == 190
        assert np.bincount(written)[:10].tolist() == [3] * 10
        assert len(np.unique(written)) == 190 - 20
        assert sorted(stream.ids[stream.reads]) == list(range(10))
        assert stream.reads[-10:].all()
        noise = stream.keys[:190][written >= 10]
        assert abs((noise @ noise.T)[~np.eye(len(noise), dtype=bool)].mean() - 0.8) < 0.03


def test_options_of_vectors_change_no_requests():
    plain, other = (drawn(spec, 2)[1] for spec in ("key_overwrites", "key_overwrites:dim=8,noise=0.3"))
    assert [sample.context for sample, _ in plain] == [sample.context for sample, _ in other]
    json.dumps([sample.meta for sample, _ in plain])
