"""Traces: what is read from disk is what the evaluator measures; a recording survives kills, damage and limits."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem.errors import ConfigError, RunError, TaskError
from evomem.evaluation import EvaluationProtocol, Evaluator, PopulationPolicy, Reading
from evomem.evaluation.future import Future, sample_key
from evomem.evaluation.traces import recording
from evomem.evaluation.traces.recording import parse_bytes, record
from evomem.evaluation.traces.store import DEFAULT_FEATURES, FROM_SLOTS, MANIFEST, Traces, decode, encode, stored
from evomem.managers import build
from evomem.managers.features import column, columns, required
from evomem.managers.vector import load_vector, vector_size
from evomem.memory import layer_view
from evomem.models import LoadedModel
from evomem.tasks.base import Sample
from evomem.testing.models import tiny, tiny_tokenizer

WORDS = ["the", "cat", "dog", "bird", "tree", "house", "red", "black", "white", "big", "small", "grass"]
FEATURES = ("key_norm", "valuediff", "age", "sink", "attention_per_query", "last:8", "block_max:8", "mean:5:keydiff")


class Words:
    """Random words, every sample from a generator of its own."""

    name, uniform_chance, has_exact = "words", 0.0, False

    def __init__(self, length=30):
        self.length = length

    def describe(self):
        return {"length": self.length}

    def samples(self, split, n, seed):
        return [self.one(split, seed, number) for number in range(min(n, 50))]

    def one(self, split, seed, number):
        rng = random.Random(f"{split}/{seed}/{number}")
        text = " ".join(rng.choices(WORDS, k=self.length + number % 3))
        return Sample(f"words/{split}/{seed}/{number}", text, " what ?", f" {rng.choice(WORDS)} the", (), 0)


def load(family="llama"):
    return LoadedModel(family, tiny(family, layers=2), tiny_tokenizer(), f"digest of {family}")


@pytest.fixture(scope="module")
def llama():
    return load()


def recorded(loaded, folder, **changes):
    wishes = {"samples": 4, "features": FEATURES, **changes}
    task = wishes.pop("task", Words())
    return record(loaded, task, "words", folder, **wishes)


def content(folder):
    """Every file of a folder but the lock."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "traces.lock"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", ["query_agnostic", "query_aware"])
