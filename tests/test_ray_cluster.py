"""Ray of their own: drivers that are killed or interrupted, a cluster that loses a machine, and no Ray at all."""

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
from faulty_search import SETTINGS, begun, entries, events_in, logged, names_of_units, units_in
from synthetic_search import experiment
from test_cli import questions
from test_faults import nothing_again
from test_ray_pool import until
from test_runs import outcome, same

from evomem.runs import load_experiment, search
from evomem.runs.journal import read_journal
from evomem.testing.models import tiny, tiny_tokenizer
from evomem.workers import WorkerOptions

HERE = Path(__file__).parent
PROGRAM = [sys.executable, str(HERE / "ray_program.py")]


def begin(folder, *command, **variables):
    """Start a process, a group of its own as a terminal would make it; what it says goes to a file."""
    places = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places, **variables}
    with (folder / "said").open("w") as file:
        words = [str(word) for word in command]
        return subprocess.Popen(words, env=environment, stdout=file, stderr=file, start_new_session=True)


def told(folder, process, seconds=120):
    """Wait for the end of a process that went well; return what it tells in its last line."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    said = (folder / "said").read_text()
    assert process.returncode == 0, said
    return json.loads(said.splitlines()[-1])


def under(process):
    """A process and all that it has started, directly or not, as {pid: command}."""
    parents, names = {}, {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = status.read_text().split("(", 1)[1].rsplit(")", 1)
            command = (status.parent / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        pid = int(status.parent.name)
        parents[pid], names[pid] = int(rest.split()[1]), command or name
    found = {process.pid}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: names[pid] for pid in found}


def alive(pids):
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def lines(folder):
    return len(list(read_journal(folder / "journal.jsonl")))


def test_a_driver_that_is_killed_takes_its_workers_along_and_is_resumed(tmp_path, ray_here):
    search(experiment(*SETTINGS), tmp_path / "whole", logged(tmp_path / "log0"))
    names, folder, log = names_of_units(tmp_path / "whole", tmp_path / "log0"), tmp_path / "run", tmp_path / "log"
    process = begin(tmp_path, *PROGRAM, "drive", folder, log)
    until(lambda: lines(folder) > 25 or process.poll() is not None, 60)
    family = under(process)
    process.kill()
    process.wait()
    finished, now = units_in(folder), time.time()
    assert 20 < len(finished) < len(names)
    workers = {pid for _, pid, _ in entries(log)}
    assert len(workers) == 2
    assert workers < family.keys()
    # Two of Ray's own agents wait a minute for the head that died with the driver.
    until(lambda: not alive(pid for pid, name in family.items() if "Agent" not in name), 20)
    search(experiment(*SETTINGS), folder, logged(log), resume=True, workers=WorkerOptions(1))
    same(outcome(folder), outcome(tmp_path / "whole"))
    nothing_again(log, names, dict.fromkeys(finished, now))
    assert max(begun(log).values()) <= 2


def test_an_interrupted_command_ends_cleanly_and_is_resumed(tmp_path):
    """The command line with a real, tiny model, and Ctrl-C as a terminal sends it: to the whole group."""
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
        "generations": 100,  # so many that the signal comes before the end
        "samples_per_generation": 1,
        "train_contexts": 2,
        "budgets": [16],
        "select": {"contexts": 2, "top": 1},
        "sealed": {"contexts": 3},
    }
    (tmp_path / "small.yaml").write_text(json.dumps(settings))
    # Whatever started these tests: a shell's background job ignores Ctrl-C, and its children would too.
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    evomem = [sys.executable, "-c", f"{heeds}; from evomem.cli import main; main()"]
    folder = tmp_path / "run"
    words = ["evolve", tmp_path / "small.yaml", "--out", folder, "--workers", 2, "--cpus-per-worker", 0.5]
    process = begin(tmp_path, *evomem, *words)
    until(lambda: lines(folder) > 25 or process.poll() is not None, 90)
    family = under(process)
    begun_at = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    process.wait(30)
    took = time.monotonic() - begun_at
    said = (tmp_path / "said").read_text()
    assert process.returncode == 130, said
    assert took < 15
    until(lambda: not alive(family), 10)
    assert len(family) > 3
    assert "interrupted; resume with: evomem evolve" in said
    assert not any(word in said for word in ("Traceback", "raylet", "gcs", "GCS", "core_worker"))
    assert list((folder / "checkpoints").glob("*.ckpt"))
    config = load_experiment(str(tmp_path / "small.yaml"))
    assert lines(folder) < 40 * 4
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
        process = begin(tmp_path, *PROGRAM, "lose_a_node", tmp_path / "run", log, RAY_TMPDIR=ray_folder)
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
    message, kind, _ = facts["clash"]
    assert kind == "WorkerError"
    assert "1.0.0" in message
    assert "install the same versions" in message
    message, kind, _ = facts["too many"]
    assert "3 workers need 3 CPUs, and Ray has 2. Take at most --workers 2" in message


MESSAGES = {
    "missing": r"pip install 'evomem-toolkit\[search\]'",
    "auto": "no Ray cluster could be joined.*ray start --head",
    "client": "not through Ray's client",
    "nonsense": "HOST:PORT",
    "closed": "nothing answers there .*refused",
    "silent": "nothing answers there .*timed out",
    "web": "what answers there is not Ray",
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
