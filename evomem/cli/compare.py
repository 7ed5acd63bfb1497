"""CLI: the words for measuring managers: ``compare``, ``transfer``, ``evaluate``."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from evomem.cli.errors import guarded
from evomem.cli.options import (
    DEFAULT_PROTOCOLS,
    Budgets,
    Check,
    DeviceOption,
    DtypeOption,
    Exact,
    Heads,
    Json,
    Mode,
    Model,
    PlanCheck,
    ProtocolOption,
    Samples,
    SplitOption,
    Splits,
    Task,
)

if TYPE_CHECKING:
    from evomem.report.conditions import Conditions


def compare(
    context: typer.Context,
    subjects: Annotated[
        list[str],
        typer.Argument(metavar="RUN_OR_PLUGIN...", help="Run, plug-in folder, hub id, or a heuristic."),
    ],
    model: Model = None,
    task: Task = None,
    against: Annotated[str | None, typer.Option(help="Heuristics, e.g. keydiff,snapkv(window=64); all; none.")] = None,
    allocations: Annotated[
        str | None,
        typer.Option(
            help="Also the first subject's scorer under other allocations, e.g. uniform,pyramid(beta=8),lava; which "
            "to take when: docs/allocations.md."
        ),
    ] = None,
    budgets: Budgets = None,
    protocol: ProtocolOption = None,
    mode: Mode = None,
    split: SplitOption = Splits.sealed,
    samples: Samples = None,
    exact: Exact = True,
    check: Check = True,
    oracle: Annotated[
        bool,
        typer.Option("--oracle", help="Also the decision that knows what will be attended to: a mark, no manager."),
    ] = False,
    price_per_megabyte: Annotated[
        float | None,
        typer.Option(
            "--price-per-megabyte",
            metavar="NATS",
            help="Nats per 10^6 bytes of mean memory: also the net value, by which rows are ordered. Without --budgets "
            "every manager that has a budget is measured at its own.",
        ),
    ] = None,
    heads: Heads = False,
    plots: Annotated[
        str | None,
        typer.Option(
            "--plots", metavar="FOLDER", help="Draw memory.png (score against bytes) and heads.png (a heat map) there."
        ),
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    plan_check: PlanCheck = True,
    json: Json = None,
) -> None:
    """Compare managers on the same samples at the same budgets, with paired bootstrap intervals and measured bytes.

    The first subject is the one that all differences are taken of. The full cache is the reference; only with
    `--against none` it is left out too. By default the field is all: every manager whose numbers no search gives, also
    lru, lfu, fifo and slot_relevance, but not kvzip, for which every context is read twice. The best of the trivial
    managers (protected_random, streaming_llm, fifo) that are in the field stands beside the best heuristic, and
    `recovered` is the share of what that trivial one loses against the full cache that a row wins back.

    [bold]Examples[/bold]

      evomem compare runs/demo

      evomem compare runs/demo --budgets 32,64,128 --against keydiff,snapkv --no-exact

      evomem compare runs/demo "adakv(keydiff)" --against none --budgets 16,32,64 --heads --plots pictures

      evomem compare runs/demo --allocations "uniform,lava,probe_shares(power=0.5)" --against none --heads

      evomem compare runs/adaptive runs/fixed --against none --price-per-megabyte 0.1 --json rows.json

      evomem compare my-plugin --model ./other-model --task file:questions.jsonl --json rows.json

      evomem compare "adakv(keydiff)" --task multikey_1:length=1000 --budgets 0.25 --protocol streaming:512

      evomem compare lru -m zoo-mosaic -t zoo_needle:length=256 --budgets 24            other memories: docs/memories.md
    """
    with guarded(_again(context, json)):
        from evomem.cli.commands import compare as command

        command.compare(
            subjects,
            against,
            _conditions(context),
            json,
            allocations=allocations,
            check=check,
            oracle=oracle,
            price_per_megabyte=price_per_megabyte,
            heads=heads,
            plots=plots,
        )


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
            help="Task for all models, or MODEL=TASK for one; may be repeated. \\[default: the plug-ins' own]",
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
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            "--protocol",
            help="compress_once, or streaming[:N]: decide every N tokens; or MODEL=PROTOCOL for one model; may be "
            f"repeated. \\[default: the plug-ins' own on such a memory, else {DEFAULT_PROTOCOLS}]",
        ),
    ] = None,
    mode: Mode = None,
    split: SplitOption = Splits.sealed,
    samples: Annotated[
        int | None, typer.Option("--samples", "-n", min=1, help="Samples per cell. \\[default: 100]")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact/--no-exact", help="Also generate text (slower).")] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Leave out tasks that a model cannot do with the full cache.")
    ] = True,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Also tokens a second, one sequence at a time.")
    ] = True,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    plan_check: PlanCheck = True,
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
    measured memory, with a paired bootstrap interval; and against the best of the trivial managers (protected_random,
    streaming_llm, fifo) in the field.

    [bold]Examples[/bold]

      evomem transfer runs/demo --models zoo-gpt2,zoo-qwen3 --tasks zoo_needle:length=512 --budgets 64,128

      evomem transfer my-plugin runs/namm -m smollm2-135m -m ./other -t smollm2-135m=multikey_1:length=500 \
          -t ./other=file:questions.jsonl --budgets 0.125 --recalibrate --json transfer.json --record

      evomem transfer runs/streams -m pair-memory,zoo-memory-matrix,zoo-qwen3 -t pair-memory=zipf:length=250 \
          -t zoo-memory-matrix=zoo_recall:length=128 -t zoo-qwen3=zoo_recall:length=512 --budgets 16 \
          --protocol streaming:1 --protocol zoo-memory-matrix=streaming:8 --protocol zoo-qwen3=compress_once
    """
    with guarded(_again(context, json)):
        from evomem.cli.commands import transfer as command

        conditions = _conditions(context)
        command.transfer(
            plugins,
            against,
            conditions,
            json,
            recalibrate=recalibrate,
            check=check,
            record=record,
            protocols=protocol or (),
            speed=speed,
        )


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
    check: Check = True,
    heads: Heads = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    plan_check: PlanCheck = True,
    json: Json = None,
) -> None:
    """Evaluate one manager: score, log-likelihood, slots and measured bytes.

    [bold]Examples[/bold]

      evomem evaluate full --task passkey:length=500 --samples 20

      evomem evaluate runs/demo --task file:questions.jsonl --budgets 64,128

      evomem evaluate "snapkv(window=16)" --task multikey_1 --budgets 128 --json -
    """
    with guarded(_again(context, json)):
        from evomem.cli.commands import compare as command

        command.evaluate(subject, _conditions(context), json, check=check, heads=heads)


def _conditions(context: typer.Context) -> Conditions:
    """Return what the options that all three commands share say about what is measured, and how."""
    from evomem.cli.commands.compare import parse_budgets
    from evomem.report.conditions import Conditions
    from evomem.tasks.base import Split

    words = context.params
    return Conditions(
        models=words.get("model") or words.get("models") or (),
        tasks=words.get("task") or words.get("tasks") or (),
        budgets=parse_budgets(words["budgets"]),
        protocol=words["protocol"] if isinstance(words["protocol"], str) else None,
        mode=words["mode"] and str(words["mode"]),
        split=Split(words["split"]),
        samples=words["samples"],
        exact=words["exact"],
        dtype=words["dtype"] and str(words["dtype"]),
        device=words["device"],
        plan_check=words["plan_check"],
    )


def _again(context: typer.Context, json: str | None) -> str | None:
    """Return the command that goes on with a comparison; None if it keeps nothing."""
    import sys

    if json is None or json == "-":
        return None
    return shlex.join(["evomem", *sys.argv[1:]]) if sys.argv[1:2] == [context.info_name] else "the same command"
