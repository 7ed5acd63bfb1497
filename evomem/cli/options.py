"""CLI: the options that commands share, and the words that they take."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class QuestionMode(StrEnum):
    """Whether a manager decides before or after it has seen the question."""

    query_agnostic = "query_agnostic"
    query_aware = "query_aware"


class Splits(StrEnum):
    """Splits of a task."""

    train = "train"
    select = "select"
    sealed = "sealed"


class Dtype(StrEnum):
    """Types of a model's weights; ``auto``: the checkpoint's own."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Listing(StrEnum):
    """What can be listed, in the order in which everything is."""

    managers = "managers"
    allocations = "allocations"
    tasks = "tasks"
    drivers = "drivers"
    objectives = "objectives"
    spaces = "spaces"
    experiments = "experiments"
    observations = "observations"


class Scorer(StrEnum):
    """Networks of a NAMM."""

    bam = "bam"
    mlp = "mlp"
    linear = "linear"


class CheckpointVector(StrEnum):
    """Vectors that a search's checkpoint holds."""

    mean = "mean"
    best = "best"


class Sink(StrEnum):
    """Whom a run can be told to after the fact."""

    wandb = "wandb"
    tensorboard = "tensorboard"
    jsonl = "jsonl"


class WandbMode(StrEnum):
    """Whether W&B is told over the network."""

    offline = "offline"
    online = "online"


Model = Annotated[
    list[str] | None,
    typer.Option("--model", "-m", help="Alias, folder or hub id; may be repeated. \\[default: the subject's own]"),
]
Task = Annotated[
    list[str] | None,
    typer.Option(
        "--task", "-t",
        help="Task with options, e.g. passkey:length=1000, file:mine.jsonl; repeatable. \\[default: the subject's]",
    ),
]  # fmt: skip
Budgets = Annotated[
    str | None,
    typer.Option(help="Slots per head (64,128) or shares of the tokens read (0.25). \\[default: the subject's own]"),
]
DEFAULT_PROTOCOLS = "compress_once for a KV cache, streaming:1 for pairs, streaming:16 for a memory of the model's own"
"""`evomem.report.protocols.DEFAULTS` in words: ``--help`` imports no models."""
ProtocolOption = Annotated[
    str | None,
    typer.Option(
        "--protocol",
        help="compress_once, or streaming[:N]: decide every N tokens. "
        f"\\[default: the subject's on such a memory, else {DEFAULT_PROTOCOLS}]",
    ),
]
Mode = Annotated[QuestionMode | None, typer.Option(help="Decide before (agnostic) or after the question is read.")]
SplitOption = Annotated[Splits, typer.Option("--split", help="Samples that are measured on.")]
Samples = Annotated[
    int | None, typer.Option("--samples", "-n", min=1, help="Samples per task. \\[default: the experiment's, else 50]")
]
Exact = Annotated[
    bool,
    typer.Option("--exact/--no-exact", help="Also generate text, for the exact score (slower)."),
]
Heads = Annotated[
    bool,
    typer.Option("--heads", help="Also the slots and KiB of every layer: least, mean and most of its heads."),
]
Check = Annotated[
    bool,
    typer.Option("--check/--no-check", help="Refuse a task at which the full cache is no better than no context."),
]
PlanCheck = Annotated[
    bool,
    typer.Option("--plan-check/--no-plan-check", help="Refuse what needs more memory, disk or time than there is."),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype",
        help="Type of the weights; auto: the checkpoint's. \\[default: float32 on the processor, else auto]",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="cpu|cuda|cuda:N",
        help="Where the model runs. \\[default: the first GPU, else the processor]",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a plug-in that is there.")]
Json = Annotated[
    str | None,
    typer.Option(
        "--json", "--out", metavar="FILE",
        help="Write the rows as JSON; - for standard output. With a file, a killed comparison goes on where it was.",
    ),
]  # fmt: skip
