"""Evaluation: record traces: what each head saw of a task's contexts, and what question and answer then attended to.

The format, and how traces are read, is in `evomem.evaluation.traces.store`. A recording may be killed at any moment:
what is in the manifest is whole, and the same call goes on after it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import torch

from evomem.errors import ConfigError, RunError, TaskError
from evomem.evaluation.evaluator import Evaluator
from evomem.evaluation.future import sample_key
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.evaluation.needs import Work, length_of, needs_of, require
from evomem.evaluation.store import PrefillStore
from evomem.evaluation.traces.store import (
    DEFAULT_FEATURES,
    MANIFEST,
    Manifest,
    TraceFile,
    TraceHeader,
    TraceModel,
    TraceTask,
    damage,
    encode,
    stored,
)
from evomem.files.atomic import disk_errors, is_temporary, sweep, write_atomically
from evomem.files.strict_json import shown
from evomem.managers.features import base_columns, required
from evomem.memory.observations import USED
from evomem.tasks.base import Sample, Split, Task, at_hand
from evomem.tasks.encoding import TextEncoder

if TYPE_CHECKING:
    from evomem.models import LoadedModel

_LOCK = "traces.lock"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Recorded:
    """What a folder holds after a recording.

    Attributes
    ----------
    samples : samples in the folder.
    requested : samples that were asked for; the folder has fewer if the limit was reached.
    new : samples recorded by this call.
    bytes : of all trace files and the manifest.
    kv_bytes : of the keys and values of the same contexts, in the model's type.
    """

    samples: int
    requested: int
    new: int
    bytes: int
    kv_bytes: int


def record(
    loaded: LoadedModel,
    task: Task,
    spec: str,
    folder: Path,
    *,
    samples: int,
    seed: int = 0,
    split: Split = Split.TRAIN,
    mode: str = "query_agnostic",
    features: Sequence[str] = DEFAULT_FEATURES,
    limit: int | None = None,
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    plan_check: bool = True,
) -> Recorded:
    """Record the first ``samples`` samples of a split, or go on with what an earlier call recorded.

    Parameters
    ----------
    loaded, task, spec : the frozen model, the task, and how the user named it.
    folder : where to; made if it is not there. More samples than before are added, everything else must be the same.
    seed : of the samples; a search draws its training contexts with the experiment's seed.
    mode : whether the question is part of what is read (`EvaluationProtocol`).
    features : see `evomem.managers.features`; what their neighbourhoods are of is stored.
    limit : bytes of the folder at most; the recording ends before the sample that would exceed it.
    say : called with the estimate beforehand, and with every damaged file that is recorded again.
    progress : called with samples done and samples in all.
    plan_check : refuse what needs more memory, disk or time than there is (`evomem.evaluation.needs`).

    Raises
    ------
    RunError : the folder is in use, is none of traces, was recorded with other arguments, or the disk is full.
    TaskError : the task has fewer samples.
    ConfigError : a feature does not exist.
    """
    if samples < 1:
        raise ConfigError(f"samples: {samples}; record at least 1")
    columns = base_columns(tuple(features))
    available = at_hand(task, split, samples)
    needs = needs_of([Work(loaded.model, task, available, available, 0)], store=0, spill=folder)
    needs.write(
        folder, 0 if limit is not None else available * length_of(task) * _bytes_per_token(loaded.model, columns)
    )
    require(needs, check=plan_check, say=say)
    chosen = task.samples(split, available, seed)
    if len(chosen) < available:
        raise TaskError(f"task {spec}: split {split.value!r} has {len(chosen)} samples, {available} are needed")
    if available < samples:
        say(f"{available} of {samples} samples: the {split} split of {spec} has no more")
    header = TraceHeader(
        model=TraceModel(name=loaded.name, digest=loaded.digest, dtype=str(loaded.model.dtype).removeprefix("torch.")),
        task=TraceTask(spec=spec, name=task.name, options=task.describe()),
        mode=EvaluationProtocol.model_validate({"mode": mode}).mode,
        split=split.value,
        seed=seed,
        features=columns,
        used=USED,
        prefix=TextEncoder(loaded.tokenizer).spelled,
    )
    evaluator = Evaluator(loaded, EvaluationProtocol(mode=header.mode), store=PrefillStore())
    reach = evaluator.check_positions(chosen)
    if reach.limit is not None:
        say(f"samples of up to {reach.longest:,} tokens, but {loaded.name} was made for {reach.limit:,} positions")
    with _locked(folder):
        recorded = _opened(folder, header, chosen, say)
        say(_estimate(evaluator, header, chosen, recorded, limit))
        return _record(evaluator, header, chosen, recorded, folder, limit, say, progress)


def _record(
    evaluator: Evaluator,
    header: TraceHeader,
    chosen: Sequence[Sample],
    recorded: dict[str, TraceFile],
    folder: Path,
    limit: int | None,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> Recorded:
    # What an earlier, longer recording holds beyond this one's samples stays.
    names = [_name(number) for number in range(len(chosen))]
    names += sorted(name for name in recorded if name not in set(names))
    new = 0

    def manifest(files: dict[str, TraceFile]) -> Manifest:
        return Manifest(header=header, files=tuple(files[name] for name in names if name in files))

    for number, sample in enumerate(chosen):
        name = names[number]
        progress(number, len(chosen))
        if name in recorded:
            continue
        file, content = _trace(evaluator, header, sample, name)
        longer = {**recorded, name: file}
        listing = manifest(longer).to_bytes()
        size = sum(one.bytes for one in longer.values()) + len(listing)
        if limit is not None and size > limit:
            fitting = f"{len(recorded)} of {len(chosen)} samples fit in {limit:,} bytes (--limit)"
            say(f"{folder}: {fitting}; stopped before it")
            break
        write_atomically(folder / name, content)
        write_atomically(folder / MANIFEST, listing)
        recorded, new = longer, new + 1
    progress(len(recorded), len(chosen))
    files = manifest(recorded)
    size = sum(one.bytes for one in files.files) + len(files.to_bytes())
    return Recorded(len(files.files), len(chosen), new, size, sum(one.kv_bytes for one in files.files))


@torch.no_grad()
def _trace(evaluator: Evaluator, header: TraceHeader, sample: Sample, name: str) -> tuple[TraceFile, bytes]:
    """Let the model read a sample, and return its trace file; the reading leaves memory."""
    observes = required(header.features)
    tokens = evaluator.tokens(sample)
    key = sample_key(tokens)
    reading = evaluator.reading(tokens.read, observes)
    future = evaluator.future.of(evaluator, tokens, key, observes)
    content = encode(reading, future, header.features, sample.id, key)
    kv_bytes = sum(t.numel() * t.element_size() for view in reading.views for t in (view.keys, view.values))
    evaluator.store.close()
    evaluator.future.known.clear()
    digest = hashlib.sha256(content).hexdigest()
    file = TraceFile(
        file=name, sample=sample.id, key=key, bytes=len(content), sha256=digest, slots=reading.tokens, kv_bytes=kv_bytes
    )
    return file, content


def _name(number: int) -> str:
    return f"{number:06d}.safetensors"


def _refuse_strangers(folder: Path) -> None:
    """Raise `RunError` unless a folder is new, empty, or of traces; nothing is written before that is known."""
    with disk_errors(folder):
        if not folder.exists() or (folder / MANIFEST).exists():
            return
        if not folder.is_dir():
            raise RunError(f"{folder}: is a file; choose another folder")
        strangers = sorted(one.name for one in folder.iterdir() if one.name != _LOCK and not is_temporary(one))
    if strangers:
        raise RunError(f"{folder}: is no trace folder and not empty (it holds {strangers[0]}); choose another")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    _refuse_strangers(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(str(folder / _LOCK), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise RunError(f"{folder}: another process is recording here; wait for it or choose another folder") from None
    try:
        yield
    finally:
        lock.release()


def _opened(
    folder: Path, header: TraceHeader, chosen: Sequence[Sample], say: Callable[[str], None]
) -> dict[str, TraceFile]:
    """Return the undamaged files of a folder by name; begin a folder if there is none."""
    _refuse_strangers(folder)  # again, because now nobody else works in it
    path = folder / MANIFEST
    sweep(folder)
    if not path.exists():
        write_atomically(path, Manifest(header=header).to_bytes())
        return {}
    manifest = Manifest.read(folder)
    lines = [
        f"{name}: {theirs} -> {mine}"
        for name, theirs, mine in _differences(manifest.header.model_dump(mode="json"), header.model_dump(mode="json"))
    ]
    if lines:
        raise RunError(f"{folder}: holds traces of other arguments; choose another folder.\n  " + "\n  ".join(lines))
    recorded: dict[str, TraceFile] = {}
    for file in manifest.files:
        trouble = damage(folder / file.file, file)
        if trouble:
            say(f"{folder / file.file}: {trouble}; it is recorded again")
        else:
            recorded[file.file] = file
    for number, sample in enumerate(chosen):
        known = recorded.get(_name(number))
        if known is not None and known.sample != sample.id:
            raise RunError(
                f"{folder}: {known.file} is of sample {known.sample}, not {sample.id}; choose another folder"
            )
    return recorded


def _differences(theirs: dict[str, Any], mine: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in {**theirs, **mine}:
        one, other = theirs.get(name), mine.get(name)
        # How a task and a model were called does not matter; what they are is in the other fields.
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differences(one, other, f"{prefix}{name}.")
        elif one != other and f"{prefix}{name}" not in ("task.spec", "model.name"):
            yield f"{prefix}{name}", one, other


def _estimate(
    evaluator: Evaluator,
    header: TraceHeader,
    chosen: Sequence[Sample],
    recorded: dict[str, TraceFile],
    limit: int | None,
) -> str:
    """Say what all samples will take, from the lengths of a few."""
    some = chosen[:8]
    lengths = [evaluator.tokens(sample).read.shape[1] for sample in some]
    mean = sum(lengths) / len(lengths)
    each = mean * _bytes_per_token(evaluator.loaded.model, header.features)
    each += 300 * evaluator.loaded.model.config.get_text_config().num_hidden_layers  # safetensors' list of its tensors
    total = each * len(chosen)
    there = f", {len(recorded)} already there" if recorded else ""
    text = f"about {readable(total)} for {len(chosen)} samples of {mean:,.0f} tokens{there}"
    if limit is not None and total > limit:
        text += f"; about {int(limit // each)} of them fit in {limit:,} bytes (--limit)"
    return text


def _bytes_per_token(model: Any, features: Sequence[str]) -> int:
    """Return the bytes that a trace file takes for every token of a context."""
    config = model.config.get_text_config()
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return int(config.num_hidden_layers) * heads * 2 * (len(stored(features)) + 3)


def readable(size: float) -> str:
    """Write bytes in the unit that suits them (decimal): ``1.5 MB``."""
    unit = max((unit for unit, one in _UNITS.items() if unit and one <= max(size, 1)), key=_UNITS.__getitem__)
    return f"{size / _UNITS[unit]:,.{0 if unit == 'B' else 1}f} {unit}"


def parse_bytes(text: str) -> int:
    """Read ``2GB``, ``500MB`` or ``1000000`` (decimal units); raise `ConfigError` for anything else."""
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"--limit: {shown(text)!r}; write a number of bytes, or 500MB, 2GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
