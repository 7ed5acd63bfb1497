"""CLI: the command ``evolve``: search, compare the winner with the field, report, hand over."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.text import Text

from evomem.cli.commands.compare import show
from evomem.cli.commands.front import front_notes, front_table
from evomem.cli.commands.progress import ProgressBar
from evomem.errors import ConfigError, RunError
from evomem.files.reading import whole_number
from evomem.report import evolving
from evomem.report.packages import require_for_search
from evomem.report.tables import read_rows
from evomem.runs import Run, RunResult, load_experiment
from evomem.runs.front import Member, read_front
from evomem.terminal import wide_console
from evomem.tracking import build_trackers
from evomem.workers import WorkerOptions


def evolve(
    experiment: str,
    settings: Sequence[str],
    out: Path | None,
    *,
    resume: bool,
    workers: WorkerOptions,
    again: str,
    track: str = "terminal",
    device: str | None = None,
    plan_check: bool = True,
) -> None:
    """Search (or go on), compare, and write everything that a run folder holds.

    Parameters
    ----------
    again : the command that goes on with this run, for messages.
    track : names of the trackers (`evomem.tracking.build_trackers`).
    device : where the models run, in place of what the experiment says.
    plan_check : see `evomem.evaluation.needs`.
    """
    config = load_experiment(experiment, settings, device=device)
    folder = out if out is not None else Path("runs") / config.name
    if (folder / "config.yaml").exists() and not resume:
        raise RunError(f"{folder}: holds a run already. Go on with it: {again}\nor choose another folder with --out")
    require_for_search(config, workers, track)
    trackers = build_trackers(track, folder)
    console = wide_console()
    finished = (folder / "result.json").exists()
    bar = ProgressBar("comparing")

    def searched(run: Run, result: RunResult) -> None:
        if finished:
            console.print(Text(f"{folder}: this run is finished", style="bold"))
            for line in result.lines():
                console.print(Text(line))
        front = read_front(folder)
        if front:
            console.print(front_table(front))
            for note in front_notes(front):
                console.print(Text(note, style="dim"))
        if not (folder / "comparison.json").exists():
            line = f"comparing with the field on {config.sealed.contexts} sealed samples a task"
            wide_console(stderr=True).print(Text(line))
            stack.enter_context(bar)

    with ExitStack() as stack:
        run = evolving.evolve(
            config,
            out=folder,
            resume=resume,
            workers=workers,
            trackers=trackers,
            plan_check=plan_check,
            searched=searched,
            progress=bar.report,
        )
    show(read_rows(folder / "comparison.json"), console)
    _print_end(run, console, read_front(folder))


def count_of(workers: str, address: str | None) -> int | None:
    """Return the number that ``--workers`` names; None: as many as there is room for.

    Raises
    ------
    ConfigError : it is neither a number nor ``auto``.
    """
    if workers == "auto" or (workers == "0" and address is not None):
        return None
    count = whole_number(workers)
    if count is None:
        raise ConfigError(f"--workers {workers}: give a whole number, 0 for this process, or auto for all cores")
    return count


def _print_end(run: Run, console: Console, front: Sequence[Member]) -> None:
    """Say where things are, and three things that a user may want to do next."""
    folder, plugin = run.folder, run.plugin
    config = run.config
    console.print(Text(f"report: {folder}/comparison.md, {folder}/plots; plug-in: {plugin}", style="dim"))
    console.print(Text("next:"))
    console.print(Text(f"  evomem export {folder} {config.name}-manager"))
    if front:
        place = len(front) // 2
        console.print(Text(f"  evomem export {folder} {config.name}-{place} --place {place}   (or --bytes 2e6)"))
    console.print(Text(f"  {_other_budgets(run)}"))
    if not _reads_streams(run):  # their memory has no text to go on with
        console.print(Text(f"  python: {snippet(plugin)}"))


def _reads_streams(run: Run) -> bool:
    """Whether all tasks of the last stage are streams of requests."""
    from evomem.spec import name_of
    from evomem.tasks.base import tasks
    from evomem.tasks.streams.base import StreamTask

    return all(issubclass(tasks.get(name_of(task.spec)), StreamTask) for task in run.config.plan()[-1].tasks)


def _other_budgets(run: Run) -> str:
    """Return the command that compares the winner on its own tasks with half and twice the memory."""
    searched = run.config.plan()[-1].budgets or (run.winner.options.budget,)
    sizes = [budget for budget in searched if budget is not None]
    if not sizes:
        return f"evomem compare {run.folder}"
    half = max(1, min(sizes) // 2) if isinstance(min(sizes), int) else min(sizes) / 2
    double = 2 * max(sizes) if isinstance(max(sizes), int) else min(1.0, 2 * max(sizes))
    budgets = dict.fromkeys([half, *sorted(sizes), double])
    return f"evomem compare {run.folder} --budgets {','.join(map(str, budgets))}"


def snippet(folder: Path) -> str:
    """Return the line of Python that uses a plug-in."""
    from evomem.memory.kv.versions import argument  # needs transformers: not for every command

    return (
        f'import evomem; manager = evomem.load("{folder}")\n'
        f"          with manager.attach(model) as cache: model.generate(**inputs, {argument()})"
    )
