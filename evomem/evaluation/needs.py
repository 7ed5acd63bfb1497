"""Evaluation: the memory, disk space and time that a plan needs, computed before it begins.

The rule: a plan that needs more memory or disk than is free, or more than `DAYS` days, is refused; one that needs more
than a day is begun with a warning. The figures are estimates: bytes follow from the model's configuration and the
contexts' lengths, time from a measurement of the model on a few tokens. ``--no-plan-check`` leaves the rule out.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from evomem.errors import PlanError
from evomem.tasks.base import Split, Task

DAYS = 30
"""Days that a plan may take."""
PER_EVALUATION = 64
"""Tokens of question and answer that an evaluation costs, about."""
PER_SAMPLE = 8
"""Bytes of a sample's text for each of its tokens, about."""
PER_REQUEST = 0.003
"""Seconds that a memory takes for a request of a stream and a decision, for a batch of candidates, about."""
RECORD = 350
"""Bytes of an evaluation in a journal, about."""
_CHEAP = 1e14
"""Floating-point operations that are not worth a measurement: a minute, or an hour on a slow machine."""
_MEASURED = 64
_DAY = 86_400.0


@dataclass(frozen=True)
class Work:
    """One task on one model: what a command will do there.

    Attributes
    ----------
    model : a `transformers` model; None where contexts are read by something else.
    task : gives the contexts.
    contexts : that are read, each once.
    evaluations : of a candidate on a context.
    rows : candidates that are held at once, beside the contexts.
    share : of a context's slots that each of them keeps, at most.
    keeps : contexts stay where they were read, for the next generation.
    """

    model: Any
    task: Task
    contexts: int
    evaluations: int
    rows: int
    share: float = 1.0
    keeps: bool = False


@dataclass
class Needs:
    """What a plan takes.

    Attributes
    ----------
    memory : bytes at its peak, beside the model's weights.
    disk : bytes by the folder that they go to.
    seconds : of computing.
    evaluations : in all.
    """

    memory: float = 0.0
    disk: dict[Path, float] = field(default_factory=dict)
    seconds: float = 0.0
    evaluations: int = 0

    def write(self, folder: Path, size: float) -> None:
        """Add bytes that go to a folder, which need not be there yet."""
        self.disk[folder] = self.disk.get(folder, 0.0) + size


def needs_of(works: Iterable[Work], *, store: int, spill: Path, workers: int = 1) -> Needs:
    """Return what some work takes.

    Parameters
    ----------
    store : bytes of memory for contexts that were read; what is more goes to the folder ``spill``.
    """
    needs, kept, peak, on_processor = Needs(), 0.0, 0.0, False
    costs, streams = list[tuple[Any, float]](), 0.0
    for work in works:
        tokens = length_of(work.task)
        reading = tokens * bytes_per_token(work.model)
        kept += work.contexts * reading if work.keeps else 0.0
        if getattr(getattr(work.model, "device", None), "type", "cpu") == "cpu":  # an accelerator's is measured
            peak = max(peak, reading * (3 + work.rows * work.share))
            on_processor = True
        needs.memory += work.contexts * tokens * PER_SAMPLE
        needs.evaluations += work.evaluations
        if getattr(work.model, "reads_streams", False):  # every candidate reads for itself, as a row of a batch
            streams += work.evaluations / max(work.rows, 1) * tokens * PER_REQUEST
            continue
        costs.append((work.model, work.contexts * tokens + work.evaluations * PER_EVALUATION))
    needs.memory += peak + (min(kept, store) if on_processor else 0.0)
    if kept > store:
        needs.write(spill, kept - store)
    needs.seconds = (streams + sum(_seconds(model, tokens) for model, tokens in costs)) / max(workers, 1)
    return needs


def length_of(task: Task) -> int:
    """Return the tokens of a task's samples: its length, or that of its longest among the first few samples."""
    described: dict[str, Any] = getattr(task, "describe", dict)()  # a task of somebody else may tell nothing
    length = described.get("length")
    if isinstance(length, int):
        return length
    encoder = getattr(task, "tokenizer", None)
    for split in (Split.TRAIN, Split.SEALED):
        with suppress(Exception):  # a split of fewer samples; whoever needs them says so
            some = task.samples(split, 1, 0)
            return max(len(encoder.encode(one.context + one.question + one.answer)) for one in some) if encoder else 0
    return 0


def bytes_per_token(model: Any) -> int:
    """Return the bytes of a token's keys and values in all layers of a model; 0 where it does not tell."""
    config = getattr(model, "config", None)
    if config is None:
        return 0
    config = config.get_text_config()
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)


def _seconds(model: Any, tokens: float) -> float:
    """Return the time that a model takes for tokens; 0 where that is clearly little."""
    if model is None or not hasattr(model, "num_parameters"):
        return 0.0
    if 2.0 * model.num_parameters() * tokens < _CHEAP:
        return 0.0
    ids = torch.zeros(1, _MEASURED, dtype=torch.int64, device=model.device)
    times = []
    with torch.inference_mode():
        for _ in range(2):  # the first call prepares
            begin = time.perf_counter()
            model(ids, use_cache=False).logits.sum().item()
            times.append(time.perf_counter() - begin)
    return tokens * min(times) / _MEASURED


# ---- what there is -------------------------------------------------------------------------------------------------


def require(needs: Needs, *, check: bool = True, say: Callable[[str], None] = lambda _: None) -> None:
    """Raise `PlanError` for a plan that cannot be carried out; warn of one that takes days.

    Parameters
    ----------
    check : False: say it, and go on.
    say : called with every warning.
    """
    wrong = []
    free = free_memory()
    if free is not None and needs.memory > free:
        wrong.append(f"{_size(needs.memory)} of memory, {_size(free)} are free")
    for folder, size in needs.disk.items():
        room = free_disk(folder)
        if room is not None and size > room:
            wrong.append(f"{_size(size)} of disk in {folder}, {_size(room)} are free")
    if needs.seconds > DAYS * _DAY:
        wrong.append(f"about {_span(needs.seconds)} for {needs.evaluations:,} evaluations")
    if wrong:
        text = f"this plan needs {'; and '.join(wrong)}. Take fewer or shorter contexts, candidates or generations"
        if check:
            raise PlanError(f"{text}, or leave this check out with --no-plan-check")
        say(text)
    elif needs.seconds > _DAY:
        say(f"this will take about {_span(needs.seconds)} ({needs.evaluations:,} evaluations)")


def free_memory() -> int | None:
    """Return the bytes of memory that are available, within the limit of a control group; None if unknown."""
    limits = []
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(1024 * int(line.split()[1]))
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(limits)) if limits else None


def free_disk(folder: Path) -> int | None:
    """Return the bytes that are free where a folder is, or will be; None if unknown."""
    for existing in (folder, *folder.absolute().parents):
        with suppress(OSError, ValueError):
            if existing.exists():
                return shutil.disk_usage(existing).free
    return None


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:,.1f} {unit}" if unit != "B" else f"{count:,.0f} B"
        count /= 1024
    raise AssertionError


def _span(seconds: float) -> str:
    days = seconds / _DAY
    return f"{days:,.1f} days" if days < 730 else f"{days / 365.25:,.0f} years"
