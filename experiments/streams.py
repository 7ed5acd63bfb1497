"""Run: streams of requests: a tuned grid of R, evolved replacement against the field, slot counts by the input.

    python -m experiments.streams grid --task zipf:length=400 --slots 16,32,64 --json runs/grids.json
    python -m experiments.streams table --task zipf:length=400 --slots 16,32,64 --grid runs/grids.json \
        --runs runs/ghosts-1,runs/ghosts-2 --more gradient=runs/gradient-1 --json docs/results/streams.json
    python -m experiments.streams count --runs runs/count-1,runs/count-2 --json docs/results/streams.json

``grid`` measures 60 points of R = α·frequency + β·recency + γ·context on training streams and names the best at every
number of slots. ``table`` measures managers on held-out streams beside the policies of `replacement` (with libCacheSim
on the path: ``make test-libcachesim`` puts it into build/libcachesim) and Belady's bound; differences are paired stream
by stream, intervals are of 95 %. ``count`` sets an input-dependent number of slots against the same ranking at every
fixed number, by hit rate less a price a slot. Every command writes its rows into one file, under a key of its own.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import evomem
from evomem.errors import EvomemError, MissingPackagesError, TaskError
from evomem.evaluation import EXACT
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.evaluation.streams import StreamEvaluator
from evomem.files.atomic import replacing
from evomem.managers import MemoryManager, build
from evomem.managers.allocation import ByDistinctRate
from evomem.managers.heuristics.replacement import SlotRelevance, ranks
from evomem.managers.reallocation import with_allocation
from evomem.memory import LayerView
from evomem.models import load
from evomem.statistics import Interval, paired_bootstrap
from evomem.tasks import build as build_task
from evomem.tasks.base import Sample
from evomem.tasks.streams.base import StreamTask
from evomem.tasks.streams.replacement import FEWEST_SLOTS, READ_ONLY, belady_hits, hit_rate, hits

POLICIES = ("fifo", "lru", "lfu", "lru2", "arc", "2q", "lirs", "sieve", "s3fifo", "wtinylfu")
"""Of the library; the managers of the first three names hit where they do (`tests/managers/test_replacement.py`)."""
MANAGERS = ("random",)
FREQUENCIES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
CONTEXTS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
POINTS = (
    *((a, 1.0, c) for a in FREQUENCIES for c in CONTEXTS),
    *((1.0, 0.0, c) for c in (0.0, 1.0, 4.0, 16.0)),
)
"""Weights of frequency, recency and context: R has no scale, so that of recency is 1, or 0."""
WINDOW = 8


class GridRelevance(SlotRelevance):
    """`SlotRelevance` whose weights are parameters, so that a whole grid of them is one batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "frequency": 1.0, "recency": 1.0, "context": 1.0, "window": WINDOW, "every": 1})
        self.point = nn.Parameter(torch.zeros(3), requires_grad=False)

    @classmethod
    def at(cls, point: Sequence[float], slots: int) -> GridRelevance:
        """Return R with the weights of a point, at a number of slots."""
        made = cls(budget=slots)
        made.point.copy_(torch.tensor(point))
        return made

    def score(self, view: LayerView) -> Tensor:
        """Return ranks by R, of equals the one that was read last: (batch, kv_heads, slots)."""
        frequency, recency, context = self.point.unbind(-1)
        since = view.recorded["recency"].float()
        worth = frequency * torch.log1p(view.recorded["frequency"].float()) - recency * torch.log1p(since)
        return ranks(view, worth + context * view.recorded[f"relevance:{WINDOW}"].float(), -since)


def spec_of(point: Sequence[float]) -> str:
    """Return the manager that a point of the grid is."""
    names = ("frequency", "recency", "context")
    return f"slot_relevance({', '.join(f'{name}={value:g}' for name, value in zip(names, point, strict=True))})"


def task_and_samples(
    spec: str, split: str, count: int, skip: int = 0
) -> tuple[StreamEvaluator, StreamTask[Any], list[Sample]]:
    """Return the evaluator of a pair memory that decides at every request, the task, and samples after the first ones.

    Raises
    ------
    TaskError : the task has no streams.
    """
    model = load("pair-memory")
    task = build_task(spec, model.tokenizer)
    if not isinstance(task, StreamTask):
        raise TaskError(f"task {spec}: has no streams of requests; take zipf, context_switches or key_overwrites")
    evaluator = StreamEvaluator(model, EvaluationProtocol(kind="streaming", every=1))
    return evaluator, task, task.samples(split, skip + count, 0)[skip:]


