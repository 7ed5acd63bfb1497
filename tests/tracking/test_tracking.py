"""Trackers: every sink holds what the journal holds, whatever happened on the way; none can stop a run."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import sys
from collections import defaultdict

import numpy as np
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner
from wandb.proto.wandb_internal_pb2 import Record

from evomem.cli.app import app
from evomem.errors import ConfigError, EvomemError
from evomem.runs import open_run, search
from evomem.runs.folder import RunFolder
from evomem.tracking import (
    GenerationRecord,
    JsonlTracker,
    TensorBoardTracker,
    TerminalTracker,
    WandbTracker,
    build_trackers,
    replay,
    weights_and_biases,
)
from evomem.tracking.weights_and_biases import run_id
from tests.cli.test_cli import world  # noqa: F401 (a fixture)
from tests.runs.test_runs import SMALL, Interrupted, Stop, outcome, same
from tests.support.synthetic_search import ToyEvaluator, experiment, factory
from tests.support.wandb_server import Server


class Recording:
    """Remembers what it is told."""

    def __init__(self):
        self.heard = []

    def start(self, config, generations, done):
        self.heard.append(("start", dict(config), generations, list(done)))

    def log(self, generation):
        self.heard.append(("log", generation))

    def artifact(self, name, path):
        self.heard.append(("artifact", name, path))

    def finish(self, summary):
        self.heard.append(("finish", dict(summary)))


def whole(folder, *trackers):
    search(experiment(*SMALL), folder, factory(ToyEvaluator()), tracker=list(trackers))


def broken_and_resumed(folder, make):
    """A run that is interrupted in its second generation and goes on, with a new tracker each time."""
    with pytest.raises(Stop):
        search(experiment(*SMALL), folder, factory(Interrupted(40)), tracker=make())
    search(experiment(*SMALL), folder, factory(ToyEvaluator()), tracker=make(), resume=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    whole(folder)
    return folder


def dead_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(tmp_path, monkeypatch):
    """No test finds a key, reaches a server, or writes into the home of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{dead_port()}")
    yield
    wandb.teardown()  # it keeps the settings and the keys that it finds first


# ---- independent readers ----------------------------------------------------------------------------------------


def events(folder):
    """Every scalar of every event file: name -> [(step, value)], and the accumulator, which knows the rest."""
    everything = {"scalars": 0, "histograms": 0, "tensors": 0}
    read = EventAccumulator(str(folder), everything, purge_orphaned_data=False).Reload()
    return {name: [(e.step, e.value) for e in read.Scalars(name)] for name in read.Tags()["scalars"]}, read


def transactions(path):
    """The records of a .wandb file: a LevelDB log (blocks of 32 KiB, chunks with a header) of protocol buffers."""
    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last chunk
            yield Record.FromString(parts)
            parts = b""


def on_wandb(out, identity):
    """What an offline run holds: configuration, [(step, {name: value})], summary, exit code."""
    wandb.teardown()  # as the end of a process does: W&B's own one writes the last bytes a moment after finish()
    folders = list((out / "wandb").glob(f"offline-run-*-{identity}"))
    assert len(folders) == 1
    config, history, summary, code = {}, [], {}, None
    for record in transactions(folders[0] / f"run-{identity}.wandb"):
        if record.HasField("run"):
            config.update({item.key: json.loads(item.value_json) for item in record.run.config.update})
        elif record.HasField("history"):
            step, items = record.history.step.num, record.history.item
            history.append((step, {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}))
        elif record.HasField("summary"):
            for item in record.summary.update:
                summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        elif record.HasField("exit"):
            code = record.exit.exit_code
    config.pop("_wandb", None)
    return config, history, summary, code, folders[0]


