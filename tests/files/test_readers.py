"""Everything that users and strangers write, by chance: values come out, or an error that is meant for people.

No traceback, no case that takes 10 seconds (`deadline`), no memory beyond 1 GiB (looked at after each reader).
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import resource
import shutil
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from evomem import plugins
from evomem.cli.app import app
from evomem.cli.commands.compare import parse_budgets, split_specs
from evomem.cli.commands.evolve import count_of
from evomem.cli.commands.import_namm import read_namm
from evomem.drivers import build as build_driver
from evomem.drivers import drivers
from evomem.errors import EvomemError
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.evaluation.traces.recording import parse_bytes
from evomem.evaluation.traces.store import Traces
from evomem.files.resources import resource_path
from evomem.managers import build, managers
from evomem.managers.features import base_columns
from evomem.models import load
from evomem.models.exact import weight_shapes
from evomem.report.conditions import parse_protocol
from evomem.runs.experiment_file import load_experiment, parse_experiment
from evomem.search_space.space import SearchSpace, load_space
from evomem.tasks import build as build_task
from evomem.tasks import tasks
from evomem.testing.models import tiny, tiny_tokenizer
from evomem.validation import apply_settings, read_yaml

GIB = 1 << 20  # of the KiB in which the system counts

WORDS = st.sampled_from(
    ["²", "٣", "0", "-1", "9" * 400, "9" * 5000, "1e400", "nan", "inf", "a" * 300, "\0", "\ud800", "\x1b[2J", "../x",
     "/dev/zero", "2024-01-01", "!!set {x}", "*a", "&a [*a]", *"()[]{},:='\"./ ", "keydiff", "budget", "full", "none",
     "all", "8", "0.5", "streaming", "GB", "last", "mean", "length", "file"]
)  # fmt: skip
TEXT = st.lists(WORDS, max_size=6).map("".join) | st.text(max_size=20)
ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.just(10**400) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


def cases(count: int):
    return settings(
        max_examples=count, deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture, *HealthCheck]
    )


@pytest.fixture(autouse=True, scope="module")
def within_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIB


said = contextlib.suppress(EvomemError)
"""What a reader may raise."""


def places(value, path=()) -> list[tuple]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, part in parts for found in places(part, (*path, key)))]


@st.composite
def changed(draw, whole):
    """A value of which one or two parts, somewhere inside, are something else, or have another name."""
    result = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 2))):
        *path, key = draw(st.sampled_from([path for path in places(result) if path]))
        parent = reduce(lambda part, name: part[name], path, result)
        if isinstance(parent, dict) and draw(st.integers(0, 3)) == 0:
            parent[draw(TEXT)] = parent.pop(key)
        else:
            parent[key] = draw(ODD)
    return result


@st.composite
def damaged(draw, content: bytes):
    """Bytes of which a part is gone, doubled, or something else."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(result)))
        until = min(len(result), at + draw(st.sampled_from([0, 1, 4, 50, 5000])))
        twice = bytes(result[at:until]) * 2
        result[at:until] = draw(st.sampled_from([b"", b"\0", b"\xff" * 8, b"9" * 400, b"[" * 3000, twice]))
    return bytes(result)


def as_text(value) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()


# ---- what is written on a command line -----------------------------------------------------------------------------


@cases(80)
@given(TEXT)
def test_values_of_options(text):
    for read in (
        parse_budgets, split_specs, parse_bytes, lambda t: count_of(t, None), lambda t: base_columns((t,)),
        lambda t: parse_protocol(t, None, EvaluationProtocol()), lambda t: apply_settings({"a": [1]}, [t, f"a.{t}"]),
        load_experiment, load_space,
    ):  # fmt: skip
        with said:
            read(text)


@cases(60)
@given(st.sampled_from(["keydiff", "snapkv", "adakv", "feature_scorer", "namm", "random"]), TEXT)
def test_specs_of_managers(name, text):
    for spec in (text, f"{name}({text})", f"{name}({text}={text})", f"{name}{text}"):
        with said:
            build(spec)


@cases(40)
@given(st.sampled_from(["passkey", "mqar", "multikey_1", "book", "file", "tmaze"]), TEXT)
def test_specs_of_tasks(name, text):
    for spec in (text, f"{name}:{text}", f"{name}:length={text}", f"{name}:{text},length=40"):
        with said:
            build_task(spec, tiny_tokenizer())


# ---- options -------------------------------------------------------------------------------------------------------


@cases(60)
@given(st.data())
def test_options_of_managers_tasks_and_drivers(data):
    kinds = {"manager": managers, "task": tasks, "driver": drivers}
    kind = data.draw(st.sampled_from(list(kinds)))
    name = data.draw(st.sampled_from(list(kinds[kind])))
    options = data.draw(st.dictionaries(st.sampled_from(fields_of(kinds[kind].get(name))), ODD, max_size=3))
    with said:
        if kind == "manager":
            build(name, **options)
        elif kind == "task":
            build_task(name, tiny_tokenizer(), **{key: value for key, value in options.items() if key != "spec"})
        else:
            build_driver(name, 4, np.zeros(4), 0, **options)


