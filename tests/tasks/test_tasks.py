"""Invariants that every task keeps, and the building of tasks from specs."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem.errors import ConfigError, TaskError, UnknownNameError
from evomem.tasks import Split, Task, build, tasks
from evomem.tasks.fitting import UnitCounts, fit
from evomem.tasks.streams.base import StreamTask
from evomem.tasks.text.prose import load_prose
from tests.support.processes import elsewhere
from tests.support.toy_tokenizer import ToyTokenizer, size


@pytest.fixture
def questions(tmp_path):
    rows = [
        {"id": f"q{i}", "context": f"Number {i}. " + "word " * i, "question": "Which?", "answers": [str(i), "x"]}
        for i in range(60)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture(params=tasks.names())
def task(request, questions) -> Task:
    spec = f"file:{questions}" if request.param == "file" else request.param
    return build(spec, ToyTokenizer())


def test_every_task_is_a_task(task):
    assert isinstance(task, Task)
    assert tasks.get(task.name) is type(task)
    assert 0.0 <= task.uniform_chance < 1.0


def test_fewer_samples_are_the_first_of_more(task):
    for split in Split:
        more = task.samples(split, 6, seed=3)
        assert task.samples(split, 2, seed=3) == more[:2]
        assert len({sample.id for sample in more}) == 6
        assert task.samples(str(split), 6, seed=3) == more


def test_seeds_and_splits_give_other_samples(task):
    drawn = [task.samples(split, 4, seed) for split in Split for seed in (0, 1)]
    texts = [tuple((sample.context, sample.answer) for sample in samples) for samples in drawn]
    assert len(set(texts)) == len(texts)
    ids = [{sample.id for sample in samples} for samples in drawn]
    if task.name != "file":  # a file's row keeps its name whatever the seed
        assert len(set().union(*ids)) == sum(map(len, ids))


def test_the_answer_scores_one_and_silence_nothing(task):
    for sample in task.samples(Split.SELECT, 4, seed=0):
        assert sample.answer[0] == " "
        assert sample.question
        json.dumps(sample.meta)
        if not task.has_exact:
            assert sample.max_new_tokens == 0
            with pytest.raises(TaskError, match="likelihood only"):
                task.score(sample, sample.answer)
            continue
        assert sample.max_new_tokens > 0
        expected = 1.0 if task.name != "file" else 0.5  # the file's answers are alternatives, one of two is said
        assert task.score(sample, sample.answer) >= expected
        assert task.score(sample, "") == 0.0


def test_describe_rebuilds_the_task(task):
    options = json.loads(json.dumps(task.describe()))
    again = build(task.name, ToyTokenizer(), **options)
    assert again.describe() == task.describe()
    assert again.samples(Split.TRAIN, 3, seed=1) == task.samples(Split.TRAIN, 3, seed=1)


def contexts():
    """The second context of every task that needs no file."""
    names = [name for name in tasks.names() if name != "file"]
    return [build(name, ToyTokenizer()).samples(Split.SELECT, 2, 5)[1].context for name in names]


def test_samples_do_not_depend_on_the_process():
    assert elsewhere(contexts) == contexts()


OWN_LENGTH = {"file", "mqar", "forgetting_mqar", "tmaze", "cartpole", "regbench"}
OWN_LENGTH |= {name for name in tasks.names() if issubclass(tasks.get(name), StreamTask)}
"""Tasks whose length follows from something else: a file's rows, pairs, words of an episode, requests."""


@pytest.mark.parametrize("name", [name for name in tasks.names() if name not in OWN_LENGTH])
@pytest.mark.parametrize("length", [300, 700])
def test_length_is_reached_within_one_unit(name, length):
    task = build(name, ToyTokenizer(), length)
    count = UnitCounts(ToyTokenizer())
    if name == "multikey_3":
        key = "123e4567-e89b-42d3-a456-426614174000"
        longest = count(f"One of the special magic uuids for {key} is: {key}.") + 24  # digits are tokens: lines differ
    else:
        longest = max(map(count, load_prose(Split.TRAIN).sentences))
    for sample in task.samples(Split.TRAIN, 12, seed=0):
        assert length - longest - 1 <= size(sample) <= length


@pytest.mark.parametrize("name", ["mqar", "forgetting_mqar"])
@pytest.mark.parametrize("options", [{"length": 64}, {"length": 512}, {"separator": "none", "filler": "words"}])
def test_recall_is_no_longer_than_asked(name, options):
    task = build(name, ToyTokenizer(), **options)
    assert all(size(sample) <= task.describe()["length"] for sample in task.samples(Split.SELECT, 20, seed=0))