def test_a_trace_is_what_the_evaluator_sees(family, mode, tmp_path):
    loaded = load(family)
    recorded(loaded, tmp_path, features=(*DEFAULT_FEATURES, "spectrum:3"), mode=mode)
    traces, evaluator = Traces.open(tmp_path), Evaluator(loaded, EvaluationProtocol(mode=mode))
    traces.matches(loaded, ("max:3:keydiff", *DEFAULT_FEATURES), mode=mode)
    assert len(traces) == 4
    names = (*DEFAULT_FEATURES, "spectrum:3", "mean:7:key_norm", "max:3:last:8")
    for sample, in_order in zip(Words().samples("train", 4, 0), traces, strict=True):
        tokens = evaluator.tokens(sample)
        key, observes = sample_key(tokens), required(names)
        trace = traces.get(key)
        assert (trace.sample, trace.key, in_order.key) == (sample.id, key, key)
        reading = evaluator.reading(tokens.read, observes)
        future = evaluator.future.of(evaluator, tokens, key, observes)
        for mine, theirs in zip(trace.views, reading.views, strict=True):
            for name in ("slots", "start"):
                assert torch.equal(getattr(mine, name), getattr(theirs, name))
            for name in ("seen", "fresh", "layer", "layers"):
                assert getattr(mine, name) == getattr(theirs, name)
            assert mine.keys.shape == mine.values.shape == (*theirs.keys.shape[:3], 0)
            found, wanted = columns(mine, names), columns(theirs, names)
            for name, one, other in zip(names, found, wanted, strict=True):
                assert one.dtype == torch.float32
                torch.testing.assert_close(one, other, rtol=2**-10, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            for name in FROM_SLOTS:
                assert torch.equal(column(mine, name), column(theirs, name))
        for part in ("peak", "paid"):
            for one, other in zip(getattr(trace.future, part), getattr(future, part), strict=True):
                torch.testing.assert_close(one, other, rtol=2**-11, atol=1e-9)
        for one, other in zip(trace.future.next_use, future.next_use, strict=True):
            assert torch.equal(one, other)
    assert traces.get("another") is None


@given(data=st.data(), large=st.integers(-20, 12), never=st.sampled_from([3, 2**15, 70000]))
@settings(max_examples=25, deadline=None)
def test_small_attention_keeps_its_digits(data, large, never, tmp_path_factory):
    """Down to 2^-28 of the file's largest value the relative error is that of 11 bits; zero stays zero."""
    powers = data.draw(st.lists(st.floats(-28, 0), min_size=5, max_size=5))
    values = torch.tensor([2.0 ** (large + p) for p in powers] + [2.0**large, 0.0]).expand(1, 1, 7)
    uses = torch.tensor([0.0, 1, 2, never, never, 1, never]).expand(1, 1, 7)
    reading = Reading((layer_view(torch.ones(1, 1, 7, 4), torch.ones(1, 1, 7, 4)),), 7)
    path = tmp_path_factory.getbasetemp() / "one.safetensors"
    path.write_bytes(encode(reading, Future((values / 3,), (values,), (uses,)), ("key_norm",), "sample", "key"))
    found = decode(path, ("key_norm",)).future
    assert torch.equal(found.next_use[0], uses)
    for part, wanted in ((found.peak[0], values), (found.paid[0], values / 3)):
        torch.testing.assert_close(part, wanted, rtol=2**-11, atol=0)
        assert torch.isfinite(part).all()


def test_managers_decide_on_traces_as_on_readings(llama, tmp_path):
    """With the columns rounded alike, exactly; without rounding, but for slots whose scores are all but the same."""
    names = ["keydiff", "value_norm", "key_step", "attention_per_query", "last:8", "mean:3:keydiff", "age", "sink"]
    recorded(llama, tmp_path, features=names)
    crowd = []
    for seed, options in enumerate(({}, {"hidden": 4}, {"allocation": 2}, {"layers": 2, "heads": 2, "knots": 1})):
        crowd.append(build("feature_scorer", features=names, budget=10, recent=2, sinks=1, **options))
        load_vector(crowd[-1], np.random.default_rng(seed).normal(size=vector_size(crowd[-1])))
    policy, evaluator, differ = PopulationPolicy(crowd), Evaluator(llama), 0
    for sample in Words().samples("train", 4, 0):
        tokens = evaluator.tokens(sample)
        trace = Traces.open(tmp_path).get(sample_key(tokens))
        for mine, theirs in zip(trace.views, evaluator.reading(tokens.read, policy.observes).views, strict=True):
            rounded = {f"column {name}": column(theirs, name).half().float() for name in stored(names)}
            keep = policy.decide(mine).keep
            assert torch.equal(keep, policy.decide(replace(theirs, memo=rounded)).keep)
            exact = policy.decide(theirs).keep
            for place, manager in enumerate(crowd):
                score = manager.score(theirs)[0]
                for head, (a, b) in enumerate(zip(keep[place], exact[place], strict=True)):
                    swapped = score[head][a != b]
                    differ += len(swapped)
                    assert not len(swapped) or float(swapped.max() - swapped.min()) < 0.01
    assert differ < 8


class Killed(BaseException):
    """What no handler catches."""


@pytest.mark.parametrize("after", [False, True])
def test_a_recording_goes_on_where_it_was_killed(llama, tmp_path, monkeypatch, after):
    """Killed before or after each of its writes in turn, it ends with the bytes of one that was left alone."""
    recorded(llama, tmp_path / "undisturbed")
    write, folder, left = recording.write_atomically, tmp_path / "killed", 0

    def failing(path, data):
        nonlocal left
        if after:
            write(path, data)
        left -= 1
        if left < 0:
            path.with_name(f".{path.name}.1.evomem.tmp").write_bytes(data[: len(data) // 2])
            raise Killed
        if not after:
            write(path, data)

    monkeypatch.setattr(recording, "write_atomically", failing)
    kills = 0
    for attempt in range(20):
        left = attempt % 2 + 1
        try:
            recorded(llama, folder)
            break
        except Killed:
            kills += 1
    assert 3 <= kills < 20
    assert content(folder) == content(tmp_path / "undisturbed")
    assert recorded(llama, folder).new == 0


def spoil(path, how):
    whole = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[:-7] if how == "short" else whole[:-7] + b"x" + whole[-6:])


@pytest.mark.parametrize("how", ["gone", "short", "changed"])
def test_damage_is_noticed_and_mended(llama, tmp_path, how):
    recorded(llama, tmp_path)
    before = content(tmp_path)
    traces = Traces.open(tmp_path)
    bad = traces.manifest.files[2]
    spoil(tmp_path / bad.file, how)
    assert traces.get(traces.manifest.files[1].key) is not None
    with pytest.raises(RunError, match=bad.file):
        traces.get(bad.key)
    said = []
    assert recorded(llama, tmp_path, say=said.append).new == 1
    assert any(bad.file in line and "again" in line for line in said)
    assert content(tmp_path) == before
    assert traces.get(bad.key) is not None


def test_the_limit_is_kept(llama, tmp_path):
    whole = recorded(llama, tmp_path / "whole")
    assert whole.bytes == sum(map(len, content(tmp_path / "whole").values()))
    said = []
    limit = whole.bytes - 1
    part = recorded(llama, tmp_path / "part", limit=limit, say=said.append)
    assert (part.samples, part.requested, part.new) == (3, 4, 3)
    assert sum(map(len, content(tmp_path / "part").values())) == part.bytes <= limit
    assert any("3 of 4 samples fit" in line for line in said)
    assert parse_bytes(" ".join(said[0].split()[1:3])) == pytest.approx(whole.bytes, rel=0.5)
    assert recorded(llama, tmp_path / "part", limit=whole.bytes).samples == 4
    assert content(tmp_path / "part") == content(tmp_path / "whole")
    assert recorded(llama, tmp_path / "none", limit=10).samples == 0
    assert [parse_bytes(text) for text in ("2GB", "1.5 mb", "7", "3kB")] == [2 * 10**9, 1_500_000, 7, 3000]
    assert [recording.readable(size) for size in (0, 999, 1000, 2.34e6, 5e13)] == [
        "0 B", "999 B", "1.0 KB", "2.3 MB", "50.0 TB",
    ]  # fmt: skip
    for wrong in ("", "GB", "2 gigs", "-1", "1GB2"):
        with pytest.raises(ConfigError, match="--limit"):
            parse_bytes(wrong)


def test_more_samples_are_added_and_fewer_leave_them(llama, tmp_path):
    recorded(llama, tmp_path / "at once")
    assert recorded(llama, tmp_path / "later", samples=2).new == 2
    assert recorded(llama, tmp_path / "later").new == 2
    assert recorded(llama, tmp_path / "later", samples=1).samples == 4
    assert content(tmp_path / "later") == content(tmp_path / "at once")


def test_other_arguments_are_refused(llama, tmp_path):
    recorded(llama, tmp_path, samples=1)
    before = content(tmp_path)
    for changes, named in (
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"split": recording.Split.SEALED}, "split"),
        ({"features": ("age",)}, "features"),
        ({"mode": "query_aware"}, "mode"),
        ({"task": Words(31)}, "task.options.length: 30 -> 31"),
    ):
        with pytest.raises(RunError, match=named):
            recorded(llama, tmp_path, samples=1, **changes)
    with pytest.raises(RunError, match=r"model\.digest"):
        recorded(replace(llama, digest="another"), tmp_path, samples=1)
    assert content(tmp_path) == before
    assert recorded(replace(llama, name="the same by another name"), tmp_path, samples=1).new == 0
    with pytest.raises(TaskError, match="50 samples"):
        recorded(llama, tmp_path, samples=51)
    with pytest.raises(ConfigError, match="keydif"):
        recorded(llama, tmp_path / "x", features=("keydif",))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    with pytest.raises(RunError, match=r"thesis\.txt"):
        recorded(llama, tmp_path / "full")
    with recording._locked(tmp_path), pytest.raises(RunError, match="another process"):
        recorded(llama, tmp_path, samples=1)


