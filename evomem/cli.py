"""Run: the command line. Only the shape of the commands is here, so that ``--help`` is there at once."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

import evomem
from evomem.errors import EvomemError
from evomem.options import (
    Budgets,
    Check,
    CheckpointVector,
    Dtype,
    DtypeOption,
    Exact,
    Json,
    Listing,
    Mode,
    Model,
    ProtocolOption,
    Samples,
    Scorer,
    Sink,
    SplitOption,
    Splits,
    Task,
    WandbMode,
)

app = typer.Typer(
    name="evomem",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its warnings about forks would fill the terminal
    app()


@contextmanager
def guarded(resume: str | None = None) -> Iterator[None]:
    """Show errors that are meant for users as one line, exit code 2; an interrupt says how to go on, exit code 130."""
    try:
        yield
    except EvomemError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("\ninterrupted" + (f"; resume with: {resume}" if resume else ""), err=True)
        raise typer.Exit(130) from None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"evomem {evomem.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Evolve memory managers for frozen language models, compare them with the field, and take them away as plug-ins.

    [bold]First steps[/bold]

      evomem evolve demo                    search, compare, and save a plug-in in runs/demo

      evomem compare runs/demo --budgets 32,64,128

      evomem list managers
    """


@app.command()
def evolve(
    experiment: Annotated[str, typer.Argument(help="A YAML file, or the name of one that comes with evomem.")],
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change the experiment: dotted key, YAML value."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder; begin if there is none.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. [default: runs/NAME]")] = None,
    workers: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Processes that evaluate, through Ray; 0: this one; auto: as many as the cores allow. The result is "
            "the same to the bit.",
        ),
    ] = "0",
    address: Annotated[
        str | None, typer.Option(metavar="auto|HOST:PORT", help="Evaluate on a running Ray cluster.")
    ] = None,
    cpus_per_worker: Annotated[
        float | None, typer.Option(min=0.01, help="Cores that a worker asks for. [default: the experiment's threads]")
    ] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0.0, help="GPUs that a worker asks for. [default: 1 where there are GPUs]")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds after which a silent worker is replaced. [default: judged]")
    ] = None,
    track: Annotated[
        str, typer.Option(metavar="NAME[,NAME]", help="Who is told: terminal, jsonl, tensorboard, wandb[:online].")
    ] = "terminal",
) -> None:
    """Search for a memory manager, compare the winner with the field on sealed samples, and save it as a plug-in.

    A run may be stopped at any moment and goes on exactly with --resume.

    [bold]Examples[/bold]

      evomem evolve demo

      evomem evolve experiments/demo.yaml --resume

      evomem evolve demo -s seed=1 -s driver.population=32 --out runs/demo-1

      evomem evolve demo --workers auto            all cores of this machine

      evomem evolve demo --address auto --workers 64           a Ray cluster that this machine belongs to
    """
    words = ["evomem", "evolve", experiment, *[w for s in setting or [] for w in ("-s", s)]]
    words += [*(["--out", str(out)] if out is not None else []), "--resume"]
    words += ["--track", track] if track != "terminal" else []
    words += ["--workers", workers] if workers != "0" else []
    words += ["--address", address] if address is not None else []
    asked = {"--cpus-per-worker": cpus_per_worker, "--gpus-per-worker": gpus_per_worker, "--timeout": timeout}
    words += [word for name, value in asked.items() if value is not None for word in (name, f"{value:g}")]
    with guarded(shlex.join(words)):
        from evomem.commands import evolve as command
        from evomem.workers import WorkerOptions

        options = WorkerOptions(command.count_of(workers, address), address, cpus_per_worker, gpus_per_worker, timeout)
        command.evolve(
            experiment, setting or [], out, resume=resume, workers=options, track=track, again=shlex.join(words)
        )