def fields_of(kind) -> list[str]:
    return sorted(getattr(getattr(kind, "Options", None), "model_fields", {})) or ["popsize", "sigma", "diagonal", "x"]


# ---- YAML ----------------------------------------------------------------------------------------------------------

EXPERIMENT = read_yaml(resource_path("experiments", "demo"))


@cases(120)
@given(
    changed(
        {**EXPERIMENT, "space": {"name": "scorer", "options": {"recent": {"kind": "integer", "low": 0, "high": 9}}}}
    )
)
def test_experiments(values):
    with said:
        config = parse_experiment(values)
        config.plan()
        config.resolved()


SPACE = {
    "manager": {"name": "feature_scorer", "options": {"budget": 8, "features": ["keydiff", "age"]}},
    "weights": [{"match": "*", "scale": 0.5}],
    "options": {
        "recent": {"kind": "integer", "low": 0, "high": 9}, "budget": {"kind": "log_integer", "low": 2, "high": 9},
    },
    "start": {"parameters": {"*": 0.5}, "noise": 0.1},
    "sigma": 0.3,
}  # fmt: skip


@cases(60)
@given(changed(SPACE))
def test_search_spaces(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "space.yaml"
    path.write_bytes(as_text(values))
    with said:
        space = SearchSpace(load_space(str(path)))
        space.variables()
        space.decode(space.start)


@cases(40)
@given(damaged(as_text(EXPERIMENT)))
def test_damaged_files_of_experiments(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "experiment.yaml"
    path.write_bytes(content)
    with said:
        load_experiment(path)


# ---- files of questions, plug-ins, vectors, traces, models ----------------------------------------------------------

ROW = {
    "context": "the cat and the dog",
    "question": "what",
    "answers": ["cat"],
    "id": 1,
    "metric": "f1",
    "split": "train",
}


@cases(60)
@given(st.lists(changed(ROW) | st.just(ROW), min_size=1, max_size=3), st.binary(max_size=4))
def test_files_of_questions(tmp_path_factory, rows, tail):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_bytes(b"\n".join(map(as_text, rows)) + tail)
    with said:
        task = build_task("file", tiny_tokenizer(), path=str(path), length=8)
        for split in ("train", "sealed"):
            task.samples(split, 1, 0)


@pytest.fixture(scope="module")
def plug(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readers") / "plug"
    plugins.save(
        build("feature_scorer", budget=8), folder, {"model": "m", "tasks": [{"spec": "passkey"}], "budgets": [8]}
    )
    return folder


@cases(60)
@given(st.data())
def test_plug_ins(plug, data):
    name = data.draw(st.sampled_from(["config.json", "provenance.json", "model.safetensors"]))
    whole = (plug / name).read_bytes()
    alter = name == "model.safetensors" or data.draw(st.booleans())
    content = data.draw(damaged(whole)) if alter else as_text(data.draw(changed(json.loads(whole))))
    (plug / name).write_bytes(content)
    try:
        with said:
            from evomem.report.subjects import resolve

            resolve(str(plug))
    finally:
        (plug / name).write_bytes(whole)


@cases(30)
@given(st.data())
def test_vectors_and_namms(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    np.save(folder / "whole.npy", np.zeros(3))
    np.savez(folder / "whole.npz", theta=np.zeros(3), mean=np.zeros(17), var=np.ones(17))
    for ending in ("npy", "npz"):
        (folder / f"some.{ending}").write_bytes(data.draw(damaged((folder / f"whole.{ending}").read_bytes())))
    with said:
        read_namm(folder / "some.npz")
    with said:
        SearchSpace(load_space("scorer", {"start": {"vector": str(folder / "some.npy")}}))


@cases(40)
@given(st.data())
def test_manifests_of_traces(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "traces"
    folder.mkdir(exist_ok=True)
    model, task = {"name": "m", "digest": "d", "dtype": "float32"}, {"spec": "t", "name": "t", "options": {}}
    header = {"schema_version": 1, "model": model, "task": task, "mode": "query_agnostic", "split": "train", "seed": 0}
    header |= {"features": ["age"], "used": 0.1}
    file = {"file": "000000.safetensors", "sample": "s", "key": "k", "bytes": 1, "sha256": "x", "slots": 1}
    file |= {"kv_bytes": 1}
    whole = {"header": header, "files": [file]}
    content = data.draw(changed(whole).map(as_text) | damaged(as_text(whole)))
    (folder / "manifest.json").write_bytes(content)
    with said:
        list(Traces.open(folder))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readers") / "model"
    tiny("llama", layers=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@cases(30)
@given(st.data())
def test_model_folders(model, data):
    name = data.draw(st.sampled_from(["config.json", "config.json", "tokenizer.json", "model.safetensors"]))
    whole = (model / name).read_bytes()
    alter = name != "config.json" or data.draw(st.booleans())
    content = data.draw(damaged(whole)) if alter else as_text(data.draw(changed(json.loads(whole))))
    (model / name).write_bytes(content)
    try:
        with said:
            load(str(model))
    finally:
        (model / name).write_bytes(whole)


@cases(30)
@given(st.data())
def test_indices_and_headers_of_weights(model, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "shards"
    folder.mkdir(exist_ok=True)
    content = (model / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    (folder / "a.safetensors").write_bytes(data.draw(damaged(content[:length])) + content[length:])
    names = dict.fromkeys(weight_shapes(model), "a.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(as_text(data.draw(changed({"weight_map": names}))))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder)
    with said:
        load(str(folder))


# ---- whole commands ------------------------------------------------------------------------------------------------

LONG, DIGITS = "a" * 300, "9" * 5000
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
COMMANDS = [
    *(["evolve", name] for name in (
        "", LONG, "folder", "pipe", "/dev/zero", "nul\0", "rows.jsonl", "\ud800", "bomb.yaml",
        "deep.yaml", "digits.yaml", "date.yaml", "tag.yaml", "budgets.yaml", "latin.yaml")),
    *(["evolve", "demo", "-s", one, "--out", "run"] for one in (
        "name=../x", "seed=²", f"seed={DIGITS}", "population=3", "driver.population=1000000000", "budgets=5",
        "tasks.²=1", "generations=1e400", "train_contexts=100000000", "space=2024-01-01", "model.dtype=int8", "x=[",
        f"{LONG}=1", "driver.options={a: *x}", "space.start={vector: pipe}", "space.start={vector: /dev/zero}")),
    *(["evolve", "demo", "--workers", one, "--out", "run"] for one in ("²", "-1", "1e3", "")),
    *(["evolve", "demo", "--out", one] for one in ("pipe", "rows.jsonl", "full")),
    *(["export", source, "out"] for source in ("", LONG, "folder", "pipe", "nul\0", "~nosuchuser/x")),
    *(["export", "plug", target] for target in ("/", "pipe", "rows.jsonl", LONG, "full", "nul\0", "rows.jsonl/x")),
    *(["export", "plug", "out", "--bytes", one] for one in ("nan", "1e400", "0", "²")),
    *(["track", source, "--to", "jsonl"] for source in ("", LONG, "folder", "pipe", "plug")),
    *(["import-namm", source, "--out", "out"] for source in (f"{LONG}.npz", "pipe", "folder", "nul\0", "rows.jsonl")),
    *(["evaluate", manager, "-t", "passkey:length=40", "--budgets", "8"] for manager in (
        "", "keydiff(", "keydiff(budget=", "adakv(" * 50, f"snapkv(window={DIGITS})", "snapkv(window=2024-01-01)", LONG,
        "feature_scorer(features=[last:²])", "namm(hidden=[1000000000])", "random(seed=!!set {x})", "nul\0", "pipe")),
    *(["evaluate", "keydiff", "-t", "passkey", "--budgets", one] for one in ("²", DIGITS, "nan", "0", "1e400")),
    *(["evaluate", "keydiff", "-t", "passkey", "--budgets", "8", "--json", one] for one in (
        "/dev/null", "folder", LONG, "nul\0", "rows.jsonl", "/proc/x")),
    *(["evaluate", "keydiff", "-t", "passkey", "--budgets", "8", "-m", one] for one in (
        LONG, "folder", "pipe", "nul\0", "/dev/zero", "~nosuchuser/x", "a/b/c")),
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory, plug) -> Path:
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(plug, folder / "plug")
    os.mkfifo(folder / "pipe")
    for name in ("folder", "full"):
        (folder / name).mkdir()
    (folder / "full" / "thesis.tex").write_text("mine")
    texts = {
        "rows.jsonl": "{}", "bomb.yaml": BOMB, "deep.yaml": "[" * 100_000, "digits.yaml": f"seed: {DIGITS}",
        "date.yaml": "name: 2024-01-01", "tag.yaml": "a: !!python/name:os.system", "latin.yaml": "a: \xff",
        "budgets.yaml": "name: x\nmodel: m\nspace: scorer\ntasks: [passkey]\nbudgets: 5",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="latin-1")
    return folder


def test_commands_with_odd_words_end_with_an_error_for_people(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = {path: path.lstat().st_mtime_ns for path in home.rglob("*") if not path.is_dir()}
    for words in COMMANDS:
        outcome = CliRunner().invoke(app, words)
        assert isinstance(outcome.exception, SystemExit), (words, outcome.exception)
        assert outcome.exit_code == 2, (words, outcome.output)
    after = {path: path.lstat().st_mtime_ns for path in home.rglob("*") if not path.is_dir()}
    assert before.items() <= after.items()