def test_what_does_not_fit_is_said_when_traces_are_used(llama, tmp_path):
    recorded(llama, tmp_path, samples=1)
    traces = Traces.open(tmp_path)
    with pytest.raises(RunError, match="of another"):
        traces.matches(replace(llama, digest="0", name="another"))
    with pytest.raises(RunError, match="query_aware"):
        traces.matches(llama, mode="query_aware")
    with pytest.raises(RunError, match="bfloat16"):
        traces.matches(replace(llama, model=tiny("llama", layers=2).to(torch.bfloat16)))
    with pytest.raises(ConfigError, match="spectrum:4"):
        traces.matches(llama, ("mean:3:spectrum:4",))
    (trace,) = traces
    for name in ("value_norm", "attention", "last:16"):
        with pytest.raises(ConfigError, match=name) as told:
            columns(trace.views[0], (name,))
        assert str(tmp_path) in str(told.value)
    with pytest.raises(RunError, match="no manifest"):
        Traces.open(tmp_path / "nowhere")
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["header"]["schema_version"] = 2
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="reads version 1"):
        Traces.open(tmp_path)
    manifest["header"]["schema_version"] = 1
    manifest["files"][0]["file"] = "../../elsewhere.safetensors"
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="file"):
        Traces.open(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(RunError, match="damaged"):
        Traces.open(tmp_path)


def test_traces_go_to_other_processes(llama, tmp_path):
    recorded(llama, tmp_path, samples=1)
    traces = Traces.open(str(tmp_path))
    (key,) = (file.key for file in traces.manifest.files)
    mine, theirs = traces.get(key), pickle.loads(pickle.dumps(traces)).get(key)
    again = pickle.loads(pickle.dumps(mine))
    for one, other, third in zip(mine.views, theirs.views, again.views, strict=True):
        assert one.memo.keys() == other.memo.keys() == third.memo.keys()
        assert all(
            torch.equal(one.memo[n], other.memo[n]) and torch.equal(one.memo[n], third.memo[n]) for n in one.memo
        )
        with pytest.raises(ConfigError, match="last:16"):
            column(third, "last:16")


def test_the_manifest_says_what_the_files_are(llama, tmp_path):
    done = recorded(llama, tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["header"]["model"] == {"name": "llama", "digest": "digest of llama", "dtype": "float32"}
    assert (manifest["header"]["split"], manifest["header"]["seed"]) == ("train", 0)
    assert [file["slots"] for file in manifest["files"]] == [
        len(tiny_tokenizer().encode(sample.context)) for sample in Words().samples("train", 4, 0)
    ]
    for file in manifest["files"]:
        data = Path(tmp_path / file["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
        # 2 layers, 2 KV heads of 16 numbers, keys and values in fp32.
        assert file["kv_bytes"] == file["slots"] * 2 * 2 * 16 * 2 * 4
    assert done.kv_bytes == sum(file["kv_bytes"] for file in manifest["files"])