@app.command()
def compare(
    context: typer.Context,
    subjects: Annotated[
        list[str],
        typer.Argument(metavar="RUN_OR_PLUGIN...", help="Run, plug-in folder, hub id, or a heuristic."),
    ],
    model: Model = None,
    task: Task = None,
    against: Annotated[str | None, typer.Option(help="Heuristics, e.g. keydiff,snapkv(window=64); all; none.")] = None,
    budgets: Budgets = None,
    protocol: ProtocolOption = None,
    mode: Mode = None,
    split: SplitOption = Splits.sealed,
    samples: Samples = None,
    exact: Exact = True,
    check: Check = True,
    dtype: DtypeOption = Dtype.float32,
    json: Json = None,
) -> None:
    """Compare managers on the same samples at the same budgets, with paired bootstrap intervals and measured bytes.

    The first subject is the one that all differences are taken of. The full cache is always there as the reference.

    [bold]Examples[/bold]

      evomem compare runs/demo

      evomem compare runs/demo --budgets 32,64,128 --against keydiff,snapkv --no-exact

      evomem compare my-plugin --model ./other-model --task file:questions.jsonl --json rows.json

      evomem compare "adakv(keydiff)" --task multikey_1:length=1000 --budgets 0.25 --protocol streaming:512
    """
    with guarded(_again(context, json)):
        from evomem.commands import compare as command

        wishes = command.Wishes(
            model or [], task or [], budgets, protocol, mode and mode.value, split.value, samples, exact, dtype.value
        )
        command.compare(subjects, against, wishes, json, check=check)


@app.command()
def transfer(
    context: typer.Context,
    plugins: Annotated[
        list[str], typer.Argument(metavar="RUN_OR_PLUGIN...", help="Run, plug-in folder, hub id, or a heuristic.")
    ],
    models: Annotated[
        list[str], typer.Option("--models", "--model", "-m", help="Test models: a,b,c; may be repeated.")
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            "--task",
            "-t",
            help="Task for all models, or MODEL=TASK for one; may be repeated. [default: the plug-ins' own]",
        ),
    ] = None,
    against: Annotated[str | None, typer.Option(help="Heuristics, e.g. keydiff,snapkv(window=64); all; none.")] = None,
    budgets: Budgets = None,
    recalibrate: Annotated[
        bool,
        typer.Option(
            "--recalibrate", help="Also with a plug-in's statistics collected anew on each model (no search)."
        ),
    ] = False,
    protocol: ProtocolOption = None,
    mode: Mode = None,
    split: SplitOption = Splits.sealed,
    samples: Annotated[
        int | None, typer.Option("--samples", "-n", min=1, help="Samples per cell. [default: 100]")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact/--no-exact", help="Also generate text (slower).")] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Leave out tasks that a model cannot do with the full cache.")
    ] = True,
    dtype: DtypeOption = Dtype.float32,
    record: Annotated[
        bool,
        typer.Option(
            "--record", help="Write the rows into the plug-ins too: provenance.json, model card, assets/transfer.png."
        ),
    ] = False,
    json: Json = None,
) -> None:
    r"""Move managers to models that they were not found on: a matrix of found on x tested on.

    Each cell is set against the full cache and against the heuristic that does best on that very model with no more
    measured memory, with a paired bootstrap interval.

    [bold]Examples[/bold]

      evomem transfer runs/demo --models zoo-gpt2,zoo-qwen3 --tasks zoo_needle:length=512 --budgets 64,128

      evomem transfer my-plugin runs/namm -m smollm2-135m -m ./other -t smollm2-135m=multikey_1:length=500 \
          -t ./other=file:questions.jsonl --budgets 0.125 --recalibrate --json transfer.json --record
    """
    with guarded(_again(context, json)):
        from evomem.commands import compare as words
        from evomem.commands import transfer as command

        wishes = words.Wishes(
            models, tasks or [], budgets, protocol, mode and mode.value, split.value, samples, exact, dtype.value
        )
        command.transfer(plugins, against, wishes, json, recalibrate=recalibrate, check=check, record=record)


@app.command()
def evaluate(
    context: typer.Context,
    subject: Annotated[
        str, typer.Argument(metavar="MANAGER_OR_PLUGIN", help="Run, plug-in folder, hub id, or a heuristic.")
    ],
    model: Model = None,
    task: Task = None,
    budgets: Budgets = None,
    protocol: ProtocolOption = None,
    mode: Mode = None,
    split: SplitOption = Splits.sealed,
    samples: Samples = None,
    exact: Exact = True,
    dtype: DtypeOption = Dtype.float32,
    json: Json = None,
) -> None:
    """Evaluate one manager: score, log-likelihood, slots and measured bytes.

    [bold]Examples[/bold]

      evomem evaluate full --task passkey:length=500 --samples 20

      evomem evaluate runs/demo --task file:questions.jsonl --budgets 64,128

      evomem evaluate "snapkv(window=16)" --task multikey_1 --budgets 128 --json -
    """
    with guarded(_again(context, json)):
        from evomem.commands import compare as command

        wishes = command.Wishes(
            model or [], task or [], budgets, protocol, mode and mode.value, split.value, samples, exact, dtype.value
        )
        command.evaluate(subject, wishes, json)


