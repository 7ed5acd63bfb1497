"""Run: one scorer across memories: found on one kind, used unchanged on the others; the moons' part, and the table.

    OMP_NUM_THREADS=1 python -m experiments.across_memories search --seed 0 --out runs/across/moons-0
    OMP_NUM_THREADS=1 python -m experiments.across_memories moons runs/across/*-[012] --out runs/across/moons.json
    python -m experiments.across_memories report runs/across/cells.json runs/across/moons.json \
        --out docs/results/across_memories

`report` also takes the JSON that an earlier call of it wrote, so that a table can get further rows and columns.

Six weights of observations that mean the same in every memory (`FEATURES`). `evomem evolve across/streams` (and
``matrix``, ``kv``) finds them on models of evomem, and `evomem transfer` moves them between these. The bounded store
of the three moons' mosaic is no such model (`experiments.moons_store`), so it is searched and measured here. The
numbers of the table are a manager's advantage over the heuristic that is best on that memory, with paired intervals.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evomem import plugins
from evomem.drivers import Fitness, drivers
from evomem.errors import ConfigError, EvomemError
from evomem.files.atomic import write_atomically
from evomem.managers import MemoryManager, build
from evomem.managers.vector import load_vector, to_vector
from evomem.report.subjects import resolve
from evomem.report.tables import read_rows
from evomem.report.transfer import TransferRow, cells
from evomem.statistics import paired_bootstrap, verdict
from evomem.tasks.base import Split
from evomem.tasks.streams.moons import MOONS
from experiments.moons import MoonsMosaic
from experiments.moons_store import BUDGET, manager_of, measure, series_of

FEATURES = ("recency", "frequency", "frequency_decayed:32", "relevance:8", "novelty", "age")
"""Observations that mean the same in every memory; those of `experiments/across/*.yaml`."""
SCORER = f"feature_scorer(features={list(FEATURES)}, knots=1, sinks=0, recent=1)"
FIELD = ("random", "fifo", "lru", "lfu", "slot_relevance", "keydiff")
"""Heuristics that decide about every memory."""
MOONS_FIELD = ("LFU", "surprise, equal split")
"""Of `experiments.moons_store`, the best with equal pairs a head; LFU keeps, of equals, the oldest."""
WHERE = "three moons"


@dataclass(frozen=True)
class Gain:
    """One manager on one memory, against the heuristic that is best there.

    Attributes
    ----------
    manager, found_on : the manager, and the model that it was found on.
    memory : model and task that it was measured on.
    value : its own mean: nats for a read or an answer token; on the moons minus the mean absolute error.
    full : of the memory that keeps everything.
    best, best_value : the best heuristic.
    gain, interval : the manager's mean advantage over it, with a paired bootstrap interval of 95 %.
    budget : pairs, rows or slots a head.
    samples : streams, texts or series.
    """

    manager: str
    found_on: str
    memory: str
    value: float
    full: float
    best: str
    best_value: float
    gain: float
    interval: list[float]
    budget: float
    samples: int


def search(seed: int, *, generations: int, popsize: int) -> tuple[MemoryManager, list[float]]:
    """Return the scorer that CMA-ES finds on the moons that are not sealed, and the best fitness of each generation.

    Fitness: minus the mean error on series that are drawn anew for each generation.
    """
    model, manager = MoonsMosaic.given(MOONS), build(SCORER, budget=BUDGET).requires_grad_(False)
    start = to_vector(manager)
    driver = drivers.get("cmaes")(len(start), start, seed, popsize=popsize, sigma=1.0)
    history = []
    for generation in range(generations):
        first = 7 * (1 + generation) + 1000 * seed
        lessons = [series_of(split, 1, first) for split in (Split.TRAIN, Split.SELECT)]
        population, worth = driver.ask(), []
        for vector in population.vectors:
            load_vector(manager, vector)
            errors = [error for series in lessons for error in measure(model, series, manager)["errors"]]
            worth.append(-float(np.mean(errors)))
        driver.tell(population, Fitness(np.array(worth)))
        history.append(max(worth))
    load_vector(manager, driver.mean)
    return manager, history


def on_moons(sources: Sequence[str], starts: int) -> dict[str, dict[str, Any]]:
    """Return what managers, the field and the full store do on the sealed moons, by name.

    Every head's store has `BUDGET` pairs, whatever budget a plug-in has by itself.
    """
    model, series = MoonsMosaic.given(MOONS), series_of(Split.SEALED, starts, 100_000)
    results = {"full": measure(model, series, build("full")) | {"role": "full", "found_on": ""}}
    field = {spec: build(spec, budget=BUDGET) for spec in FIELD} | {name: manager_of(name) for name in MOONS_FIELD}
    for name, manager in field.items():
        results[name] = measure(model, series, manager) | {"role": "field", "found_on": ""}
    for source in sources:
        subject = resolve(source)
        if subject.name in results:
            raise ConfigError(
                f"{source}: there is a manager called {subject.name!r} already; give its run another name"
            )
        manager = subject.manager.with_options(budget=BUDGET).requires_grad_(False)
        found_on = " + ".join(subject.models)
        results[subject.name] = measure(model, series, manager) | {"role": "subject", "found_on": found_on}
    return results


def gains_on_moons(results: Mapping[str, Mapping[str, Any]]) -> list[Gain]:
    """Return the gains of what `on_moons` measured."""
    errors = {name: np.array(row["errors"]) for name, row in results.items()}
    best = min((name for name, row in results.items() if row["role"] == "field"), key=lambda name: errors[name].mean())
    gains = []
    for name, row in results.items():
        if row["role"] == "subject":
            gap = paired_bootstrap((-errors[name]).tolist(), (-errors[best]).tolist())
            gains.append(
                Gain(
                    name, row["found_on"], WHERE, -float(errors[name].mean()), -float(errors["full"].mean()), best,
                    -float(errors[best].mean()), gap.mean, [gap.low, gap.high], BUDGET, len(errors[name]),
                )
            )  # fmt: skip
    return gains


def gains_of_transfer(rows: Sequence[TransferRow]) -> list[Gain]:
    """Return the gains that `evomem transfer --json` measured.

    Raises
    ------
    ConfigError : a cell has no field, or too few samples for an interval.
    """
    gains = []
    for cell in cells(rows):
        row, best = cell.row, cell.best
        if best is None or best.difference is None or best.interval is None or cell.full is None:
            raise ConfigError(
                f"{row.subject} on {row.model}, {row.task}: no heuristic to set it against, or under two samples; "
                "measure it again with --against"
            )
        gains.append(
            Gain(
                row.subject, row.train_model, f"{row.model}: {row.task}", row.loglik, cell.full.loglik, best.manager,
                best.loglik, best.difference, best.interval, float(row.budget or 0), row.samples,
            )
        )  # fmt: skip
    return gains


def gains_of(path: Path) -> list[Gain]:
    """Return the gains of a file: of ``evomem transfer --json``, of ``moons``, or an earlier table's (``--out``).

    Raises
    ------
    ConfigError : it is none of them.
    """
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path}: is no JSON ({error}); give files of evomem transfer --json, of moons, or an earlier table"
        ) from None
    if isinstance(known, dict):
        return gains_on_moons(known)
    if isinstance(known, list) and known and isinstance(known[0], dict) and "best_value" in known[0]:
        try:
            return [Gain(**one) for one in known]
        except TypeError as error:
            raise ConfigError(f"{path}: a row is no gain of an earlier table ({error})") from None
    return gains_of_transfer(read_rows(path, TransferRow))


def _require_one_yardstick(gains: Sequence[Gain]) -> None:
    """Raise `ConfigError` if managers of a column were set against different heuristics, or one is there twice."""
    yardsticks: dict[tuple[str, float], Gain] = {}
    names: set[tuple[str, str, float]] = set()
    for one in gains:
        column = (one.memory, one.budget)
        first = yardsticks.setdefault(column, one)
        if (first.best, first.samples) != (one.best, one.samples) or abs(first.best_value - one.best_value) > 1e-6:
            raise ConfigError(
                f"{one.memory}: {first.manager} was set against {first.best} {first.best_value:.4f} on {first.samples} "
                f"samples, {one.manager} against {one.best} {one.best_value:.4f} on {one.samples}; measure both with "
                "the same --samples, --budgets, --against and protocol"
            )
        if (one.manager, *column) in names:
            raise ConfigError(f"{one.memory}: {one.manager} is there twice; leave one of the files out")
        names.add((one.manager, *column))


def table(gains: Sequence[Gain]) -> list[str]:
    """Return the matrix as Markdown: managers down, memories across; wins are bold, losses in italics."""
    places = list(dict.fromkeys((one.memory, one.budget) for one in gains))
    heads = [f"{memory}, {budget:g}" for memory, budget in places]
    known = {(one.manager, one.memory, one.budget): one for one in gains}
    lines = ["| manager, found on | " + " | ".join(heads) + " |", "|---|" + "---|" * len(places)]
    for manager in dict.fromkeys(one.manager for one in gains):
        row = [known.get((manager, *place)) for place in places]
        found_on = next(one.found_on for one in row if one is not None)
        lines.append(f"| {manager}, {found_on} | " + " | ".join(map(_cell, row)) + " |")
    first = {place: next(one for one in gains if (one.memory, one.budget) == place) for place in places}
    best = [f"{one.best} {one.best_value:.3f}" for one in first.values()]
    lines.append("| best heuristic there | " + " | ".join(best) + " |")
    lines.append("| everything kept | " + " | ".join(f"{one.full:.3f}" for one in first.values()) + " |")
    return lines


def _cell(one: Gain | None) -> str:
    if one is None:
        return ""
    text = f"{one.gain:+.3f} [{one.interval[0]:+.3f}, {one.interval[1]:+.3f}]"
    return {"wins": f"**{text}**", "loses": f"*{text}*"}.get(verdict(one.interval), text)


def counts(gains: Sequence[Gain]) -> list[str]:
    """Return, for what was found on one memory and used on another, the mean gain over seeds, wins, ties and losses."""
    places = list(dict.fromkeys((one.memory, one.budget) for one in gains))
    lines = ["| found on | " + " | ".join(f"{m}, {b:g}" for m, b in places) + " |", "|---|" + "---|" * len(places)]
    for found_on in dict.fromkeys(one.found_on for one in gains):
        words = []
        for place in places:
            some = [one for one in gains if one.found_on == found_on and (one.memory, one.budget) == place]
            won = [verdict(one.interval) for one in some]
            mean = f"{np.mean([one.gain for one in some]):+.3f}" if some else ""
            words.append(f"{mean} ({won.count('wins')}, {won.count('ties')}, {won.count('loses')})" if some else "")
        lines.append(f"| {found_on} | " + " | ".join(words) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, measure, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = parser.add_subparsers(dest="word", required=True)
    one = words.add_parser("search", help="find the scorer on the moons' bounded store; leaves a plug-in")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--out", type=Path, required=True, help="folder of the plug-in")
    one.add_argument("--generations", type=int, default=12)
    one.add_argument("--popsize", type=int, default=12)
    two = words.add_parser("moons", help="measure runs and plug-ins on the moons' bounded store")
    two.add_argument("managers", nargs="+", help="runs or plug-in folders")
    two.add_argument("--out", type=Path, required=True, help="JSON file")
    two.add_argument("--starts", type=int, default=32, help="sealed series, at least 2")
    three = words.add_parser("report", help="print the matrix of gains, and write it with --out")
    three.add_argument("files", nargs="+", type=Path, help="of evomem transfer --json, of moons, and earlier tables")
    three.add_argument("--out", type=Path, help="JSON file, without its suffix")
    given = parser.parse_args(arguments)
    try:
        _WORDS[given.word](given)
    except (EvomemError, OSError) as error:
        sys.exit(f"across_memories: {error}")


def _search(given: argparse.Namespace) -> None:
    if given.out.exists():
        raise ConfigError(f"{given.out}: is there already; give another folder")
    manager, history = search(given.seed, generations=given.generations, popsize=given.popsize)
    provenance = {
        "experiment": f"moons-{given.seed}", "models": [{"name": WHERE}], "seed": given.seed,
        "generations": given.generations, "population": given.popsize, "fitness": history,
    }  # fmt: skip
    plugins.save(manager, given.out, provenance)
    print(given.out, " ".join(f"{one:.3f}" for one in history))


def _moons(given: argparse.Namespace) -> None:
    if given.starts < 2:
        raise ConfigError(f"--starts {given.starts}: an interval needs at least 2 series")
    results = on_moons(given.managers, given.starts)
    write_atomically(given.out, (json.dumps(results) + "\n").encode())
    print("\n".join(table(gains_on_moons(results))))


def _report(given: argparse.Namespace) -> None:
    gains = [one for path in given.files for one in gains_of(path)]
    _require_one_yardstick(gains)
    print("\n".join([*table(gains), "", *counts(gains)]))
    if given.out is not None:
        text = "[\n" + ",\n".join(json.dumps(asdict(one)) for one in gains) + "\n]\n"
        write_atomically(given.out.with_suffix(".json"), text.encode())


_WORDS = {"search": _search, "moons": _moons, "report": _report}

if __name__ == "__main__":
    main()