def measured(
    evaluator: StreamEvaluator, task: StreamTask[Any], samples: Sequence[Sample], managers: Sequence[MemoryManager]
) -> dict[str, np.ndarray]:
    """Return hit rates, slots and bytes, (managers, samples) each."""
    rows = evaluator.evaluate_together(managers, samples, task, EXACT)
    names = {"exact": "exact", "slots": "slots", "bytes": "bytes_mean"}
    return {name: np.array([[getattr(one, field) for one in row] for row in rows]).T for name, field in names.items()}


def grid(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the grid on training streams; returns the best point at every number of slots, and all means."""
    evaluator, task, samples = task_and_samples(arguments.task, "train", arguments.streams)
    result: dict[str, Any] = {
        "task": arguments.task,
        "split": "train",
        "streams": len(samples),
        "best": {},
        "means": {},
    }
    for slots in arguments.slots:
        means = measured(evaluator, task, samples, [GridRelevance.at(point, slots) for point in POINTS])["exact"].mean(
            1
        )
        best = int(means.argmax())
        result["best"][str(slots)] = spec_of(POINTS[best])
        result["means"][str(slots)] = {
            spec_of(point): round(float(m), 4) for point, m in zip(POINTS, means, strict=True)
        }
        print(f"{slots} slots: {spec_of(POINTS[best])} {means[best]:.4f}", flush=True)
    return result


def replacement_rates(task: StreamTask[Any], samples: Sequence[Sample], slots: int) -> dict[str, np.ndarray]:
    """Return hit rates (samples,) of Belady's bound and of the library's policies, where they are made for the task."""
    streams, rates = [task.stream(sample) for sample in samples], dict[str, np.ndarray]()
    fetched = not any((stream.reads & ~stream.writes).any() for stream in streams)
    if fetched:
        rates["belady"] = np.array([hit_rate(stream, belady_hits(stream, slots)) for stream in streams])
    for policy in POLICIES:
        if (not fetched and policy not in READ_ONLY) or slots < FEWEST_SLOTS.get(policy, 1):
            continue
        try:
            rates[policy] = np.array([hit_rate(stream, hits(stream, policy, slots)) for stream in streams])
        except MissingPackagesError as error:
            raise EvomemError(
                f"{error}; make test-libcachesim installs it into build/libcachesim: put that on PYTHONPATH"
            ) from None
    return rates


def winner(run: str, slots: int) -> MemoryManager:
    """Return a run's winner, or a plug-in, at a number of slots."""
    return loaded(run).with_options(budget=slots)


def loaded(run: str) -> MemoryManager:
    """Return a run's winner, or a plug-in."""
    plugin = Path(run) / "winner" / "plugin"
    return evomem.load(plugin if plugin.exists() else run)


def ahead(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Return the paired difference of hit rates (samples,) with its interval."""
    found: Interval = paired_bootstrap(list(first), list(second))
    return {"mean": round(found.mean, 4), "interval": [round(found.low, 4), round(found.high, 4)]}


def table(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure managers on held-out streams; returns rows by number of slots, and prints them as a table."""
    evaluator, task, samples = task_and_samples(arguments.task, "sealed", arguments.streams, arguments.skip)
    grids = [part for part in known_rows(arguments.grid).values() if "best" in part]
    tuned = next((part for part in grids if part["task"] == arguments.task), None)
    if tuned is None:
        raise EvomemError(
            f"{arguments.grid}: holds no grid of {arguments.task}; make one with: python -m experiments.streams grid"
        )
    groups = dict(arguments.more)
    subjects = list(dict.fromkeys([*arguments.runs, *(run for runs in groups.values() for run in runs)]))
    result: dict[str, Any] = {"task": arguments.task, "split": "sealed", "skipped": arguments.skip}
    result |= {"streams": len(samples), "slots": {}}
    for slots in arguments.slots:
        if str(slots) not in tuned["best"]:
            raise EvomemError(f"{arguments.grid}: has no grid at {slots} slots; it has {', '.join(tuned['best'])}")
        field = {name: build(name, budget=slots) for name in MANAGERS}
        field[f"best R: {tuned['best'][str(slots)]}"] = build(tuned["best"][str(slots)], budget=slots)
        managers = [*(winner(run, slots) for run in subjects), *field.values()]
        numbers = measured(evaluator, task, samples, managers)
        names = [*subjects, *field]
        rates = dict(zip(names, numbers["exact"], strict=True)) | replacement_rates(task, samples, slots)
        evolved = np.mean([rates[run] for run in arguments.runs], axis=0)
        rates |= {label: np.mean([rates[run] for run in runs], axis=0) for label, runs in groups.items()}
        rows: dict[str, Any] = {"evolved": {"mean": round(float(evolved.mean()), 4)}}
        for name, rate in rates.items():
            rows[name] = {"mean": round(float(rate.mean()), 4), "evolved_ahead_by": ahead(evolved, rate)}
            rows[name]["rates"] = [round(float(value), 4) for value in rate]
            if name in names:
                place = names.index(name)
                rows[name] |= {field: round(float(numbers[field][place].mean()), 1) for field in ("slots", "bytes")}
        for label in groups:
            others = {name: ahead(rates[label], rates[name]) for name in (*field, "belady", *POLICIES) if name in rates}
            rows[label]["ahead_by"] = others
        result["slots"][str(slots)] = rows
        print(f"\n{arguments.task}, {slots} slots, {len(samples)} streams\n")
        print("| | hit rate | share of Belady's | evolved, ahead by |\n|---|---|---|---|")
        for name, row in rows.items():
            share = f"{row['mean'] / rows['belady']['mean']:.3f}" if "belady" in rows else "-"
            by = row.get("evolved_ahead_by")
            print(
                f"| {name} | {row['mean']:.4f} | {share} | " + (f"{by['mean']:+.4f} {by['interval']} |" if by else "|")
            )
    return result


def count(arguments: argparse.Namespace) -> dict[str, Any]:
    """Set counts that the input decides against every fixed count of the same ranking, by hit rate - price x slots."""
    evaluator, task, samples = task_and_samples(arguments.task, "sealed", arguments.streams)
    adaptive = [loaded(run) for run in arguments.runs]
    for run, manager in zip(arguments.runs, adaptive, strict=True):
        if not isinstance(manager.allocation, ByDistinctRate):
            raise EvomemError(f"{run}: its allocation is {manager.allocation.name!r}; count is about by_distinct_rate")
    fixed = [with_allocation(one, "uniform").with_options(budget=n) for one in adaptive for n in arguments.fixed]
    numbers = measured(evaluator, task, samples, [*adaptive, *fixed])
    net = numbers["exact"] - arguments.price * numbers["slots"]
    result: dict[str, Any] = {"task": arguments.task, "price": arguments.price, "streams": len(samples), "runs": {}}
    width = len(arguments.fixed)
    for place, (run, manager) in enumerate(zip(arguments.runs, adaptive, strict=True)):
        own = net[len(adaptive) + place * width :][:width]
        best = int(own.mean(1).argmax())
        result["runs"][run] = {
            "coefficients": [round(x, 3) for x in manager.allocation.coefficients.tolist()],
            "hit_rate": round(float(numbers["exact"][place].mean()), 4),
            "slots": round(float(numbers["slots"][place].mean()), 2),
            "net": round(float(net[place].mean()), 4),
            "best_fixed": arguments.fixed[best],
            "net_of_fixed": {str(n): round(float(v), 4) for n, v in zip(arguments.fixed, own.mean(1), strict=True)},
            "ahead_of_best_fixed": ahead(net[place], own[best]),
            "by_keys": {}, "by_filler": {},
        }  # fmt: skip
    for name, values, spec in (
        ("keys", arguments.keys, arguments.by_keys),
        ("filler", arguments.fillers, arguments.by_filler),
    ):
        for value in values:
            _, other, streams = task_and_samples(spec.format(value), "sealed", max(4, arguments.streams // 4))
            slots = measured(evaluator, other, streams, adaptive)["slots"]
            for run, own in zip(arguments.runs, slots, strict=True):
                cell = [round(float(own.mean()), 2), round(float(own.std(ddof=1)), 2)]
                result["runs"][run][f"by_{name}"][str(value)] = cell
    print(json.dumps(result, indent=1), flush=True)
    return result


def known_rows(path: Path) -> dict[str, Any]:
    """Return the rows that a file of this script holds, by key; none where there is no file.

    Raises
    ------
    EvomemError : it holds something else.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise EvomemError(f"{path}: is no JSON ({error}); mend it, or name another file") from None
    if not isinstance(rows, dict) or not all(isinstance(part, dict) for part in rows.values()):
        raise EvomemError(f"{path}: holds no rows that this script has written; name another file")
    return rows


def text_of(rows: dict[str, Any]) -> str:
    """Return what a file of rows holds: JSON, a list of numbers on a line."""
    text = json.dumps(rows, indent=1)
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda row: f"[{' '.join(row[1].split())}]", text) + "\n"


def whole_numbers(text: str) -> list[int]:
    """Return numbers that commas separate; raise `argparse.ArgumentTypeError` for anything else."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers of at least 1, for example 16,32,64")
    return [int(part) for part in parts]


def shares(text: str) -> list[float]:
    """Return shares in [0, 1) that commas separate."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: give shares of at least 0 and less than 1, for example 0,0.5")
    return values


def price(text: str) -> float:
    """Return a price; raise `argparse.ArgumentTypeError` unless it is a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: give a finite number of at least 0")
    return value


def template(text: str) -> str:
    """Return a task with one place ``{}`` for a value; raise `argparse.ArgumentTypeError` for anything else."""
    if text.count("{") != 1 or text.count("}") != 1 or "{}" not in text:
        raise argparse.ArgumentTypeError(f"{text!r}: give a task with {{}} where the value goes")
    return text


def names(text: str) -> list[str]:
    """Return names that commas separate; raise `argparse.ArgumentTypeError` where there is none, or one twice."""
    parts = [part for part in text.split(",") if part]
    if not parts or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r}: give at least one name, and none twice")
    return parts


def group(text: str) -> tuple[str, list[str]]:
    """Return a label and the names behind it; raise `argparse.ArgumentTypeError` for no label of its own."""
    label, equals, rest = text.partition("=")
    if not label or not equals or label in ("belady", "evolved", *POLICIES, *MANAGERS):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give LABEL=RUN,RUN, for example gradient=runs/gradient-1, and no policy's name as the label"
        )
    return label, names(rest)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    root = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = root.add_subparsers(dest="command", required=True)
    filler = "filler=0.4,filler_keys=400"
    mix = f"zipf:length=400,keys=128,topics=4,fewest_keys=16,{filler}"
    parts = {name: commands.add_parser(name) for name in ("grid", "table", "count")}
    for name, part in parts.items():
        part.add_argument("--task", default=mix if name == "count" else "zipf:length=400", help="a task of streams")
        part.add_argument("--streams", type=int, default=8 if name == "grid" else 24, help="streams of the split")
        part.add_argument("--json", type=Path, required=True, help="file that the rows are written into")
        part.add_argument("--key", default=None, help="under which key; by default the command and the task")
    for name in ("grid", "table"):
        parts[name].add_argument("--slots", type=whole_numbers, default=[16, 32, 64], help="for example 16,32,64")
    parts["table"].add_argument(
        "--skip", type=int, default=0, help="streams of the split that are left out before them"
    )
    parts["table"].add_argument("--grid", type=Path, required=True, help="file that `grid` wrote")
    for name in ("table", "count"):
        parts[name].add_argument("--runs", type=names, required=True, help="runs or plug-ins, one a search seed")
    parts["table"].add_argument(
        "--more",
        type=group,
        action="append",
        default=[],
        help="LABEL=RUN,RUN: further runs or plug-ins, not in the mean",
    )
    one = parts["count"]
    one.add_argument("--price", type=price, default=0.003, help="of a slot, in hit rate")
    one.add_argument("--fixed", type=whole_numbers, default=[12, 16, 24, 32, 40, 48, 64], help="fixed counts")
    one.add_argument("--keys", type=whole_numbers, default=[16, 32, 64, 128], help="different items of a stream")
    one.add_argument("--fillers", type=shares, default=[0.0, 0.2, 0.4, 0.6], help="shares of requests nobody reads")
    one.add_argument(
        "--by-keys", type=template, default=f"zipf:length=400,keys={{}},topics=4,{filler}", help="task for --keys"
    )
    one.add_argument("--by-filler", type=template, default="zipf:length=400,keys=64,topics=4,filler={},filler_keys=400")
    return root


def main() -> None:
    """Run one command, and put its rows into the file."""
    arguments = parser().parse_args()
    if arguments.streams < 1 or getattr(arguments, "skip", 0) < 0:
        raise SystemExit(f"--streams {arguments.streams}, or --skip: give at least 1 stream, and skip at least 0")
    try:
        known_rows(arguments.json)  # before hours of measuring, and again after them
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        with replacing(arguments.json) as partial:
            partial.touch()
            result = {"grid": grid, "table": table, "count": count}[arguments.command](arguments)
            key = arguments.key or f"{arguments.command} {arguments.task}"
            partial.write_text(text_of({**known_rows(arguments.json), key: result}))
    except (EvomemError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
