"""Trackers: every sink holds what the journal holds, whatever happened on the way; none can stop a run."""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict

import pytest
from typer.testing import CliRunner

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
from tests.cli.test_cli import world  # noqa: F401 (a fixture)
from tests.support.interrupted_search import SMALL, Interrupted, Stop, outcome, same
from tests.support.synthetic_search import ToyEvaluator, experiment, factory
from tests.support.tracked_runs import broken_and_resumed, check_events, check_wandb, events, whole


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
