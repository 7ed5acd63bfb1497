"""Run: from the end of the search to the one winner, its plug-in, and its one report on the sealed split."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evomem.drivers.base import Driver
from evomem.evaluation.measurement import EXACT, NOTHING
from evomem.files.atomic import write_atomically, write_vector
from evomem.runs.archive import Finalist
from evomem.runs.candidates import Judge, Plan, Row
from evomem.runs.fitness import measurement_of
from evomem.runs.front import FrontArchive, Member, front_json, plugin_folder
from evomem.runs.result import RunResult, Score, by_sample, write_result
from evomem.tasks.base import Split
from evomem.tracking.base import logger

if TYPE_CHECKING:
    from evomem.runs.search import Search


def choose(search: Search, judge: Judge, driver: Driver) -> RunResult:
    """Re-evaluate the finalists on `select`, report the best on `sealed` once, and write winner and result.

    For a driver that searches a front, the front on `select` takes the place of the best; the winner is its member with
    the best score.

    Raises
    ------
    FitnessError : no finalist has a finite fitness, or a winner has none on `sealed`.
    """
    config = search.config
    finalists = search.archive.finalists(driver.mean, search.start)
    scores, _ = _scores(search, judge, "select", Split.SELECT, config.select.contexts, finalists)
    fitness = np.array([score.fitness for score in scores])
    chosen = search.archive.chosen(fitness, np.array([score.bytes_mean for score in scores]))
    if not chosen:
        raise search.all_failed("select", None, f"select: all {len(finalists)} finalists")
    best = chosen[-1]
    winner = finalists[best]
    sealed, rows = _scores(
        search, judge, "sealed", Split.SEALED, config.sealed.contexts, [finalists[place] for place in chosen]
    )
    for place, score in zip(chosen, sealed, strict=True):
        if not math.isfinite(score.fitness):
            raise search.all_failed("sealed", None, f"sealed: some samples of {finalists[place].label}")
    train = min(config.select.contexts, search.plan[-1].train_contexts)
    result = RunResult(
        folder=search.path,
        winner=winner.label,
        vector=winner.vector,
        generations=len(search.records),
        stopped=driver.stopped(),
        finalists={finalist.label: score for finalist, score in zip(finalists, scores, strict=True)},
        train=_scores(search, judge, "check", Split.TRAIN, train, [winner])[0][0],
        select=scores[best],
        sealed=sealed[-1],
        spent=asdict(search.run_folder.journal.totals),
        front=len(chosen) if isinstance(search.archive, FrontArchive) else 0,
    )
    if result.front:
        front = [finalists[place] for place in chosen]
        _write_front(search, result, front, [scores[place] for place in chosen], sealed, rows)
    _write(search, result)
    return result


def _scores(
    search: Search, judge: Judge, phase: str, split: Split, contexts: int, finalists: list[Finalist]
) -> tuple[list[Score], list[Row]]:
    """Return the finalists' scores, all on the same samples of a split, as the last stage measures; and the rows."""
    stage = search.plan[-1]
    samples = tuple(tuple(search.samples.pool(task, split, contexts)) for task in stage.tasks)
    # Only what is measured by answers is reported by them: another objective has not made the model answer.
    answers = "loglik" in measurement_of(stage.fitness)
    exact = answers and split is Split.SEALED and search.config.sealed.exact
    who = "the winner" if len(finalists) == 1 else f"{len(finalists)} candidates"
    logger.info(f"{phase}: {who} on {sum(map(len, samples))} {split} samples")
    vectors = np.stack([finalist.vector for finalist in finalists])
    seeds = np.arange(len(finalists), dtype=np.int64)
    fitness, rows = judge.judge(Plan(phase, None, stage, samples, EXACT if exact else NOTHING), vectors, seeds)
    return [Score.of(float(fitness.values[place]), rows, place) for place in range(len(finalists))], rows


def _write_front(
    search: Search, result: RunResult, front: list[Finalist], select: list[Score], sealed: list[Score], rows: list[Row]
) -> None:
    """Write the members of a front as plug-ins, then the list of them."""
    from evomem.plugins import save
    from evomem.statistics import bootstrap_mean

    members = []
    known = provenance(search, result)
    for place, (finalist, chosen, reported) in enumerate(zip(front, select, sealed, strict=True)):
        manager = search.space.decode(finalist.vector)
        interval = bootstrap_mean(by_sample(rows, place)).bounds()
        member = Member(
            place=place,
            label=finalist.label,
            budget=manager.options.budget,
            select=chosen,
            sealed=reported,
            interval=None if interval is None else (interval[0], interval[1]),
        )
        member_provenance = {
            **known,
            "winner": finalist.label,
            "front": {"place": place, "members": len(front)},
            "scores": {"select": asdict(chosen), "sealed": asdict(reported)},
        }
        save(manager, plugin_folder(search.path, place), member_provenance)
        members.append(member)
    write_atomically(search.path / "front.json", front_json(members))


def _write(search: Search, result: RunResult) -> None:
    """Write the winner, then the result, which says that the run is finished."""
    folder = search.path / "winner"
    write_vector(folder / "vector.npy", result.vector)
    _save_plugin(search, folder / "plugin", result)
    search.run_folder.journal.event("finish", winner=result.winner)
    search.run_folder.journal.sync()
    write_result(result, search.identity)


def _save_plugin(search: Search, folder: Path, result: RunResult) -> None:
    from evomem.plugins import save

    manager = search.space.decode(result.vector)
    budgets = search.plan[-1].budgets
    if budgets:
        manager = manager.with_options(budget=budgets[0])
    save(manager, folder, provenance(search, result))


_TOLD = ("model", "space", "driver", "seed", "tasks", "protocol", "budgets", "stages", "inputs")
"""Parts of the experiment that a plug-in tells as they are."""


_CURVE = 2000
"""Points of a fitness curve at most."""


def code_digest() -> str:
    """Return a hash of evomem's source files: which code it was, between two versions."""
    import evomem

    package = Path(evomem.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def provenance(search: Search, result: RunResult) -> dict[str, Any]:
    """Return where the winner comes from: model, search space, driver, seed, what was spent, scores, fitness curve.

    Of a long search the curve has every second, third, … generation: a plug-in stays small.
    """
    import evomem

    config = search.config.resolved()
    curve = [
        {"generation": g, "best": r.best, "mean": r.mean, "spread": r.spread} for g, r in sorted(search.records.items())
    ]
    step = -(-len(curve) // _CURVE)
    return {
        "evomem_version": evomem.__version__,
        "evomem_code": code_digest(),
        "libraries": {name: version(name) for name in ("torch", "transformers")},
        "experiment": search.config.name,
        **dict(search.bench.provenance),
        **{key: config[key] for key in _TOLD},
        **({"models": config["models"]} if config["models"] else {}),
        "winner": result.winner,
        "generations": result.generations,
        "spent": result.spent,
        "scores": {split: asdict(getattr(result, split)) for split in ("train", "select", "sealed")},
        **({"remarks": list(search.samples.remarks)} if search.samples.remarks else {}),
        "fitness_curve": curve[:: max(step, 1)],
    }
