"""A user's own questions, the metrics they choose among, and the chance check."""

import json
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomem.errors import TaskError
from evomem.tasks import Split, build
from evomem.tasks.chance import check
from evomem.tasks.metrics import exact_match, normalise, rouge_l, substring_share, token_f1
from tests.support.toy_tokenizer import ToyTokenizer, size

ROW = {"context": "The sky is blue.", "question": "Which colour?", "answers": ["blue"], "metric": "exact", "id": "a"}


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return f"file:{path}"


def test_rows_become_samples_once_each(tmp_path):
    rows = [{**ROW, "id": f"row {i}", "answers": [f"blue {i}", "azure"]} for i in range(200)]
    task = build(write(tmp_path / "t.jsonl", rows), ToyTokenizer())
    found, sizes = [], []
    for split in Split:
        n = _count(task, split)
        samples = task.samples(split, n, seed=7)
        with pytest.raises(TaskError, match=f"has only {n} rows"):
            task.samples(split, n + 1, seed=7)
        found += [sample.references[0] for sample in samples]
        sizes.append(n)
    assert sorted(found) == sorted(row["answers"][0] for row in rows)
    assert 90 <= sizes[0] <= 150
    assert min(sizes) >= 20
    assert all(sample.answer == f" {sample.references[0]}" for sample in samples)
    assert all(sample.question == "\nWhich colour?" for sample in samples)


def test_a_row_keeps_its_split_when_rows_are_added(tmp_path):
    rows = [{**ROW, "id": i} for i in range(60)]
    few = build(write(tmp_path / "few.jsonl", rows[:40]), ToyTokenizer())
    many = build(write(tmp_path / "many.jsonl", rows[::-1]), ToyTokenizer())
    for split in Split:
        a, b = (
            {s.id for s in t.samples(split, n, 0)} for t, n in ((few, _count(few, split)), (many, _count(many, split)))
        )
        assert a <= b


def _count(task, split):
    n = 0
    while True:
        try:
            task.samples(split, n + 1, 0)
        except TaskError:
            return n
        n += 1


def test_named_splits_and_likelihood_rows(tmp_path):
    rows = [{**ROW, "id": f"{s}{i}", "split": s, "metric": "loglik"} for s in ("train", "sealed") for i in range(3)]
    task = build(write(tmp_path / "t.jsonl", rows), ToyTokenizer())
    assert not task.has_exact
    for split in (Split.TRAIN, Split.SEALED):
        samples = task.samples(split, 3, seed=0)
        assert {sample.id for sample in samples} == {f"file/{split}/{split}{i}" for i in range(3)}
        assert all(sample.max_new_tokens == 0 for sample in samples)
        with pytest.raises(TaskError, match="likelihood only"):
            task.score(samples[0], "blue")
    with pytest.raises(TaskError, match=r"select split of .* is empty"):
        task.samples(Split.SELECT, 1, seed=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"context": ', "t.jsonl:3: not JSON"),
        ("[1, 2]", "t.jsonl:3: field the whole line"),
        ('{"question": "b", "answers": ["c"]}', "t.jsonl:3: field context: is required and missing"),
        ('{"context": "", "question": "b", "answers": ["c"]}', "t.jsonl:3: field context"),
        ('{"context": "a", "question": "b", "answers": []}', "t.jsonl:3: field answers"),
        ('{"context": "a", "question": "b", "answers": ["c", 4]}', "t.jsonl:3: field answers.1"),
        ('{"context": "a", "question": "b", "answers": ["c"], "metric": "bleu"}', "t.jsonl:3: field metric"),
        ('{"context": "a", "question": "b", "answers": ["c"], "metrics": "f1"}', "did you mean 'metric'"),
        ('{"context": "a", "question": "b", "answers": ["c"], "split": "test"}', "t.jsonl:3: field split"),
        ('{"context": "a", "question": "b", "answers": ["c"], "id": "a"}', "'a' is the id of line 1 already"),
    ],
)
def test_damaged_rows_name_file_line_and_field(tmp_path, line, message):
    with pytest.raises(TaskError) as caught:
        build(write(tmp_path / "t.jsonl", [ROW, "", line]), ToyTokenizer())
    assert message in str(caught.value)


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(TaskError, match="no rows"):
        build(write(tmp_path / "empty.jsonl", ["", "  "]), ToyTokenizer())
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskError, match="UTF-8"):
        build(f"file:{binary}", ToyTokenizer())


def test_other_fields_are_the_users_own(tmp_path):
    row = {**ROW, "source": "here", "year": 1999, "split": "train"}
    (sample,) = build(write(tmp_path / "t.jsonl", [row]), ToyTokenizer()).samples(Split.TRAIN, 1, 0)
    assert sample.context == ROW["context"]


