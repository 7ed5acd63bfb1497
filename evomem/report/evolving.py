"""Report: a search as a whole, as `evomem.evolve`: search, compare the winner with the field, report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from evomem import plugins
from evomem.errors import ConfigError, RunError
from evomem.evaluation.compare import NamedManager, Progress, Scenario, compare, field_of
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.evaluation.rows import Budget, Row
from evomem.evaluation.store import PrefillStore
from evomem.evaluation.streams import evaluator_of
from evomem.files.atomic import write_atomically
from evomem.managers import names
from evomem.models import LoadedModel
from evomem.report.diagnostics import diagnostics_plot
from evomem.report.packages import require_for_search
from evomem.report.pictures import draw_comparison
from evomem.report.plots import fitness_plot, front_plot
from evomem.report.sentences import sentences
from evomem.report.tables import keep_rows, markdown, partial_file, read_rows
from evomem.runs import Bench, ExperimentConfig, Run, RunResult, load_experiment, model_bench, open_run, search
from evomem.runs.bench import load_model
from evomem.runs.experiment_parts import TaskConfig
from evomem.runs.front import Member, read_front
from evomem.runs.inputs import require_inputs
from evomem.runs.pools import limited_threads
from evomem.tasks.base import Split
from evomem.tracking.base import Tracker
from evomem.workers import WorkerOptions

logger = logging.getLogger("evomem")

_COMPARED = 3
"""Sizes of the front at which the field is measured."""


def evolve(
    experiment: str | Path | ExperimentConfig,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    workers: int | str | WorkerOptions | None = 0,
    device: str | None = None,
    trackers: Tracker | Sequence[Tracker] = (),
    plan_check: bool = True,
    searched: Callable[[Run, RunResult], None] | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Run:
    """Search (or go on), compare the winner with the field, and leave everything that a run folder holds.

    ``evomem evolve`` is this function and what it prints: both leave the same files. ::

        run = evomem.evolve("demo", out="runs/short", generations=5, **{"driver.population": 16})
        manager = run.winner

    Parameters
    ----------
    experiment : a YAML file, the name of one that comes with evomem, or a configuration that is loaded already.
    out : folder of the run; ``runs/NAME`` if None.
    resume : go on with the run in the folder; begin if there is none.
    workers : processes that evaluate, through Ray; 0: this one; ``auto`` or None: as many as there is room for. The
        result is the same to the bit.
    device : where the models run, in place of what the experiment says.
    trackers : who is told (`evomem.tracking`).
    plan_check : refuse a plan that needs more memory, disk or time than there is.
    searched : called once when the search has ended, before the comparison begins.
    progress : called with (samples done, samples in all) during the comparison.
    **changes : settings of the experiment by dotted key, as ``-s`` on the command line.

    Raises
    ------
    RunError : the folder holds a run and ``resume`` is off, or another run; and what `evomem.runs.search` raises.
    ConfigError : the experiment, a change, or ``workers`` is not valid; ``against`` names no manager.
    MissingPackagesError : names everything that search and report need and that is not installed.
    """
    options = WorkerOptions.of(workers)
    config = _configured(experiment, changes, device)
    folder = Path(out) if out is not None else Path("runs") / config.name
    if (folder / "config.yaml").exists() and not resume:
        raise RunError(f"{folder}: holds a run already. Go on with it: resume=True; or choose another folder: out=...")
    require_for_search(config, options)
    if not (folder / "comparison.json").exists():
        field_of(config.against or None)  # a name that is wrong is said before the search, not after it
    benches: dict[str, Bench] = {}

    def bench(config: ExperimentConfig) -> Bench:
        benches["bench"] = model_bench(config)
        return benches["bench"]

    result = search(config, folder, bench, resume=resume, tracker=trackers, workers=options, plan_check=plan_check)
    run = open_run(folder)
    if searched is not None:
        searched(run, result)
    front = read_front(folder)
    with limited_threads(config.threads):  # like the search, so that no digit depends on the machine
        rows = _comparison(run, benches.get("bench"), front, progress)
    _write_report(run, result, rows)
    if front:
        _draw_front(run, front, rows)
    return run


def _configured(
    experiment: str | Path | ExperimentConfig, changes: Mapping[str, Any], device: str | None
) -> ExperimentConfig:
    if not isinstance(experiment, ExperimentConfig):
        settings = [f"{key}={_yaml(value)}" for key, value in changes.items()]
        return load_experiment(experiment, settings, device=device)
    if changes:
        raise ConfigError(f"{', '.join(changes)}: the experiment is loaded already; give changes to load_experiment")
    return experiment if device is None else experiment.on(device).placed()


def _yaml(value: Any) -> str:
    """Return a plain value as YAML on one line."""
    text: str = yaml.safe_dump([value], default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.strip()[1:-1]


def run_label(name: str) -> str:
    """Return the name of a run's winner in tables; no manager of the field has it."""
    return f"{name} (winner)" if name in names() else name


