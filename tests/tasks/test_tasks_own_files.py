"""A user's own file: rows that are damaged, contexts of any script that are too long, and files of few rows."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from evomem.cli.app import app
from evomem.errors import TaskError
from evomem.evaluation import Evaluator
from evomem.models import LoadedModel
from evomem.tasks import Split, build
from evomem.tasks.base import at_hand
from evomem.tasks.splits import split_of
from evomem.tasks.text import file_rows
from evomem.tasks.text.cutting import cut_end, cut_middle, token_ends
from evomem.tasks.text.file_rows import divide, read_entries
from tests.support.toy_tokenizer import ToyTokenizer

ROW = {"context": "The sky is blue.", "question": "Which colour?", "answers": ["blue"]}
SCRIPTS = {
    "lines": "\n".join(f"{number}\tthe_value_of_{number * 7919}" for number in range(400)),
    "code": "\n".join(f"def f{n}(x):\n\treturn{{x:[{n},{n * n}]}}\n" for n in range(150)),
    "chinese": "天空是藍色的,草是綠色的。太陽很亮,我們走吧!" * 60,
    "thai": "ท้องฟ้าเป็นสีฟ้าหญ้าเป็นสีเขียว" * 40,
    "emoji": "🌞🌧👩‍👩‍👧🇩🇪" * 60,
    "one word": "pneumono" * 400,
    "words": "the grass is green and the sky is blue here we go " * 60,
}


def written(path: Path, *rows: dict | str | bytes) -> str:
    """Write a file of rows; return its spec."""
    texts = [json.dumps(row) if isinstance(row, dict) else row for row in rows]
    path.write_bytes(b"\n".join(text.encode() if isinstance(text, str) else text for text in texts))
    return f"file:{path}"


# ---- too long --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("length", [40, 41, 150])
def test_contexts_of_every_script_are_cut_at_tokens(smollm2: LoadedModel, tmp_path, script: str, length: int) -> None:
    whole = SCRIPTS[script]
    spec = written(tmp_path / "t.jsonl", {**ROW, "context": whole, "split": "train"})
    (sample,) = build(spec, smollm2.tokenizer, length).samples(Split.TRAIN, 1, 0)
    tokens = Evaluator(smollm2).tokens(sample)
    size = sum(part.shape[1] for part in vars(tokens).values())
    assert length - 8 <= size <= length  # a character takes up to four tokens, and the ends of two halves up to two
    # A beginning and an end of the context, both about as long, and no half characters.
    at = max(n for n in range(len(sample.context) + 1) if whole.startswith(sample.context[:n]))
    assert any(whole.endswith(sample.context[n:]) for n in range(at + 1))
    assert sample.context.encode().decode() == sample.context
    if script != "words":
        assert "�" not in smollm2.tokenizer.decode(tokens.read[0])


@pytest.mark.parametrize("script", ["lines", "one word", "chinese"])
def test_tokenizers_that_do_not_tell_where_tokens_are(script: str) -> None:
    class Letters:
        """Every four letters are a token."""

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [1] * (-(-len(text) // 4))

    def fits(text: str) -> bool:
        return len(Letters().encode(text)) <= 50

    whole = SCRIPTS[script]
    kept = cut_middle(Letters(), whole, fits, 50)
    assert kept is not None
    assert (150 if script == "lines" else 197) <= len(kept) <= 200
    half = len(kept) // 2 - 20
    assert (kept[:half], kept[-half:]) == (whole[:half], whole[-half:])
    assert cut_middle(Letters(), whole, lambda text: False, 50) is None
    assert cut_end(Letters(), whole, fits, 50) == whole[:58]


@settings(max_examples=60)
@given(st.text(alphabet="ab .\n好🌞é\u0301", max_size=40), st.integers(0, 12))
def test_the_cut_is_the_longest_that_fits(text: str, most: int) -> None:
    """Against trying every number of tokens, on a real tokenizer of bytes."""
    tokenizer = _bytes_tokenizer()

    def fits(part: str) -> bool:
        return len(tokenizer.encode(part, add_special_tokens=False)) <= most

    ends = token_ends(tokenizer, text)
    assert ends == list(range(len(text) + 1))  # a character is the least that is left out
    kept = cut_middle(tokenizer, text, fits, most)
    best = next((n for n in range(len(text), 0, -1) if fits(text[: (n + 1) // 2] + text[len(text) - n // 2 :])), 0)
    if kept is None:
        assert not best or not fits(text[:1])
    else:
        assert fits(kept)
        assert len(kept) <= best
        sizes = {len(one.encode()) for one in text}
        assert len(sizes) > 1 or len(kept) == best
    end = cut_end(tokenizer, text, fits, most)
    assert (end or "") == text[: len(end or "")]
    assert fits(end or "")
    assert len(end or "") == len(text) or not fits(text[: len(end or "") + 1])


def _bytes_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def test_a_book_without_blanks_has_answers(smollm2: LoadedModel, tmp_path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(
        "\n\n".join(f"第{n}天,天空是藍色的,草是綠色的。我們走了{n}步!" for n in range(80)), encoding="utf-8"
    )
    task = build(f"book:essay={path},length=200,continuation=40", smollm2.tokenizer)
    for sample in task.samples(Split.TRAIN, 3, 0):
        tokens = Evaluator(smollm2).tokens(sample)
        assert 24 <= tokens.answer.shape[1] <= 40
        assert 100 < sum(part.shape[1] for part in vars(tokens).values()) <= 204


# ---- damaged ---------------------------------------------------------------------------------------------------------

DEEP = '{"context": ' + "[" * 100_000 + "]" * 100_000 + "}"
BAD = {
    "brackets": (DEEP, "nested more than 32"),
    "braces": ('{"a":' * 100_000, "nested more than 32|not JSON"),
    "digits": ('{"context": "a", "question": "b", "answers": ["c"], "id": ' + "9" * 5000 + "}", "integer of 5,000"),
    "twice": ('{"context": "a", "context": "x", "question": "b", "answers": ["c"]}', "context: is given twice"),
    "NaN": ('{"context": "a", "question": "b", "answers": ["c"], "weight": NaN}', "NaN"),
    "infinite": ('{"context": "a", "question": "b", "answers": ["c"], "weight": 1e999}', "1e999"),
    "half a character": ('{"context": "\\ud800", "question": "b", "answers": ["c"]}', "half a character"),
    "unseen answer": ('{"context": "a", "question": "b", "answers": ["\u200b\u3164 "]}', "field answers.0: is blank"),
    "answer of no letters": ('{"context": "a", "question": "b", "answers": ["\\u0000"]}', "field answers.0: is blank"),
    "blank answer": ('{"context": "a", "question": "b", "answers": [" "]}', "field answers.0: is blank"),
    "blank second answer": (
        '{"context": "a", "question": "b", "answers": ["c", "\\n\\t"]}',
        "field answers.1: is blank",
    ),
    "blank context": ('{"context": " \\u3000", "question": "b", "answers": ["c"]}', "field context: is blank"),
    "blank question": ('{"context": "a", "question": " ", "answers": ["c"]}', "field question: is blank"),
    "long id": ('{"context": "a", "question": "b", "answers": ["c"], "id": "' + "x" * 10_000 + '"}', "field id"),
    "escapes": ('{"context": "a", "question": "b", "answers": ["c"], "split": "\\u001b[2J"}', "field split"),
    "endless": ('{"context": "a", "question": "b", "answers": ["c"], "max_new_tokens": 10000000000}', "field max_new"),
    "latin-1": ('{"context": "caf\xe9"}'.encode("latin-1"), "is not UTF-8 text"),
    "UTF-16": ('{"context": "a"}'.encode("utf-16"), "is not UTF-8 text"),
    "a number": ("1e3", "the whole line"),
    "a text": ('"x"', "the whole line"),
    "null": ("null", "the whole line"),
    "two objects": ("{} {}", "not JSON"),
}


@pytest.mark.parametrize("what", BAD)
def test_damaged_rows_are_one_line_of_error(tmp_path, what: str) -> None:
    line, message = BAD[what]
    spec = written(tmp_path / "t.jsonl", ROW, "", line)
    with pytest.raises(TaskError, match=message) as caught:
        build(spec, ToyTokenizer())
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 't.jsonl'}:3: ")
    assert len(text) < 600
    assert text.isprintable()


def test_rows_that_are_fine_as_they_are(tmp_path) -> None:
    """A byte order mark, lines of Windows, separators of Unicode in texts and ids, no line feed at the end."""
    odd = {**ROW, "id": "a\u2028b", "context": "one\u2028two\u0085three\x0cfour\rfive", "split": "train"}
    lines = [b"\xef\xbb\xbf" + json.dumps({**ROW, "split": "train"}).encode() + b"\r", b"\r", b" ", json.dumps(odd)]
    lines.append(json.dumps({**odd, "id": "c"}, ensure_ascii=False))
    task = build(written(tmp_path / "t.jsonl", *lines), ToyTokenizer())
    samples = {sample.id: sample for sample in task.samples(Split.TRAIN, 3, 0)}
    assert sorted(samples) == ["file/train/1", "file/train/a\u2028b", "file/train/c"]
    assert samples["file/train/c"].context == samples["file/train/a\u2028b"].context == odd["context"]


def test_what_is_no_file_and_what_has_no_end(tmp_path, monkeypatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero", "/dev/null", tmp_path / "none", "a\0b", "x" * 300):
        with pytest.raises(TaskError, match=r"no regular file|cannot read|no rows"):
            build("file", ToyTokenizer(), path=str(path))
    spec = written(tmp_path / "t.jsonl", {**ROW, "context": "x" * 5000}, ROW)
    for name, bound, message in (
        ("LINE_BYTES", 1000, "t.jsonl:1: the line has more than 1,000 bytes"),
        ("FILE_BYTES", 1000, "more than 1,000 bytes or"),
        ("ROWS", 1, "or 1 lines"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(file_rows, name, bound)
            with pytest.raises(TaskError, match=re.escape(message)):
                build(spec, ToyTokenizer())


def test_an_answer_that_the_tokenizer_has_no_token_for(tmp_path) -> None:
    spec = written(tmp_path / "t.jsonl", {**ROW, "answers": ["\u00ac"], "split": "train"})

    class Silent(ToyTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return super().encode(text.replace("\u00ac", "").strip(), add_special_tokens)

    with pytest.raises(TaskError, match=r"t.jsonl:1: field answers.0: .* no token"):
        build(spec, Silent()).samples(Split.TRAIN, 1, 0)


# ---- few rows --------------------------------------------------------------------------------------------------------


@given(st.sets(st.text(alphabet="abcdefgh", min_size=1, max_size=3), min_size=1, max_size=12))
def test_every_split_of_a_small_file_has_rows(names: set[str]) -> None:
    entries = [file_rows.Entry(file_rows.Row(**ROW, id=name), name, n) for n, name in enumerate(sorted(names))]
    division = divide(entries)
    found = {split: {entry.identity for entry in part} for split, part in division.entries.items()}
    again = divide(entries[::-1])  # whatever the order of the lines
    assert found == {split: {entry.identity for entry in part} for split, part in again.entries.items()}
    assert all(found.values())
    assert set().union(*found.values()) == names
    usual = {split: {e.identity for e in entries if split_of(e.identity) is split} for split in Split}
    if all(usual.values()):
        assert (found, division.note) == (usual, "")
        return
    assert division.note.startswith(f"{len(names)} row")
    assert len(names) < 2 or not found[Split.TRAIN] & found[Split.SEALED]
    if len(names) >= 3:
        assert sum(map(len, found.values())) == len(names)
        assert sum(len(found[split] - usual[split]) for split in Split) == sum(not part for part in usual.values())


def test_rows_that_name_their_split_are_left_where_they_are(tmp_path) -> None:
    spec = written(tmp_path / "t.jsonl", *({**ROW, "id": i, "split": "sealed"} for i in range(4)))
    task = build(spec, ToyTokenizer())
    assert [task.available(split) for split in Split] == [0, 0, 4]
    assert at_hand(task, Split.SEALED, 50) == 4
    with pytest.raises(TaskError, match=r"train split of .* is empty, 50 were asked for"):
        task.samples(Split.TRAIN, at_hand(task, Split.TRAIN, 50), 0)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_comparison_uses_what_is_there(tmp_path, rows: int) -> None:
    texts = [f"magic fox {n} 4 7 1. the cat is here." for n in range(rows)]
    own = [{"context": t, "question": " magic fox", "answers": [t[10:17]]} for t in texts]
    spec = written(tmp_path / "own.jsonl", *own)
    words = ["compare", "keydiff", "--task", spec, "--model", "zoo-qwen3", "--budgets", "8", "--against", "random"]
    done = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "rows.json"), "--no-check"])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert f"{rows} row" in said
    assert "of 50 samples: the sealed split has no more" in said
    found = json.loads((tmp_path / "rows.json").read_text())
    count = len(read_entries(tmp_path / "own.jsonl")) and found[0]["samples"]
    assert ("of 1 sample there is no interval" if count == 1 else f"an interval of {count} samples") in said
    assert all(("interval" not in row or row["interval"] is None) == (count == 1) for row in found if row["difference"])
