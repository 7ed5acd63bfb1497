"""CLI: the words for finding managers: ``evolve``, ``train``, ``trace``, ``allocate``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from evomem.cli.errors import guarded
from evomem.cli.options import Check, DeviceOption, DtypeOption, PlanCheck, QuestionMode, Splits

TRAIN = """Train a memory policy: `evolve` under the name that is expected of policy gradients, with the same options.

The experiment's driver says how candidates are found, by policy gradient or by evolution; all that follows (choice of
the winner, comparison with the field on sealed samples, plug-in) is the same.

[bold]Examples[/bold]

  evomem train policy_needle

  evomem train policy_needle --resume -s seed=1 --out runs/policy-1
"""


def evolve(
    context: typer.Context,
    experiment: Annotated[str, typer.Argument(help="A YAML file, or the name of one that comes with evomem.")],
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change the experiment: dotted key, YAML value."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder; begin if there is none.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. \\[default: runs/NAME]")] = None,
    device: DeviceOption = None,
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
        float | None, typer.Option(min=0.01, help="Cores that a worker asks for. \\[default: the experiment's threads]")
    ] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0.0, help="GPUs that a worker asks for. \\[default: 1 where there are GPUs]")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds after which a silent worker is replaced. \\[default: judged]")
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            help="Join a Ray cluster that asks for no token: whoever reaches it can run code there, and here "
            "(docs/distributed.md).",
        ),
    ] = False,
    track: Annotated[
        str, typer.Option(metavar="NAME[,NAME]", help="Who is told: terminal, jsonl, tensorboard, wandb[:online].")
    ] = "terminal",
    plan_check: PlanCheck = True,
) -> None:
    """Search for a memory manager, compare the winner with the field on sealed samples, and save it as a plug-in.

    A run may be stopped at any moment and goes on exactly with --resume.

    [bold]Examples[/bold]

      evomem evolve demo

      evomem evolve experiments/demo.yaml --resume

      evomem evolve demo -s seed=1 -s driver.population=32 --out runs/demo-1

      evomem evolve demo --workers auto            all cores of this machine

      evomem evolve demo --address auto --workers 64           a Ray cluster that this machine belongs to

      evomem evolve across/all                     memories of several kinds at once: docs/memories.md
    """
    words = ["evomem", context.info_name or "evolve", experiment, *[w for s in setting or [] for w in ("-s", s)]]
    words += [*(["--out", str(out)] if out is not None else []), "--resume"]
    words += ["--device", device] if device is not None else []
    words += ["--track", track] if track != "terminal" else []
    words += ["--workers", workers] if workers != "0" else []
    words += [] if plan_check else ["--no-plan-check"]
    words += ["--address", address] if address is not None else []
    asked = {"--cpus-per-worker": cpus_per_worker, "--gpus-per-worker": gpus_per_worker, "--timeout": timeout}
    words += [word for name, value in asked.items() if value is not None for word in (name, f"{value:g}")]
    words += ["--insecure"] if insecure else []
    with guarded(shlex.join(words)):
        from evomem.cli.commands import evolve as command
        from evomem.workers import WorkerOptions

        options = WorkerOptions(
            command.count_of(workers, address), address, cpus_per_worker, gpus_per_worker, timeout, insecure
        )
        command.evolve(
            experiment,
            setting or [],
            out,
            resume=resume,
            workers=options,
            track=track,
            again=shlex.join(words),
            device=device,
            plan_check=plan_check,
        )


def trace(
    model: Annotated[str, typer.Option("--model", "-m", help="Alias, folder or hub id.")],
    task: Annotated[
        str, typer.Option("--task", "-t", help="Task with options, e.g. multikey_1:length=500, file:mine.jsonl.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the traces; one that is there is gone on with.")],
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Samples of the split.")] = 128,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**63 - 1, help="Of the samples; a search draws its training contexts with its own seed."
        ),
    ] = 0,
    split: Annotated[Splits, typer.Option(help="Samples that are read.")] = Splits.train,
    mode: Annotated[
        QuestionMode, typer.Option(help="Whether the question comes after the decision or is part of what is read.")
    ] = QuestionMode.query_agnostic,
    features: Annotated[
        str | None, typer.Option(metavar="NAME[,NAME]", help="What is kept of each slot. \\[default: a policy's own]")
    ] = None,
    limit: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Disk space at most, e.g. 2GB. \\[default: what it takes]")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    plan_check: PlanCheck = True,
) -> None:
    """Record what every head sees of a task's contexts, and what question and answer then attend to (docs/traces.md).

    A policy learns from traces without calling the model. A recording may be stopped at any moment; the same command
    goes on.

    [bold]Examples[/bold]

      evomem trace --model smollm2-135m --task multikey_1:length=500 --out traces/needle

      evomem trace -m smollm2-135m -t multikey_1:length=500 -n 512 --limit 2GB --out traces/needle
    """
    import sys

    with guarded(shlex.join(["evomem", *sys.argv[1:]]) if sys.argv[1:2] == ["trace"] else "the same command"):
        from evomem.cli.commands import trace as command

        command.trace(
            model, task, out, samples=samples, seed=seed, split=split.value, mode=mode.value, features=features,
            limit=limit, dtype=dtype and dtype.value, device=device, plan_check=plan_check,
        )  # fmt: skip


def allocate(
    manager: Annotated[
        str,
        typer.Argument(
            metavar="MANAGER", help="Heuristic, plug-in, run, hub id, or space:NAME: what a search space starts from."
        ),
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="Alias, folder or hub id.")],
    task: Annotated[
        str, typer.Option("--task", "-t", help="Task with options, e.g. multikey_1:length=500, file:mine.jsonl.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the plug-in.")],
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Contexts that are measured.")] = 48,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the contexts.")] = 0,
    split: Annotated[Splits, typer.Option(help="Samples that are measured.")] = Splits.train,
    mode: Annotated[
        QuestionMode, typer.Option(help="Whether the question comes after the decision or is part of what is read.")
    ] = QuestionMode.query_agnostic,
    points: Annotated[int, typer.Option(min=1, max=512, help="Pieces of a curve, dense where budgets are small.")] = 64,
    budget: Annotated[
        str | None, typer.Option(help="Slots per head (64) or share (0.25) that the plug-in has. \\[default: its own]")
    ] = None,
    shares: Annotated[
        bool, typer.Option("--shares", help="Write learned shares per head that begin at the solution, for a search.")
    ] = False,
    traces: Annotated[
        list[str] | None, typer.Option(help="Folder of traces, for managers that score by features; repeatable.")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    check: Check = True,
    plan_check: PlanCheck = True,
) -> None:
    """Solve for how much memory every head gets under a manager's ranking, and write the manager with it (LU-KV).

    What a slot more is worth to every head is measured on contexts of a task: the attention that question and answer
    pay. The plug-in serves any budget. With --shares it is a start for a search: space.start={plugin: FOLDER}.
    docs/allocations.md says what else there is, and what it is worth.

    [bold]Examples[/bold]

      evomem allocate keydiff -m smollm2-135m -t multikey_1:length=500 --out keydiff-lukv

      evomem compare keydiff-lukv --against keydiff --budgets 32,64

      evomem allocate keydiff -m smollm2-135m -t multikey_1:length=500 --budget 64 --shares --out start
    """
    import sys

    with guarded(shlex.join(["evomem", *sys.argv[1:]]) if sys.argv[1:2] == ["allocate"] else "the same command"):
        from evomem.cli.commands import allocate as command

        command.allocate(
            manager, model, task, out, samples=samples, seed=seed, split=split.value, mode=mode.value, points=points,
            budget=budget, shares=shares, traces=traces or [], dtype=dtype and dtype.value, device=device, check=check,
            plan_check=plan_check,
        )  # fmt: skip
