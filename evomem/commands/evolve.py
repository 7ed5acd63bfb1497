"""Run: the commands ``evolve`` and ``export``: search, compare the winner with the field, report, hand over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from evomem import plugins
from evomem.commands.compare import ProgressBar, keep_rows, load, partial_file, places_of, run_label, show
from evomem.commands.listing import wide_console
from evomem.errors import ConfigError, EvomemError, RunError
from evomem.evaluation.compare import NamedManager, compare
from evomem.evaluation.rows import Budget, Row
from evomem.runs import Bench, ExperimentConfig, Run, RunResult, load_experiment, model_bench, open_run, search
from evomem.runs.files import write_atomically
from evomem.runs.plots import fitness_plot, memory_plot
from evomem.runs.report import markdown, read_rows, sentences
from evomem.tasks.base import Split
from evomem.tracking import build_trackers


def evolve(
    experiment: str,
    settings: Sequence[str],
    out: Path | None,
    *,
    resume: bool,
    workers: int,
    again: str,
    track: str = "terminal",
) -> None:
    """Search (or go on), compare, and write everything that a run folder holds.

    Parameters
    ----------
    again : the command that goes on with this run, for messages.
    track : names of the trackers (`evomem.tracking.build_trackers`).
    """
    if workers:
        raise ConfigError(f"--workers {workers}: evaluations run in this process only; leave it at 0")
    config = load_experiment(experiment, settings)
    folder = out if out is not None else Path("runs") / config.name
    if (folder / "config.yaml").exists() and not resume:
        raise RunError(f"{folder}: holds a run already. Go on with it: {again}\nor choose another folder with --out")
    trackers = build_trackers(track, folder)
    console = wide_console()
    finished = (folder / "result.json").exists()
    held: dict[str, Bench] = {}

    def bench(config: ExperimentConfig) -> Bench:
        held["bench"] = model_bench(config)
        return held["bench"]

    result = search(config, folder, bench, resume=resume, tracker=trackers)
    if finished:
        console.print(Text(f"{folder}: this run is finished", style="bold"))
        for line in result.lines():
            console.print(Text(line))
    run = open_run(folder)
    rows = _comparison(run, held.get("bench"))
    _write_report(run, result, rows)
    show(rows, console)
    _print_end(run, console)


def _comparison(run: Run, bench: Bench | None) -> list[Row]:
    """Return the winner's comparison with the field on the sealed split; from the folder if it is there."""
    path = run.folder / "comparison.json"
    if path.exists():
        return read_rows(path)
    config, stage = run.config, run.config.plan()[-1]
    loaded = None
    if bench is not None:
        evaluator: Any = bench.evaluator
        evaluator.store.close()
        # Reports are in full precision, whatever the search used.
        loaded = evaluator.loaded if config.model.dtype == "float32" else None
    places = places_of(loaded or load(config.model.name, "float32"), stage.tasks, config.protocol)
    budgets: Sequence[Budget] = stage.budgets or (run.winner.options.budget,)
    with ProgressBar("comparing") as bar:
        comparison = compare(
            [NamedManager(run_label(config.name), run.winner)],
            places,
            samples=config.sealed.contexts,
            budgets=budgets,
            against=config.against or None,
            split=Split.SEALED,
            exact=config.sealed.exact,
            keep=partial_file(str(path)),
            progress=bar.report,
        )
    keep_rows(comparison.rows, path)
    return comparison.rows


def _write_report(run: Run, result: RunResult, rows: Sequence[Row]) -> None:
    """Write the table, the pictures, and the plug-in with its card; files that are there already are made again."""
    name = run.config.name
    write_atomically(run.folder / "comparison.md", markdown(rows, name).encode())
    fitness_plot(run.folder / "plots" / "fitness.png", run.generations(), result, f"{name}: fitness")
    places = list(dict.fromkeys((row.model, row.task) for row in rows))
    for number, (model, task) in enumerate(places):
        here = [row for row in rows if (row.model, row.task) == (model, task)]
        title = f"{task} on {model}, {here[0].samples} {here[0].split} samples"
        file = "memory.png" if len(places) == 1 else f"memory-{number + 1}.png"
        memory_plot(run.folder / "plots" / file, here, title)
    if plugins.is_plugin(run.plugin):
        known = dict(plugins.read(run.plugin).provenance)
    else:
        raise RunError(f"{run.plugin}: the winner's plug-in is missing; delete result.json and resume the run")
    told = {**known, "comparison": [row.to_json() for row in rows], "sentences": sentences(rows)}
    if told != known:
        plugins.save(run.winner, run.plugin, told)


def _print_end(run: Run, console: Console) -> None:
    """Say where things are, and three things that a user may want to do next."""
    folder, plugin = run.folder, run.plugin
    config = run.config
    console.print(Text(f"report: {folder}/comparison.md, {folder}/plots; plug-in: {plugin}", style="dim"))
    console.print(Text("next:"))
    console.print(Text(f"  evomem export {folder} {config.name}-manager"))
    console.print(Text(f"  evomem compare {folder} --budgets 32,64,128 --task passkey:length=500"))
    console.print(Text(f"  python: {snippet(plugin)}"))


def snippet(folder: Path) -> str:
    """Return the line of Python that uses a plug-in."""
    return (
        f'from evomem.plugins import load; manager = load("{folder}")\n'
        "          with manager.attach(model) as cache: model.generate(**inputs, past_key_values=cache)"
    )


def export(source: str, folder: Path) -> None:
    """Write a run's winner, or another plug-in, as a plug-in into ``folder``."""
    path = Path(source).expanduser()
    plugin = open_run(path).plugin if (path / "config.yaml").is_file() else path
    if not path.exists():
        raise EvomemError(f"{source}: no such run or plug-in")
    found = plugins.read(plugin)
    plugins.save(found.manager, folder, found.provenance)
    console = wide_console()
    console.print(Text(f"{folder}: {', '.join(plugins.FILES)}"))
    console.print(Text(f"  python: {snippet(folder)}"))
