"""CLI: the command ``trace``: record what heads saw and what was attended to afterwards."""

from __future__ import annotations

import time
from pathlib import Path

from rich.text import Text

from evomem.cli.commands.progress import ProgressBar
from evomem.evaluation.traces.recording import parse_bytes, readable, record
from evomem.evaluation.traces.store import DEFAULT_FEATURES
from evomem.files.reading import user_path
from evomem.report.packages import require_for
from evomem.tasks.base import Split
from evomem.terminal import plain_console, wide_console


def trace(
    model: str,
    task: str,
    folder: Path,
    *,
    samples: int,
    seed: int,
    split: str,
    mode: str,
    features: str | None,
    limit: str | None,
    dtype: str | None = None,
    device: str | None = None,
    plan_check: bool = True,
) -> None:
    """Record traces, and say what they take."""
    from evomem import models, tasks

    most = None if limit is None else parse_bytes(limit)
    names = tuple(name.strip() for name in features.split(",") if name.strip()) if features else DEFAULT_FEATURES
    require_for([model], [task], intervals=False)
    loaded = models.load(model, dtype=dtype, device=device)
    built = tasks.build(task, loaded.tokenizer)
    begin = time.perf_counter()
    messages = plain_console(stderr=True, soft_wrap=True, highlight=False)
    with ProgressBar("recording") as bar:
        done = record(
            loaded, built, task, user_path(folder),
            samples=samples, seed=seed, split=Split(split), mode=mode, features=names, limit=most,
            say=lambda text: messages.print(Text(text)), progress=bar.report, plan_check=plan_check,
        )  # fmt: skip
    seconds = time.perf_counter() - begin
    lines = [f"{folder}: {done.samples} samples, {done.new} of them recorded now in {seconds:,.1f} s"]
    if done.samples:
        share = done.kv_bytes / done.bytes
        lines.append(
            f"  {readable(done.bytes)}, {readable(done.bytes / done.samples)} a sample; keys and values of the same "
            f"contexts in {loaded.dtype}: {readable(done.kv_bytes)}, {share:.1f} times as much"
        )
    if done.samples < done.requested:
        lines.append(f"  {done.requested - done.samples} of {done.requested} samples did not fit in --limit {limit}")
    for line in lines:
        wide_console().print(Text(line), soft_wrap=True)