@settings(max_examples=150, deadline=None)
@given(
    units=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    around=st.integers(0, 30),
    saved=st.integers(-3, 3),
    length=st.integers(0, 400),
)
def test_fit_equals_trying_every_number(units, around, saved, length):
    # Units count `saved` tokens more or less inside the text than they do alone, so that the first guess is wrong.
    def unit(n: int) -> str:
        return "x " * units[n % len(units)]

    def render(n: int) -> str:
        inside = ("x " * max(1, units[i % len(units)] - saved) for i in range(n))
        return "y " * around + "".join(inside)

    class Words:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [1] * len(text.split())

    counts = UnitCounts(Words())
    if around > length:
        with pytest.raises(TaskError, match=f"length {length} is too short.*at least {around}"):
            fit(length, render, unit, counts, "toy")
        return
    slow = next(n for n in range(length + 2) if len(render(n + 1).split()) > length)
    assert fit(length, render, unit, counts, "toy") == slow


def test_prose_splits_share_no_sentence():
    shares = [set(load_prose(split).sentences) for split in Split]
    assert sum(map(len, shares)) == len(set().union(*shares))
    assert all(len(share) >= 100 for share in shares)
    for sentence in set().union(*shares):
        assert re.fullmatch(r"[A-Z][^_=<>\[\]{}|*\"\n]*[.!?]", sentence)


def test_own_essay_is_divided_and_used(tmp_path):
    path = tmp_path / "essay.txt"
    path.write_text("\n\n".join(f"Sentence number {i} is here. It says word{i}." for i in range(60)), encoding="utf-8")
    seen = {}
    for split in Split:
        samples = build(f"single_2:essay={path}", ToyTokenizer(), 300).samples(split, 20, seed=0)
        seen[split] = set(re.findall(r"Sentence number \d+ is here", " ".join(sample.context for sample in samples)))
        assert seen[split]
    assert not seen[Split.TRAIN] & seen[Split.SEALED]
    assert not seen[Split.TRAIN] & seen[Split.SELECT]


def test_bad_essays_are_refused(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("One sentence. Another one.", encoding="utf-8")
    with pytest.raises(TaskError, match="2 distinct sentences are too few"):
        build("single_2", ToyTokenizer(), essay=str(short)).samples(Split.TRAIN, 1, 0)
    with pytest.raises(TaskError, match="cannot be read"):
        build("book", ToyTokenizer(), essay=str(tmp_path / "none.txt")).samples(Split.TRAIN, 1, 0)


def test_specs_set_options():
    task = build("passkey:length=320,haystack=essay", ToyTokenizer(), 100)
    assert task.describe() == {"length": 320, "haystack": "essay", "essay": None}
    assert build("multikey_1", ToyTokenizer(), 321).describe()["length"] == 321
    assert build("mqar", ToyTokenizer(), 512).uniform_chance == 1 / 64


def test_file_paths_may_hold_commas_and_equals_signs(tmp_path):
    path = tmp_path / "a=b,c.jsonl"
    path.write_text('{"context": "a", "question": "b", "answers": ["c"]}', encoding="utf-8")
    task = build(f"file:{path},length=50", ToyTokenizer())
    assert task.describe() == {"path": str(path), "length": 50}


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("multikey1", UnknownNameError, "Did you mean 'multikey_1'"),
        ("passkey:lenght=3", ConfigError, "no option 'lenght'. Did you mean 'length'"),
        ("passkey:length", ConfigError, "'length' is not option=value"),
        ("passkey:length=1,length=2", ConfigError, "given twice"),
        ("passkey:length=many", ConfigError, "task passkey: length: Input should be a valid integer"),
        ("passkey:haystack=hay", ConfigError, "haystack: Input should be 'noise' or 'essay' (got 'hay')"),
        ("mqar:length=64,pairs=30", TaskError, "too short for 30 pairs"),
        ("mqar:length=9000,pairs=1000", TaskError, "too few for 1000 pairs"),
        ("passkey:length=20", TaskError, "length 20 is too short"),
        ("book:length=100", TaskError, "length 100 is too short"),
        ("book:length=100000", TaskError, "is shorter than a length of 100000"),
        ("file", ConfigError, "path"),
        ("file:/no/such/file.jsonl", TaskError, "cannot read /no/such/file.jsonl"),
    ],
)
def test_errors_say_what_is_wrong(spec, error, message):
    with pytest.raises(error, match=re.escape(message)):
        build(spec, ToyTokenizer()).samples(Split.SEALED, 1, 0)
