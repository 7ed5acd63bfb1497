"""Checksummed lines: whatever happens to a line is noticed, and what it held is measured again."""

from __future__ import annotations

import json
import os
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem.errors import RunError
from evomem.files.checksummed_lines import LineChecks, checksummed
from evomem.runs import open_run, search
from evomem.runs.folder import RunFolder
from evomem.runs.journal import Journal, read_journal
from tests.support.interrupted_search import SMALL, broken_off, outcome, same
from tests.support.synthetic_search import ToyEvaluator, experiment, factory

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def taken(lines):
    checks = LineChecks()
    return checks, [record for record in map(checks.take, lines) if record is not None]


@settings(max_examples=50)
@given(st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=4), max_size=6), st.data())
def test_what_was_written_is_read_and_nothing_else(records, data):
    """Against a list: any change of a line, loss, repetition or exchange is named, and what is left is as it was."""
    records = [{k: v for k, v in record.items() if k not in ("line", "check")} for record in records]
    lines = [checksummed(record, number + 1) for number, record in enumerate(records)]
    assert all(line.count(b"\n") == 1 for line in lines)
    checks, found = taken(lines)
    assert found == records
    assert not checks.problems()
    if len(lines) < 2:
        return
    place = data.draw(st.integers(0, len(lines) - 2))
    how = data.draw(st.sampled_from(["byte", "gone", "twice", "swapped", "unchecked"]))
    changed, kept = list(lines), records[:place] + records[place + 1 :]
    if how == "byte":
        line = bytearray(lines[place])
        at = data.draw(st.integers(0, len(line) - 2))
        line[at] ^= data.draw(st.sampled_from([1, 2, 4, 64]))
        changed[place] = bytes(line)
    elif how == "gone":
        del changed[place]
    elif how == "twice":
        changed.insert(place + 1, lines[place])
        kept = records
    elif how == "swapped":
        changed[place], changed[place + 1] = changed[place + 1], changed[place]
        kept = [*records[:place], records[place + 1], records[place], *records[place + 2 :]]
    else:
        changed.insert(place + 1, json.dumps(records[place]).encode() + b"\n")
        kept = records
    checks, found = taken(changed)
    assert found == kept
    assert checks.problems()


def edit(folder, change):
    path = folder / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    change(lines)
    path.write_bytes(b"".join(lines))


def unit(lines, last=False):
    places = [place for place, line in enumerate(lines) if b'"kind":"unit"' in line]
    return places[-2 if last else 0]


def digit(lines, last):
    place = unit(lines, last)
    record = json.loads(lines[place])
    value = record["evaluations"][0]["loglik"]
    lines[place] = lines[place].replace(repr(value).encode(), repr(value + 0.5).encode())


def second(lines, last):
    """A line for the same unit with another value and a checksum of its own, as of another process."""
    place = unit(lines, last)
    record = json.loads(lines[place])
    record["evaluations"][0]["loglik"] += 5.0
    number = record.pop("line")
    del record["check"]
    lines.insert(place + 1, checksummed(record, number))


def another(lines, last):
    """The same at the end, with a number that no other line has."""
    record = json.loads(lines[unit(lines, last)])
    record["evaluations"][0]["loglik"] += 5.0
    del record["check"]
    lines.append(checksummed(record, json.loads(lines[-1])["line"] + 1))


CHANGES = {
    "a line at the end": another,
    "a digit": digit,
    "a second line": second,
    "a line is gone": lambda lines, last: lines.pop(unit(lines, last)),
    "two are exchanged": lambda lines, last: lines.insert(unit(lines, last), lines.pop(unit(lines, last) + 1)),
    "a lost tail": lambda lines, last: lines.__delitem__(slice(len(lines) // (2 if last else 4), None)),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_journal_never_changes_the_winner_in_silence(tmp_path, caplog, undisturbed, change, last):
    broken_off(tmp_path / "run", after=44)
    edit(tmp_path / "run", lambda lines: change(lines, last))
    search(experiment(*SMALL), tmp_path / "run", factory(ToyEvaluator()), resume=True)
    # A line at the end that speaks of a generation that is over is not read again.
    assert (change is another and not last) or any(
        word in caplog.text for word in ("damaged", "missing", "twice", "shorter", "different things")
    )
    run = open_run(tmp_path / "run")
    assert run.winner_vector.tobytes() == undisturbed[2]
    assert repr([generation.fitness for generation in run.generations()]) == undisturbed[1]
    assert run.result.generations == 3


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    search(experiment(*SMALL), folder, factory(ToyEvaluator()))
    return outcome(folder)


def test_a_journal_of_before_is_read_and_goes_on_with_checksums(tmp_path, caplog, undisturbed):
    broken_off(tmp_path / "run")

    def plain(lines):
        for place, line in enumerate(lines):
            record = json.loads(line)
            del record["line"], record["check"]
            lines[place] = json.dumps(record).encode() + b"\n"

    edit(tmp_path / "run", plain)
    search(experiment(*SMALL), tmp_path / "run", factory(ToyEvaluator()), resume=True)
    assert "lines without a checksum" in caplog.text
    same(outcome(tmp_path / "run"), undisturbed)
    last = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()[-1]
    assert {"line", "check"} <= json.loads(last).keys()


# ---- one process ------------------------------------------------------------------------------------------------


def test_another_process_is_kept_out_without_the_lock_file(tmp_path):
    folder = tmp_path / "run"
    broken_off(folder)
    ready, tell = os.pipe()
    other = os.fork()
    if other == 0:
        journal = Journal(folder / "journal.jsonl")
        os.write(tell, b"here")
        signal.pause()
        journal.close()
        os._exit(0)
    try:
        assert os.read(ready, 4) == b"here"
        (folder / "run.lock").unlink(missing_ok=True)
        before = (folder / "journal.jsonl").read_bytes()
        with pytest.raises(RunError, match="in use by another process"):
            search(experiment(*SMALL), folder, factory(ToyEvaluator()), resume=True)
        assert (folder / "journal.jsonl").read_bytes() == before
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    with RunFolder(folder, experiment(*SMALL), resume=True):  # a killed process holds nothing
        pass


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_journal_that_is_taken_away_is_noticed(tmp_path, how):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.event("start")
    os.rename(path, tmp_path / "elsewhere")
    if how == "replaced":
        path.write_bytes((tmp_path / "elsewhere").read_bytes())
    with pytest.raises(RunError, match="moved, removed or replaced"):
        journal.event("more")
    journal.close()
    assert [record["event"] for record in read_journal(tmp_path / "elsewhere")] == ["start"]
