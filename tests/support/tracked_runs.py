"""Small runs for trackers, and readers of what every sink holds that know nothing of the trackers."""

from __future__ import annotations

import json
import struct

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from evomem.runs import open_run, search
from evomem.tracking.weights_and_biases import run_id
from tests.cli.test_cli import world  # noqa: F401 (a fixture)
from tests.support.interrupted_search import SMALL, Interrupted, Stop
from tests.support.synthetic_search import ToyEvaluator, experiment, factory


def whole(folder, *trackers):
    search(experiment(*SMALL), folder, factory(ToyEvaluator()), tracker=list(trackers))


def broken_and_resumed(folder, make):
    """A run that is interrupted in its second generation and goes on, with a new tracker each time."""
    with pytest.raises(Stop):
        search(experiment(*SMALL), folder, factory(Interrupted(40)), tracker=make())
    search(experiment(*SMALL), folder, factory(ToyEvaluator()), tracker=make(), resume=True)


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