def scenarios_of(loaded: LoadedModel, tasks: Sequence[TaskConfig], protocol: EvaluationProtocol) -> list[Scenario]:
    """Return a scenario per task that is for the model; contexts are read once per sample and not kept."""
    from evomem import tasks as registry

    evaluator = evaluator_of(loaded, protocol, store=PrefillStore())
    return [
        Scenario(loaded.name, t.title, evaluator, registry.build(t.spec, loaded.tokenizer, t.length, **t.options))
        for t in tasks
        if t.model in (None, loaded.name)
    ]


def compared_budgets(members: Sequence[Member]) -> list[Budget]:
    """Return a few of the members' budgets, the smallest and the winner's among them; none if they have no own."""
    budgets = list(dict.fromkeys(member.budget for member in members if member.budget is not None))
    count = min(_COMPARED, len(budgets))
    places = [round(step * (len(budgets) - 1) / max(count - 1, 1)) for step in range(count)]
    return [budgets[place] for place in places] if count > 1 else list(budgets)


def _comparison(run: Run, bench: Bench | None, front: Sequence[Member], progress: Progress | None) -> list[Row]:
    """Return the winner's comparison with the field on the sealed split; from the folder if it is there."""
    path = run.folder / "comparison.json"
    if path.exists():
        return read_rows(path)
    require_inputs(run)
    config, stage = run.config, run.config.plan()[-1]
    # Reports are in full precision, if the search was told another type; but a front was measured in its search's own
    # type, in which the bytes are others, and the field stands beside it. The checkpoint's type is the full one there.
    scenarios = []
    for model in config.all_models:
        as_searched = bool(front) or model.dtype in (None, "auto") or model.quantization is not None
        dtype = model.dtype if as_searched else "float32"
        loaded = None
        if bench is not None:
            evaluator: Any = bench.benches.get(model.name, bench).evaluator
            evaluator.store.close()
            loaded = evaluator.loaded if model.dtype == dtype else None
        scenarios += scenarios_of(loaded or load_model(model, dtype), stage.tasks, config.protocol_on(model.name))
    require_inputs(run)  # again: the files have been read since
    if (price := stage.fitness.price_per_megabyte) and stage.fitness.objective != "loglik":
        logger.warning(
            "comparison.md: no net is shown, because the search's price of memory (%g) is in units of the objective "
            "%s, and net is of log-likelihoods",
            price,
            stage.fitness.objective,
        )
        price = 0.0
    budgets: Sequence[Budget] = stage.budgets or compared_budgets(front) or (run.winner.options.budget,)
    comparison = compare(
        # At the front's smaller sizes the winner's scorer stands beside their own members.
        [NamedManager(f"{config.name} (winner)" if front else run_label(config.name), run.winner)],
        scenarios,
        samples=config.sealed.contexts,
        budgets=budgets,
        against=config.against or None,
        split=Split.SEALED,
        exact=config.sealed.exact,
        price_per_megabyte=price or None,
        keep=partial_file(str(path)),
        progress=progress,
    )
    keep_rows(comparison.rows, path)
    return comparison.rows


def _write_report(run: Run, result: RunResult, rows: Sequence[Row]) -> None:
    """Write the table, the pictures, and the plug-in with its card; files that are there already are made again."""
    name = run.config.name
    write_atomically(run.folder / "comparison.md", markdown(rows, name).encode())
    fitness_plot(run.folder / "plots" / "fitness.png", run.generations(), result, f"{name}: fitness")
    pictures = {"fitness.png": run.folder / "plots" / "fitness.png"}
    drawn = run.folder / "plots" / "diagnostics.png"
    if diagnostics_plot(drawn, run.generations(), f"{name}: diagnostics"):
        pictures[drawn.name] = drawn
    for path in draw_comparison(run.folder / "plots", rows):
        pictures[path.name.replace("memory", "comparison")] = path
    if plugins.is_plugin(run.plugin):
        known = dict(plugins.read(run.plugin).provenance)
    else:
        raise RunError(f"{run.plugin}: the winner's plug-in is missing; delete result.json and resume the run")
    # What the field's heads hold is in the run's rows and in the picture; a plug-in stays a few kilobytes.
    comparison = [
        (row if row.role == "subject" else replace(row, head_slots=None, head_bytes=None)).to_json() for row in rows
    ]
    provenance = {**known, "comparison": comparison, "sentences": sentences(rows)}
    if provenance != known:
        shown = {name: path.read_bytes() for name, path in list(pictures.items())[: plugins.PICTURE_COUNT]}
        plugins.save(run.winner, run.plugin, provenance, pictures=shown)


def _draw_front(run: Run, members: Sequence[Member], rows: Sequence[Row]) -> None:
    """Write ``plots/front.png``; the field is beside it where there is one task."""
    one = len({(row.model, row.task) for row in rows}) == 1
    title = f"{run.config.name}: front on {members[0].sealed.contexts} sealed contexts"
    front_plot(run.folder / "plots" / "front.png", members, rows if one else [], title)
