"""Run folders with anything in them: every reader gives what was written, or an error that names the file."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evomem.errors import EvomemError
from evomem.files.checksummed_lines import checksummed
from evomem.plugins.card import render_card
from evomem.report.tables import read_rows
from evomem.runs import checkpoint as checkpoints
from evomem.runs import open_run, search
from evomem.runs.experiment_file import as_stored, to_yaml
from evomem.runs.folder_reading import read_config, read_json, read_numbers, read_state
from evomem.runs.front import read_front
from tests.support.interrupted_search import SMALL, Interrupted, Stop
from tests.support.synthetic_search import experiment, factory

ODD = settings(max_examples=160, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
NUMBER = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 2**63])
VALUE = st.recursive(
    st.none() | st.booleans() | NUMBER | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def cut_or_changed(content):
    """Bytes of a file with a piece cut out, changed, or put in."""
    places = st.integers(0, max(len(content) - 1, 0))
    return st.builds(
        lambda at, size, new: content[:at] + new + content[at + size :],
        places, st.sampled_from([0, 1, 2, 7, 50, len(content)]), st.binary(max_size=9),
    )  # fmt: skip


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text(max_size=6), VALUE | st.tuples(VALUE, VALUE), max_size=4))
def test_what_comes_back_from_a_configuration_is_known_without_writing_it(data):
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}
    assert repr(as_stored(data)) == repr(yaml.safe_load(to_yaml(lists)))


def tried(read):
    with suppress(EvomemError):
        read()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def replaced(data, value):
    """Draw a place anywhere in JSON data, and put another value there, or take it away."""
    value = json.loads(json.dumps(value))
    node, steps = value, data.draw(st.integers(1, 4))
    for step in range(steps):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = data.draw(st.sampled_from(keys))
        if step == steps - 1 or not isinstance(node[key], dict | list):
            if data.draw(st.booleans()):
                node[key] = data.draw(VALUE)
            else:
                del node[key]
            break
        node = node[key]
    return value


@ODD
@given(st.data())
def test_journals(finished, place, data):
    """Lines of the wrong shape, with and without a checksum, and changed bytes."""
    shutil.copyfile(finished / "config.yaml", place / "config.yaml")
    lines = (finished / "journal.jsonl").read_bytes().splitlines(keepends=True)
    chosen = [lines[0], next(x for x in lines if b'"unit"' in x), next(x for x in lines if b'"generation","g' in x)]
    records = [json.loads(line) for line in chosen]
    how = data.draw(st.sampled_from(["bytes", "shape", "checksummed"]))
    if how == "bytes":
        content = data.draw(cut_or_changed(b"".join(chosen)))
    else:
        records = [{k: v for k, v in r.items() if k not in ("line", "check")} for r in records]
        changed = [replaced(data, record) for record in records]
        if how == "checksummed":
            content = b"".join(checksummed(record, n + 1) for n, record in enumerate(changed))
        else:
            content = b"".join(json.dumps(record).encode() + b"\n" for record in changed)
    (place / "journal.jsonl").write_bytes(content)
    found = open_run(place)
    tried(found.totals)
    tried(found.generations)


@ODD
@given(st.data())
def test_results(finished, place, data):
    shutil.copytree(finished / "winner", place / "winner", dirs_exist_ok=True)
    shutil.copyfile(finished / "config.yaml", place / "config.yaml")
    content = (finished / "result.json").read_bytes()
    if data.draw(st.booleans()):
        record = {k: v for k, v in json.loads(content).items() if k not in ("line", "check")}
        content = json.dumps(replaced(data, record)).encode()
    else:
        content = data.draw(cut_or_changed(content))
    (place / "result.json").write_bytes(content)
    tried(lambda: open_run(place).result)


@ODD
@given(st.data())
def test_checkpoints(stopped, place, data):
    """With the right checksum too, as a stranger makes them."""
    path = max((stopped / "checkpoints").iterdir())
    content = path.read_bytes()
    start = content.index(b"\n") + 1
    body = data.draw(cut_or_changed(content[start + 32 :]))
    if data.draw(st.booleans()):
        content = content[:start] + hashlib.sha256(body).digest() + body
    else:
        content = content[: start + 32] + body
    (place / "one.ckpt").write_bytes(content)
    tried(lambda: checkpoints.load(place / "one.ckpt"))


@settings(ODD, max_examples=10)
@given(st.data())
def test_checkpoints_of_strangers_end_in_an_error_or_in_the_same_winner(stopped, finished, place, data):
    folder = place / "resumed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(stopped, folder)
    path = max((folder / "checkpoints").iterdir())
    content = path.read_bytes()
    start = content.index(b"\n") + 1
    body = data.draw(cut_or_changed(content[start + 32 :]))
    path.write_bytes(content[:start] + hashlib.sha256(body).digest() + body)
    with pytest.raises((EvomemError, Stop)):
        search(experiment(*SMALL), folder, factory(Interrupted(0)), resume=True)


@ODD
@given(st.data())
def test_vectors(finished, place, data):
    path = place / "vector.npy"
    path.write_bytes(data.draw(cut_or_changed((finished / "winner" / "vector.npy").read_bytes())))
    tried(lambda: read_numbers(path))


@ODD
@given(st.data())
def test_tensors(finished, place, data):
    path = place / "state.safetensors"
    path.write_bytes(data.draw(cut_or_changed((finished / "start" / "state.safetensors").read_bytes())))
    tried(lambda: read_state(path))


@ODD
@given(st.data())
def test_configurations_provenance_rows_and_fronts(finished, place, data):
    (place / "config.yaml").write_bytes(data.draw(cut_or_changed((finished / "config.yaml").read_bytes())))
    tried(lambda: read_config(place / "config.yaml"))
    tried(lambda: open_run(place))
    row = {"model": "m", "task": "t", "manager": "x", "budget": 4, "protocol": "p", "split": "s", "role": "field",
           "samples": 2, "score": 0.5, "loglik": -1.0, "bytes_peak": 1.0, "bytes_mean": 1.0, "slots": 4.0,
           "seconds": 0.1, "interval": [0.0, 1.0]}  # fmt: skip
    (place / "rows.json").write_text(json.dumps(replaced(data, [row, row])))
    tried(lambda: read_rows(place / "rows.json"))
    score = {"contexts": 2, "fitness": 1.0, "loglik": 1.0, "exact": None, "slots": 1.0, "bytes_mean": 1.0,
             "bytes_peak": 1.0, "error": 0.1}  # fmt: skip
    member = {"place": 0, "label": "start", "budget": 4, "select": score, "sealed": score, "interval": None}
    (place / "front.json").write_text(json.dumps(replaced(data, [member])))
    tried(lambda: read_front(place))
    tried(lambda: read_json(place / "front.json"))


@settings(ODD, max_examples=30)
@given(st.data())
def test_cards_of_any_provenance(finished, data):
    known = json.loads((finished / "winner" / "plugin" / "provenance.json").read_text())
    tried(lambda: render_card("name", {"name": "toy", "options": {}}, replaced(data, known)))