def expected(folder):
    """Names and values per generation, straight from the journal's lines; there, what is no number is a string."""
    seconds, found = 0.0, []
    for line in (folder / "journal.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "generation":
            values = {f"fitness/{name}": record[name] for name in ("best", "mean", "spread", "noise", "failed")}
            values |= {"driver/sigma": record["sigma"], "spent/seconds_per_generation": record["seconds"] - seconds}
            values |= {f"spent/{name}": record[name] for name in ("evaluations", "tokens", "seconds")}
            values |= {f"diagnostics/{name}": value for name, value in record.get("diagnostics", {}).items()}
            found.append({name: value for name, value in values.items() if not isinstance(value, str)})
            seconds = record["seconds"]
    return found


def check_events(folder, where):
    scalars, read = events(where)
    lines = expected(folder)
    assert set(scalars) == set(lines[0])
    for name, points in scalars.items():
        assert [step for step, _ in points] == list(range(len(lines)))  # every step, none twice
        assert [value for _, value in points] == pytest.approx([line[name] for line in lines], rel=1e-6, abs=1e-9)
    return read


# ---- one source -------------------------------------------------------------------------------------------------


def test_a_replay_tells_what_a_live_tracker_heard(tmp_path):
    live, after = Recording(), Recording()
    whole(tmp_path / "run", live)
    replay(open_run(tmp_path / "run"), after)
    assert [h[0] for h in live.heard] == ["start", "log", "log", "log", "artifact", "finish"]
    assert repr(after.heard) == repr(live.heard)
    replay(open_run(tmp_path / "run"), again := Recording())
    assert repr(again.heard) == repr(after.heard)


def test_a_replay_of_a_resumed_run_tells_all_generations_once(tmp_path):
    live, after = [], Recording()
    broken_and_resumed(tmp_path / "run", lambda: live.append(Recording()) or live[-1])
    replay(open_run(tmp_path / "run"), after)
    told = [h[1] for h in after.heard if h[0] == "log"]
    assert len(told) == 3
    first, second = (tracker.heard for tracker in live)
    assert [h[1] for h in first if h[0] == "log"] == second[0][3] == told[: len(second[0][3])]
    assert second[0][3] + [h[1] for h in second if h[0] == "log"] == told
    assert after.heard[0][1:3] == first[0][1:3] == second[0][1:3]
    assert repr(after.heard[-2:]) == repr(second[-2:])


def test_a_run_that_goes_on_can_be_told_without_its_lock(tmp_path):
    """The process that holds the lock is this one; the command neither waits for it nor takes it."""
    with pytest.raises(Stop):
        search(experiment(*SMALL), tmp_path / "run", factory(Interrupted(60)))
    with RunFolder(tmp_path / "run", experiment(*SMALL), resume=True):
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
        said = command(tmp_path / "run", "--to", "jsonl", "--out", tmp_path / "out").stdout
        assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    heard = [json.loads(line) for line in (tmp_path / "out" / "track.jsonl").read_text().splitlines()]
    journal = [r for r in open_run(tmp_path / "run").records() if r["kind"] == "generation"]
    assert [{**h, "event": 0} for h in heard[1:-1]] == [
        {**{k: v for k, v in r.items() if k != "kind"}, "event": 0} for r in journal
    ]
    assert heard[-1] == {"event": "finish", "status": "unfinished"}
    assert "unfinished" in said


# ---- TensorBoard ------------------------------------------------------------------------------------------------


def test_tensorboard_holds_the_journal(tmp_path, finished):
    replay(open_run(finished), TensorBoardTracker(tmp_path / "tb"))
    read = check_events(finished, tmp_path / "tb")
    generations = open_run(finished).generations()
    for event, generation in zip(read.Histograms("fitness/all"), generations, strict=True):
        values = event.histogram_value
        assert (event.step, values.num) == (generation.generation, len(generation.fitness))
        assert values.sum == pytest.approx(sum(generation.fitness))
        assert (values.min, values.max) == (min(generation.fitness), max(generation.fitness))
    texts = {name: read.Tensors(name)[0].tensor_proto.string_val[0].decode() for name in read.Tags()["tensors"]}
    assert "name: synthetic" in texts["config/text_summary"]
    assert texts["artifact/winner/text_summary"] == str(finished / "winner")
    assert "<- winner" in texts["result/text_summary"]


def test_a_resumed_run_writes_no_step_twice_and_leaves_others_files_alone(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Stop):
        search(experiment(*SMALL), folder, factory(Interrupted(60)), tracker=TensorBoardTracker(folder / "tb"))
    (stale,) = (folder / "tb").iterdir()
    # As after a kill between two writes: the event file knows a step of which the journal knows nothing.
    late = TensorBoardTracker(folder / "tb")
    late.start({"name": "x"}, 3, [])
    for step in range(3):
        late.log(GenerationRecord(step, "s", (9.0,), 9.0, 9.0, 0.0, 0.0, 0, 9.0, 9, 9, 9.0))
    (folder / "other").mkdir()
    foreign = folder / "tb" / "events.out.tfevents.1.host.1"
    foreign.write_bytes(b"")
    search(experiment(*SMALL), folder, factory(ToyEvaluator()), resume=True, tracker=TensorBoardTracker(folder / "tb"))
    assert foreign.exists()
    assert not stale.exists()
    check_events(folder, folder / "tb")


def test_what_is_no_number_is_left_out(tmp_path):
    failed = GenerationRecord(0, "one", (1.0, math.nan), 1.0, 1.0, math.nan, math.nan, 1, math.nan, 2, 3, 4.0)
    tracker = TensorBoardTracker(tmp_path)
    tracker.start({"name": "x"}, 1, [])
    tracker.log(failed)
    scalars, read = events(tmp_path)  # a generation that has been told is on the disk
    assert not {"fitness/spread", "fitness/noise", "driver/sigma"} & set(scalars)
    assert scalars["fitness/best"] == [(0, 1.0)]
    assert read.Histograms("fitness/all")[0].histogram_value.num == 1
    tracker.finish({"status": "failed", "error": "x"})


# ---- Weights & Biases -------------------------------------------------------------------------------------------


def check_wandb(folder, out, steps=3):
    config, history, summary, code, where = on_wandb(out, run_id(folder))
    assert config == json.loads(json.dumps(open_run(folder).config.resolved()))
    lines = expected(folder)
    assert [step for step, _ in history] == list(range(steps))
    for (step, values), line in zip(history, lines, strict=True):
        assert {k: v for k, v in values.items() if k in line} == pytest.approx(line)
        assert values["stage"] == "stage 1"
        assert sum(values["fitness/all/values"]) == len(open_run(folder).generations()[step].fitness)
    return summary, code, where


def test_wandb_offline_holds_the_journal_and_the_winner(tmp_path, finished, capfd):
    replay(open_run(finished), WandbTracker(finished, out=tmp_path))
    assert capfd.readouterr() == ("", "")
    summary, code, where = check_wandb(finished, tmp_path)
    result = open_run(finished).result
    assert (summary["status"], summary["winner"], code) == ("finished", result.winner, 0)
    assert summary["sealed/fitness"] == result.sealed.fitness
    copied = where / "files" / "winner" / "vector.npy"
    assert not copied.is_symlink()
    assert np.array_equal(np.load(copied), result.vector)


def test_wandb_offline_is_written_whole_at_every_end(tmp_path):
    """Live, after an interruption and after the end, each time one folder with all generations."""
    folder, ends = tmp_path / "run", []

    class Watched(WandbTracker):
        def finish(self, summary):
            super().finish(summary)
            ends.append(check_wandb(folder, folder, len(expected(folder)))[:2])

    broken_and_resumed(folder, lambda: Watched(folder))
    assert [(summary["status"], code) for summary, code in ends] == [("interrupted", 255), ("finished", 0)]
    assert len(expected(folder)) == 3


@pytest.fixture
def server(monkeypatch):
    made = Server()
    monkeypatch.setenv("WANDB_BASE_URL", made.url)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    yield made
    made.close()


@pytest.mark.parametrize("lost", [0, 1])
def test_wandb_online_has_every_generation_once_after_an_interruption(tmp_path, server, lost, capfd):
    """Also when W&B has not received everything that the journal of a killed run holds."""
    folder, trackers = tmp_path / "run", []

    def make():
        for place in sorted(server.history)[len(server.history) - lost if trackers else 0 :]:
            del server.history[place]
        trackers.append(WandbTracker(folder, mode="online", project="memory"))
        return trackers[-1]

    broken_and_resumed(folder, make)
    assert server.exits == [255, 0]
    lines = expected(folder)
    assert [line["_step"] for line in server.lines()] == [0, 1, 2]
    for line, wanted in zip(server.lines(), lines, strict=True):
        assert {name: line[name] for name in wanted} == pytest.approx(wanted)
    assert server.files["winner/vector.npy"] == (folder / "winner" / "vector.npy").read_bytes()
    assert trackers[-1].url.endswith(f"/runs/{run_id(folder)}")
    said = b"".join(server.asked)
    assert b'"project":"memory"' in said
    assert b'"program":"evomem"' in said
    for private in (socket.gethostname(), str(tmp_path), sys.argv[0], os.environ.get("USER") or "root"):
        assert f'"{private}'.encode() not in said
    assert capfd.readouterr() == ("", "")


def test_a_run_keeps_its_id_when_it_moves_and_shares_it_with_none(tmp_path, finished):
    whole(tmp_path / "run")
    before = run_id(tmp_path / "run")
    assert before != run_id(finished)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert run_id(tmp_path / "moved") == before


# ---- failures ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(finished):
    return outcome(finished)


class FullDisk(TensorBoardTracker):
    """Every byte after the start meets a full disk."""

    def start(self, *arguments):
        super().start(*arguments)
        for file in self._folder.iterdir():
            file.unlink()
            file.symlink_to("/dev/full")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("jsonl folder", "NotADirectoryError"),
        ("tensorboard folder", "NotADirectoryError"),
        ("tensorboard full", "No space left on device"),
        ("tensorboard missing", "TensorBoard is not installed"),
        ("wandb folder", "NotADirectoryError"),
        ("wandb missing", "wandb is not installed"),
        ("wandb no key", "log in with `wandb login`"),
        ("wandb dead network", "W&B cannot be reached"),
        ("wandb lost network", "W&B cannot be reached"),
    ],
)
def test_no_sink_can_stop_a_run_and_each_says_so_once(
    what, message, tmp_path, undisturbed, monkeypatch, caplog, capfd, request
):
    sink, _, fault = what.partition(" ")
    (tmp_path / "file").write_text("")
    where = tmp_path / "file" / "x" if fault == "folder" else tmp_path / "out"
    online = fault in ("no key", "dead network", "lost network")
    make = {
        "jsonl": lambda: JsonlTracker(where),
        "tensorboard": lambda: (FullDisk if fault == "full" else TensorBoardTracker)(where),
        "wandb": lambda: WandbTracker(tmp_path / "run", out=where, mode="online" if online else "offline"),
    }
    if fault == "missing":
        monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard.writer"}.get(sink, sink), None)
    if fault == "dead network":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setattr(weights_and_biases, "INIT_SECONDS", 1.0)
    after = Recording()
    if fault == "lost network":
        server = request.getfixturevalue("server")
        monkeypatch.setattr(weights_and_biases, "FINISH_SECONDS", 1.0)
        after.log = lambda generation: (server.close(), after.heard.append(("log", generation)))
    whole(tmp_path / "run", make[sink](), after)
    assert caplog.text.count("the run goes on without it") == 1
    assert message in caplog.text
    assert "wandb:" not in "".join(capfd.readouterr())
    assert [h[0] for h in after.heard] == ["start", "log", "log", "log", "artifact", "finish"]
    warnings = [r for r in open_run(tmp_path / "run").records() if r.get("event") == "warning"]
    assert sum(message in record["message"] for record in warnings) == 1
    same(outcome(tmp_path / "run"), undisturbed)