def _again(context: typer.Context, json: str | None) -> str | None:
    """Return the command that goes on with a comparison; None if it keeps nothing."""
    import sys

    if json is None or json == "-":
        return None
    return shlex.join(["evomem", *sys.argv[1:]]) if sys.argv[1:2] == [context.info_name] else "the same command"


@app.command()
def track(
    run: Annotated[str, typer.Argument(help="Run folder: of a running, finished or interrupted run.")],
    to: Annotated[Sink, typer.Option("--to", help="Who is told.")],
    mode: Annotated[
        WandbMode | None, typer.Option(help="W&B: write files for `wandb sync`, or send. [default: offline]")
    ] = None,
    project: Annotated[str | None, typer.Option(help="W&B: the project. [default: WANDB_PROJECT, else evomem]")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write in. [default: RUN/tracked]")] = None,
) -> None:
    """Tell TensorBoard, W&B or a file about a run after the fact, from its journal; the run is only read.

    [bold]Examples[/bold]

      evomem track runs/demo --to tensorboard

      evomem track runs/demo --to wandb --mode online --project memory
    """
    with guarded():
        from evomem.commands import track as command

        command.track(run, to.value, mode and mode.value, project, out)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Run folder, or a plug-in.")],
    folder: Annotated[Path, typer.Argument(help="Where the plug-in goes; a plug-in that is there is replaced.")],
    place: Annotated[
        int | None, typer.Option(min=0, help="Of a run with a front: its member at this place, 0 is the smallest.")
    ] = None,
    size: Annotated[
        float | None,
        typer.Option("--bytes", min=1, help="Of a run with a front: its largest member within so many bytes of cache."),
    ] = None,
) -> None:
    """Copy a run's winner as a plug-in: config.json, model.safetensors, provenance.json, README.md.

    [bold]Examples[/bold]

      evomem export runs/demo my-manager

      evomem export runs/pareto_smollm2 my-manager --bytes 2e6
    """
    with guarded():
        from evomem.commands import evolve as command

        command.export(run, folder, place, size)


@app.command("import-namm")
def import_namm(
    file: Annotated[str, typer.Argument(help="Vector and normalisation: .npz, .safetensors, or a checkpoint (.pt).")],
    out: Annotated[Path, typer.Option(help="Where the plug-in goes; a plug-in that is there is replaced.")],
    scorer: Annotated[Scorer, typer.Option(help="Network that the vector is of.")] = Scorer.bam,
    every: Annotated[int, typer.Option(min=0, help="Decide every that many tokens; 0: once, after the context.")] = 512,
    budget: Annotated[int | None, typer.Option(min=1, help="Slots per head at most. [default: no cap]")] = None,
    vector: Annotated[CheckpointVector, typer.Option(help="Which one of a checkpoint.")] = CheckpointVector.mean,
) -> None:
    """Make a plug-in of a NAMM that was searched elsewhere, in the layout of "An Evolved Universal Transformer Memory".

    [bold]Examples[/bold]

      evomem import-namm ckpt.pt --out namm --budget 1024

      evomem import-namm namm_bam_update.npz --out namm --every 256
    """
    with guarded():
        from evomem.commands import import_namm as command

        command.import_namm(file, out, scorer.value, every or None, budget, vector.value)


@app.command("list")
def list_(
    what: Annotated[Listing | None, typer.Argument(help="[default: everything]", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON: names and what they are.")] = False,
) -> None:
    """List managers, tasks, drivers, search spaces, experiments and observations.

    [bold]Examples[/bold]

      evomem list

      evomem list managers
    """
    with guarded():
        from evomem.commands import listing

        listing.show(what.value if what is not None else None, as_json=json)


@app.command()
def models(
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the models that have an alias, and whether they are there. Folders and hub ids work everywhere too.

    [bold]Example[/bold]

      evomem models
    """
    with guarded():
        from evomem.commands import listing

        listing.show_models(as_json=json)
