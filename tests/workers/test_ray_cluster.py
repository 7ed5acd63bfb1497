"""Ray of their own: commands that are interrupted, a cluster that loses a machine, and no Ray at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from evomem.runs import load_experiment, search
from evomem.testing.models import tiny, tiny_tokenizer
from evomem.workers.ray import local as ray_local
from tests.cli.test_cli import questions
from tests.support.faulty_search import SETTINGS, begun, entries, events_in, logged, names_of_units
from tests.support.interrupted_search import outcome, same
from tests.support.ray_processes import PROGRAM, alive, begin, lines, told, under
from tests.support.synthetic_search import experiment
from tests.workers.test_ray_pool import until


def interrupted_twice(process):
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.2)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)


def test_an_interrupted_and_a_terminated_command_end_cleanly_and_are_resumed(tmp_path):
    """The command line with a real, tiny model; Ctrl-C, twice, as a terminal sends it: to the whole group."""
    model, tokenizer = tiny("llama", layers=2), tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, questions(model, tokenizer))))
    manager = {"name": "feature_scorer", "options": {"budget": 16, "knots": 1, "features": ["keydiff", "age"]}}
    settings = {
        "name": "small",
        "model": str(tmp_path / "model"),
        "space": {"manager": manager},
        "tasks": [f"file:{tmp_path}/task.jsonl"],
        "driver": {"name": "cmaes", "population": 6},
        "chunk": 2,
        "generations": 60,  # so many that the signals come before the end
        "samples_per_generation": 1,
        "train_contexts": 2,
        "budgets": [16],
        "select": {"contexts": 2, "top": 1},
        "sealed": {"contexts": 3},
    }
    (tmp_path / "small.yaml").write_text(json.dumps(settings))
    # Whatever started these tests: a shell's background job ignores Ctrl-C, and its children would too.
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    evomem = [sys.executable, "-c", f"{heeds}; from evomem.cli.app import main; main()"]
    folder = tmp_path / "run"
    words = ["evolve", tmp_path / "small.yaml", "--out", folder, "--workers", 2, "--cpus-per-worker", 0.5, "--resume"]
    known = 0
    for ending, code in ((interrupted_twice, 130), (subprocess.Popen.terminate, 143)):
        process = begin(tmp_path, *evomem, *words)
        until(lambda known=known, process=process: lines(folder) > known + 25 or process.poll() is not None, 90)
        known, family, began = lines(folder), under(process), time.monotonic()
        ending(process)
        process.wait(30)
        said, took = (tmp_path / "said").read_text(), time.monotonic() - began
        assert process.returncode == code, said
        assert took < 15
        until(lambda family=family: not alive(family), 10)
        assert len(family) > 3
        assert "ed; resume with: evomem evolve" in said
        assert not any(word in said for word in ("Traceback", "raylet", "gcs", "GCS", "core_worker", "***", "@"))
    assert list((folder / "checkpoints").glob("*.ckpt"))
    config = load_experiment(str(tmp_path / "small.yaml"))
    assert lines(folder) < 60 * 4
    search(config, folder, resume=True)
    search(config, tmp_path / "whole")
    found, expected = outcome(folder), outcome(tmp_path / "whole")
    for units in (found[0], expected[0]):
        for evaluations in units.values():
            for evaluation in evaluations:
                del evaluation["tokens"]  # a context that was read before the interruption is read again
    same(found, expected)


def test_a_machine_that_vanishes_and_one_that_comes(tmp_path):
    """Its worker is not blamed, the contexts that it held are read again, and the new machine gets a worker."""
    log = tmp_path / "log"
    with tempfile.TemporaryDirectory(prefix="evomem-ray-") as ray_folder:  # where nobody else looks for a cluster
        (tmp_path / "home").mkdir()
        places = {"RAY_TMPDIR": ray_folder, "HOME": str(tmp_path / "home")}
        process = begin(tmp_path, *PROGRAM, "lose_a_node", tmp_path / "run", log, **places)
        search(experiment("generations=5", *SETTINGS[1:]), tmp_path / "whole", logged(tmp_path / "log0"))
        names = names_of_units(tmp_path / "whole", tmp_path / "log0")
        facts = told(tmp_path, process)
    same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))
    assert len(set(facts["nodes"])) == 2
    assert facts["stats"]["deaths"] == 0
    assert facts["noticed"] - facts["lost"] < 10
    messages = [event["message"] for event in events_in(tmp_path / "run", "warning")]
    assert sum(" is lost: its machine" in message for message in messages) == 1
    assert facts["stats"]["workers_started"] >= 3
    again = sum(begun(log).values()) - len(names)
    assert again <= facts["stats"]["requeued"] + facts["stats"]["duplicates"]
    reads = entries(log.with_suffix(".reads"))
    contexts = {name for _, _, name in reads}
    assert len(contexts) < len(reads) <= 2 * len(contexts) + 2
    assert sum("other users of this machine can read the cluster's token; chmod 600" in m for m in messages) == 1
    message, kind, _ = facts["wrong token"]
    assert kind == "WorkerError"
    assert "asks for a token, and that of RAY_AUTH_TOKEN is another one" in message
    message, kind, _ = facts["no token"]
    assert kind == "WorkerError"
    assert "asks for a token, and /nowhere has none: copy the cluster's" in message
    message, kind, _ = facts["clash"]
    assert kind == "WorkerError"
    assert "1.0.0" in message
    assert "install the same versions" in message
    message, kind, _ = facts["too many"]
    assert "3 workers need 3 CPUs, and Ray has 2. Take at most --workers 2" in message


def test_sockets_lie_where_their_paths_are_short(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")
    assert ray_local.short_folder() == Path("/var/tmp")
    (tmp_path / ("x" * 90)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 90)))
    assert ray_local.short_folder() == Path("/tmp")
    monkeypatch.setattr(ray_local, "ROOM", 3)
    with pytest.raises(OSError, match=r"may have 3 characters.*Set TMPDIR to a folder with a shorter path"):
        ray_local.short_folder()


MESSAGES = {
    "missing": r"pip install 'evomem-toolkit\[search\]'",
    "auto": "no Ray cluster could be joined.*ray start --head",
    "client": "not through Ray's client",
    "nonsense": "HOST:PORT",
    "closed": "nothing answers there .*refused",
    "silent": "nothing answers there .*timed out",
    "web": "what answers there is not Ray",
    "open": "asks for no token: whoever reaches its ports can run code.*--insecure",
    "64": "64 workers of 1 cores need 64 cores; this machine has",
}


def test_no_ray(tmp_path):
    process = begin(tmp_path, *PROGRAM, "errors", tmp_path)
    found = told(tmp_path, process)
    assert found.keys() == MESSAGES.keys()
    for name, pattern in MESSAGES.items():
        message, kind, seconds = found[name]
        assert kind == "WorkerError"
        assert seconds < 4
        with pytest.raises(ValueError, match=pattern):
            raise ValueError(message)