# ---- commands ---------------------------------------------------------------------------------------------------


def command(*words, code=0):
    result = CliRunner().invoke(app, ["track", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def test_the_command_tells_every_sink(tmp_path, finished):
    said = defaultdict(str)
    for sink in ("tensorboard", "wandb", "jsonl", "jsonl"):
        said[sink] = command(finished, "--to", sink, "--out", tmp_path).stdout
    check_events(finished, tmp_path / "tensorboard")
    _, _, where = check_wandb(finished, tmp_path)
    assert f"wandb sync {where}" in said["wandb"]
    assert len((tmp_path / "track.jsonl").read_text().splitlines()) == 3 + 3  # the second replaces the first
    assert "3 generations told, finished" in said["tensorboard"]
    command(finished, "--to", "jsonl")
    assert (finished / "tracked" / "track.jsonl").read_bytes() == (tmp_path / "track.jsonl").read_bytes()


def test_the_command_says_what_is_wrong(tmp_path, finished, monkeypatch):
    def error(*words):
        said = command(*words, code=2).stderr
        assert said.startswith("error: ")
        return said

    assert "is no run folder" in error(tmp_path / "nothing", "--to", "jsonl")
    assert "only wandb has" in error(finished, "--to", "jsonl", "--mode", "online")
    (tmp_path / "file").write_text("")
    assert "--out" in error(finished, "--to", "tensorboard", "--out", tmp_path / "file")
    assert "wandb login" in error(finished, "--to", "wandb", "--mode", "online", "--out", tmp_path)
    with RunFolder(tmp_path / "new", experiment(), resume=False):
        pass
    for sink in ("jsonl", "wandb"):
        assert "nothing to tell" in error(tmp_path / "new", "--to", sink)
    for sink, module in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard.writer")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            assert "pip install 'evomem-toolkit[track]'" in error(finished, "--to", sink, "--out", tmp_path)


def test_trackers_by_name(tmp_path):
    made = build_trackers("terminal, jsonl,tensorboard,wandb:online", tmp_path)
    assert [type(tracker) for tracker in made] == [TerminalTracker, JsonlTracker, TensorBoardTracker, WandbTracker]
    for names, message in [
        ("tensorbord", "Did you mean 'tensorboard'"),
        ("jsonl,jsonl", "given twice"),
        ("jsonl:online", "only wandb has"),
        ("wandb:onlin", "offline or online"),
        (" ,", "no tracker"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build_trackers(names, tmp_path)
    result = CliRunner().invoke(app, ["evolve", "demo", "--out", str(tmp_path / "run"), "--track", "tensorbord"])
    assert result.exit_code == 2
    assert "Did you mean 'tensorboard'" in result.stderr
    assert not (tmp_path / "run").exists()
    assert issubclass(ConfigError, EvomemError)


def test_evolve_tells_those_that_it_is_asked_to(tmp_path, world):  # noqa: F811
    words = ["evolve", str(world / "small.yaml"), "--out", str(tmp_path / "run"), "--track", "jsonl,tensorboard,wandb"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "generation 1/2" not in result.stderr  # the terminal was not asked for
    check_events(tmp_path / "run", tmp_path / "run" / "tensorboard")
    check_wandb(tmp_path / "run", tmp_path / "run", 2)
    heard = [json.loads(line)["event"] for line in (tmp_path / "run" / "track.jsonl").read_text().splitlines()]
    assert heard == ["start", "generation", "generation", "artifact", "finish"]
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2
    assert "--resume --track jsonl,tensorboard,wandb" in again.stderr