@pytest.mark.parametrize("length", [20, 21, 50, 119, 5000])
def test_long_contexts_are_cut_in_the_middle(tmp_path, length):
    words = [f"{a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]
    row = {**ROW, "context": " ".join(words), "split": "train"}
    task = build(write(tmp_path / "t.jsonl", [row]), ToyTokenizer(), length)
    (sample,) = task.samples(Split.TRAIN, 1, 0)
    kept = sample.context.split(" ")
    # The slow path: the most words, from both ends alike, with which the sample fits.
    rest = size(sample) - len(kept)
    n = min(len(words), length - rest)
    assert kept == words[: (n + 1) // 2] + words[len(words) - n // 2 :]
    assert size(sample) <= length


def test_a_question_longer_than_the_length_is_refused(tmp_path):
    task = build(write(tmp_path / "t.jsonl", [{**ROW, "split": "train"}]), ToyTokenizer(), 3)
    with pytest.raises(TaskError, match=r"row a: .* no room for the context"):
        task.samples(Split.TRAIN, 1, 0)


WORDS = st.lists(st.sampled_from(["red", "green", "blue", "sky"]), max_size=7)


@given(WORDS, WORDS)
def test_rouge_l_equals_the_recursive_definition(reference, output):
    @cache
    def longest(i: int, j: int) -> int:
        if i == len(reference) or j == len(output):
            return 0
        if reference[i] == output[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    common = longest(0, 0)
    if not reference or not output:
        expected = float(reference == output)
    else:
        precision, recall = common / len(output), common / len(reference)
        expected = 2 * precision * recall / (precision + recall) if common else 0.0
    assert rouge_l([" ".join(reference)], " ".join(output)) == pytest.approx(expected)


@given(WORDS, WORDS)
def test_f1_equals_the_counted_definition(reference, output):
    left, common = list(reference), 0
    for word in output:
        if word in left:
            left.remove(word)
            common += 1
    if not reference or not output:
        expected = float(reference == output)
    else:
        precision, recall = common / len(output), common / len(reference)
        expected = 2 * precision * recall / (precision + recall) if common else 0.0
    assert token_f1(["none of these", " ".join(reference)], " ".join(output)) == pytest.approx(expected)


@given(st.text(max_size=40))
def test_normalising_settles_and_matches_itself(text):
    assert normalise(normalise(text).upper()) == normalise(text.upper())
    if normalise(text) or not text.strip():
        assert exact_match([text], f"  The {text}!") == 1.0


def test_metrics_take_the_best_reference_and_count_every_value():
    assert exact_match(["Paris", "the City of Light"], "city of light.") == 1.0
    assert exact_match(["Paris"], "Paris, France") == 0.0
    assert substring_share(["1", "2", "3", "4"], "1 and 3") == 0.5
    assert token_f1(["x", "a red sky"], "red") == pytest.approx(2 / 3)


@pytest.mark.parametrize("metric", [exact_match, token_f1, rouge_l, substring_share])
@pytest.mark.parametrize("answer", ["A", "the", "an", "?", "...", "(A)", "--"])
def test_an_answer_that_normalising_leaves_nothing_of_is_not_equal_to_nothing(metric, answer):
    """Choices are often called A to D, and "A" is an article: every empty output would have been right."""
    for output in ("", " ", "B", ";"):
        assert metric([answer], output) == 0.0
    assert metric([answer], f" {answer.lower()}\n") == 1.0
    assert metric(["B", answer], answer) >= 0.5


def test_nothing_is_found_nowhere():
    assert substring_share([" ", "", "red"], "a red sky") == pytest.approx(1 / 3)


def test_chance_check_passes_what_the_context_helps_and_refuses_the_rest():
    random = np.random.default_rng(0)
    without = -2.5 + random.normal(0, 0.3, 24)
    helped = check("needle", [1.0, 0.0], 0.0, without + 2 + random.normal(0, 0.5, 24), without)
    assert helped.passed
    assert helped.interval[0] < helped.gain < helped.interval[1]
    helped.require()

    # No effect, an effect too small to matter, and an effect that one lucky sample makes.
    small, lucky = without + 0.05, without.copy()
    lucky[0] += 30.0
    for full in (without + random.normal(0, 0.5, 24), small, lucky, without - 1.0):
        report = check("needle", [], 0.25, full, without)
        assert not report.passed
        assert report.exact is None
        with pytest.raises(TaskError, match="task needle measures nothing on this model"):
            report.require()
    json.dumps(report.to_json())


def test_chance_check_refuses_unusable_numbers():
    with pytest.raises(TaskError, match="at least 2"):
        check("needle", [], 0.0, [-1.0], [-2.0])
    with pytest.raises(TaskError, match="sample 1 has log-likelihoods nan"):
        check("needle", [], 0.0, [-1.0, float("nan")], [-2.0, -2.0])
