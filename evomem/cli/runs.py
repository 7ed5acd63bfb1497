"""CLI: the words for what is there: ``track``, ``export``, ``import-namm``, ``list``, ``models``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evomem.cli.errors import guarded
from evomem.cli.options import CheckpointVector, Listing, Overwrite, Scorer, Sink, WandbMode


def track(
    run: Annotated[str, typer.Argument(help="Run folder: of a running, finished or interrupted run.")],
    to: Annotated[Sink, typer.Option("--to", help="Who is told.")],
    mode: Annotated[
        WandbMode | None, typer.Option(help="W&B: write files for `wandb sync`, or send. \\[default: offline]")
    ] = None,
    project: Annotated[
        str | None, typer.Option(help="W&B: the project. \\[default: WANDB_PROJECT, else evomem]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write in. \\[default: RUN/tracked]")] = None,
) -> None:
    """Tell TensorBoard, W&B or a file about a run after the fact, from its journal; the run is only read.

    [bold]Examples[/bold]

      evomem track runs/demo --to tensorboard

      evomem track runs/demo --to wandb --mode online --project memory
    """
    with guarded():
        from evomem.cli.commands import track as command

        command.track(run, to.value, mode and mode.value, project, out)


def export(
    run: Annotated[str, typer.Argument(help="Run folder, plug-in, or a manager by its name (evomem list managers).")],
    folder: Annotated[Path, typer.Argument(help="Where the plug-in goes.")],
    place: Annotated[
        int | None, typer.Option(min=0, help="Of a run with a front: its member at this place, 0 is the smallest.")
    ] = None,
    size: Annotated[
        float | None,
        typer.Option("--bytes", min=1, help="Of a run with a front: its largest member within so many bytes of cache."),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            help="The same scorer with this allocation in place of its own, e.g. lava: to use, or to start a search "
            "(docs/allocations.md)."
        ),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Of a manager by its name: slots per head (64) or a share (0.25).")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Refuse what cannot decide about this model's memory, and keep what an allocation looks at of its "
            "heads (razor, duo, headkv, probe_shares).",
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a run's winner, or a manager by its name, as a plug-in.

    A plug-in is config.json, model.safetensors, provenance.json, README.md.

    [bold]Examples[/bold]

      evomem export runs/demo my-manager

      evomem export runs/pareto_smollm2 my-manager --bytes 2e6

      evomem export runs/demo start --allocation "per_head_shares(layers=30, heads=3)"

      evomem export keydiff my-keydiff --budget 64 --allocation razor --model smollm2-135m
    """
    with guarded():
        from evomem.cli.commands import export as command

        command.export(run, folder, place, size, allocation=allocation, budget=budget, model=model, overwrite=overwrite)


def import_namm(
    file: Annotated[str, typer.Argument(help="Vector and normalisation: .npz, .safetensors, or a checkpoint (.pt).")],
    out: Annotated[Path, typer.Option(help="Where the plug-in goes.")],
    scorer: Annotated[Scorer, typer.Option(help="Network that the vector is of.")] = Scorer.bam,
    every: Annotated[int, typer.Option(min=0, help="Decide every that many tokens; 0: once, after the context.")] = 512,
    budget: Annotated[int | None, typer.Option(min=1, help="Slots per head at most. \\[default: no cap]")] = None,
    vector: Annotated[CheckpointVector, typer.Option(help="Which one of a checkpoint.")] = CheckpointVector.mean,
    overwrite: Overwrite = False,
) -> None:
    """Make a plug-in of a NAMM that was searched elsewhere, in the layout of "An Evolved Universal Transformer Memory".

    [bold]Examples[/bold]

      evomem import-namm ckpt.pt --out namm --budget 1024

      evomem import-namm namm_bam_update.npz --out namm --every 256
    """
    with guarded():
        from evomem.cli.commands import import_namm as command

        command.import_namm(file, out, scorer.value, every or None, budget, vector.value, overwrite=overwrite)


def list_(
    what: Annotated[Listing | None, typer.Argument(help="\\[default: everything]", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON: names and what they are.")] = False,
) -> None:
    """List managers, allocations, tasks, drivers, objectives, search spaces, experiments and observations.

    [bold]Examples[/bold]

      evomem list

      evomem list managers
    """
    with guarded():
        from evomem.cli.commands import listing

        listing.show(what, as_json=json)


def models(
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the models that have an alias, and whether they are there. Folders and hub ids work everywhere too.

    [bold]Example[/bold]

      evomem models
    """
    with guarded():
        from evomem.cli.commands import listing

        listing.show_models(as_json=json)
