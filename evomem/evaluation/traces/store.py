"""Evaluation: contexts as heads saw them and as question and answer used them, on disk: policies learn without a model.

A trace folder holds a ``manifest.json`` and one safetensors file a sample, recorded by
`evomem.evaluation.traces.recording.record` with everything kept (``compress_once``). Per layer L a file has

=================  =========================================  ==========================================================
tensor             shape and type                             what
=================  =========================================  ==========================================================
``L.columns``      (features, kv_heads, slots) fp16           the base features (`evomem.managers.features`), in order
``L.peak``         (kv_heads, slots) fp16 times a power of 2   `Future.peak`
``L.paid``         (kv_heads, slots) fp16 times a power of 2   `Future.paid`
``L.next_use``     (kv_heads, slots) int16 (or int32)         `Future.next_use`
=================  =========================================  ==========================================================

The power of two brings a file's largest value to at most 2^15; so a value keeps its 11 significant bits (a relative
error of at most 2^-11) down to 2^-28 of the largest, and below that an error of at most 2^-39 of it. Slots are not
stored: nothing was evicted, they are 0, 1, 2, … Neither are features that follow from them (`FROM_SLOTS`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from evomem.bounds import BYTES, SEED, TOKENS
from evomem.errors import ConfigError, EvaluationError, RunError
from evomem.evaluation.future import Future
from evomem.evaluation.store import Reading
from evomem.files.reading import user_path
from evomem.managers.features import FROM_SLOTS, base_columns, column
from evomem.memory import LayerView
from evomem.validation import faults

if TYPE_CHECKING:
    from evomem.models import LoadedModel

MANIFEST = "manifest.json"
SCHEMA = 1
DEFAULT_FEATURES = (
    "key_norm", "value_norm", "keydiff", "valuediff", "key_step", "value_step", "age", "position", "sink", "attention",
    "attention_per_query", "last:8", "last:16", "last:32", "block_max:64", "block_min:64", "block_sum:64",
    "block_decayed:64",
)  # fmt: skip
"""What is recorded when nothing else is asked for."""
_LARGEST = 2.0**15


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TraceModel(_Strict):
    """The frozen model that read: its name, the digest of its weights, and their type."""

    name: str
    digest: str
    dtype: str


class TraceTask(_Strict):
    """The task as it was named, and the options that rebuild it."""

    spec: str
    name: str
    options: dict[str, Any]


class TraceFile(_Strict):
    """One sample's file.

    Attributes
    ----------
    file : its name in the folder.
    sample, key : the sample's id, and its content (`evomem.evaluation.future.sample_key`).
    bytes, sha256 : of the file.
    slots : tokens of the context.
    kv_bytes : what the model's keys and values of the context took in memory.
    """

    file: str = Field(pattern=r"^[0-9]+\.safetensors$")
    sample: str
    key: str
    bytes: int = Field(ge=0, le=BYTES)
    sha256: str
    slots: int = Field(ge=1, le=TOKENS)
    kv_bytes: int = Field(ge=0, le=BYTES)


class TraceHeader(_Strict):
    """What a folder is about; all its samples have it in common.

    Attributes
    ----------
    features : base features that views have, stored or from their slots.
    used : share of a query's attention from which on a slot counts as used (`evomem.memory.observations.USED`).
    prefix : what the tokenizer put before every context.
    """

    schema_version: Literal[1] = 1
    model: TraceModel
    task: TraceTask
    mode: Literal["query_agnostic", "query_aware"]
    split: str
    seed: int = Field(ge=0, le=SEED)
    features: tuple[str, ...]
    used: float = Field(ge=0, le=1)
    prefix: str = ""


class Manifest(_Strict):
    """The content of ``manifest.json``."""

    header: TraceHeader
    files: tuple[TraceFile, ...] = ()

    def to_bytes(self) -> bytes:
        """Return the file's content: the same bytes for the same manifest."""
        return (json.dumps(self.model_dump(mode="json"), indent=1) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a folder's manifest.

        Raises
        ------
        RunError : there is none, it is damaged, or of an unknown version.
        """
        path = folder / MANIFEST
        try:
            return cls.model_validate(json.loads(path.read_bytes()))
        except FileNotFoundError:
            raise RunError(
                f"{folder}: is no trace folder (no {MANIFEST}); record one with: evomem trace --out {folder}"
            ) from None
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {error.strerror or error}") from None
        except ValidationError as error:
            raise RunError(
                f"{path}: {faults(error, cls, 'the manifest')[0]}; this evomem reads version {SCHEMA}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise RunError(f"{path}: is damaged ({error}); record the traces again into another folder") from None


@dataclass(frozen=True)
class Trace:
    """One sample: what managers see of its context, and what then came of it.

    Attributes
    ----------
    sample, key : see `TraceFile`.
    views : one a layer, nothing evicted, *without* keys, values and observations: those tensors are empty, and features
        come from the views' memo.
    future : of the slots, per layer (1, kv_heads, slots) fp32.
    """

    sample: str
    key: str
    views: tuple[LayerView, ...]
    future: Future


def _missing(name: str, folder: Path, have: Sequence[str]) -> str:
    return (
        f"feature {name!r} is not in the traces {folder}; they have {', '.join(have)}. Record traces with "
        "--features, or leave the feature out"
    )


@dataclass
class Traces:
    """A folder of traces, open for reading; it can be sent to other processes, which read the same files.

    Attributes
    ----------
    folder : where it is.
    manifest : what is in it.
    """

    folder: Path
    manifest: Manifest
    _files: dict[str, TraceFile] = field(default_factory=dict, repr=False)
    _verified: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def open(cls, folder: Path | str) -> Traces:
        """Open a folder; only its manifest is read.

        Raises
        ------
        RunError : there is no manifest, it is damaged, or of an unknown version.
        """
        path = user_path(folder)
        manifest = Manifest.read(path)
        return cls(path, manifest, {file.key: file for file in reversed(manifest.files)})

    def __len__(self) -> int:
        return len(self.manifest.files)

    def __iter__(self) -> Iterator[Trace]:
        """All traces, in the order of the task's samples."""
        return (self._read(file) for file in self.manifest.files)

    def matches(self, loaded: LoadedModel, features: Sequence[str] = (), *, mode: str | None = None) -> None:
        """Make sure that the traces are of this model, have these features, and were read in this mode.

        Raises
        ------
        RunError : another model (by the digest of its weights, or their type), or another mode.
        ConfigError : a feature was not recorded.
        """
        mine, header = self.manifest.header.model, self.manifest.header
        if mine.digest != loaded.digest:
            raise RunError(
                f"{self.folder}: these traces are of {mine.name} (digest {mine.digest[:12]}…), not of {loaded.name} "
                f"(digest {loaded.digest[:12]}…); record traces of {loaded.name}"
            )
        dtype = str(loaded.model.dtype).removeprefix("torch.")
        if mine.dtype != dtype:
            raise RunError(f"{self.folder}: these traces were read in {mine.dtype}, but {loaded.name} runs in {dtype}")
        if mode is not None and mode != header.mode:
            raise RunError(f"{self.folder}: these traces were read {header.mode}, but the protocol is {mode}")
        for name in base_columns(tuple(features)):
            if name not in header.features and name not in FROM_SLOTS:
                raise ConfigError(_missing(name, self.folder, sorted({*header.features} | FROM_SLOTS)))

    def get(self, key: str) -> Trace | None:
        """Return the trace of a sample by its content (`sample_key`); None if it was not recorded.

        Raises
        ------
        RunError : its file is missing or damaged.
        """
        file = self._files.get(key)
        return None if file is None else self._read(file)

    def _read(self, file: TraceFile) -> Trace:
        path = self.folder / file.file
        if file.file not in self._verified:  # once a process; afterwards only the mapped pages are touched
            trouble = damage(path, file)
            if trouble:
                raise RunError(f"{path}: {trouble}; repeat the evomem trace command, which records it again")
            self._verified.add(file.file)
        try:
            return decode(path, self.manifest.header.features)
        except (SafetensorError, OSError, LookupError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise RunError(f"{path}: is damaged ({error}); repeat the evomem trace command") from None


@dataclass(frozen=True)
class TraceCollection:
    """Several folders of traces of one model, asked in their order."""

    folders: Sequence[Traces]

    def get(self, key: str) -> Trace | None:
        """Return the trace of a sample by its content, from the first folder that has it; None if none has."""
        traces = (folder.get(key) for folder in self.folders)
        return next((trace for trace in traces if trace is not None), None)


def damage(path: Path, file: TraceFile) -> str:
    """Return what is wrong with a file of a folder; nothing if its bytes are what the manifest says."""
    try:
        size = path.stat().st_size
        if size != file.bytes:
            return f"has {size} bytes instead of {file.bytes}"
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return "" if digest == file.sha256 else "is damaged: its checksum is another"


def stored(features: Sequence[str]) -> tuple[str, ...]:
    """Return the base features that files hold, in their order."""
    return tuple(name for name in base_columns(tuple(features)) if name not in FROM_SLOTS)


def encode(reading: Reading, future: Future, features: Sequence[str], sample: str, key: str) -> bytes:
    """Return the content of a trace file; the same bytes for the same numbers.

    Parameters
    ----------
    reading : the whole context, with the observations that the features need (`evomem.managers.features.required`).
    future : of the same sample.

    Raises
    ------
    EvaluationError : a number is NaN, infinite, or too large for its type.
    """
    scales = {name: _scale(getattr(future, name)) for name in ("peak", "paid")}
    tensors: dict[str, Tensor] = {}
    for view in reading.views:
        columns = [column(view, name)[0].half() for name in stored(features)]
        slots = view.slots.shape[1:]
        tensors[f"{view.layer}.columns"] = torch.stack(columns) if columns else torch.zeros(0, *slots).half()
        for name, scale in scales.items():
            tensors[f"{view.layer}.{name}"] = (getattr(future, name)[view.layer][0].float() * scale).half()
        uses = future.next_use[view.layer][0]
        small = not uses.numel() or float(uses.max()) < 2**15
        tensors[f"{view.layer}.next_use"] = uses.to(torch.int16 if small else torch.int32)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise EvaluationError(
                f"sample {sample}: {name} (layer.what) holds numbers that are NaN or infinite in fp16"
            )
    facts = {"sample": sample, "key": key, "layers": len(reading.views), "seen": reading.tokens, "scales": scales}
    # One entry: safetensors writes several in an order that changes from process to process.
    return save({n: t.cpu().contiguous() for n, t in tensors.items()}, {"trace": json.dumps(facts, sort_keys=True)})


def _scale(parts: Sequence[Tensor]) -> float:
    """Return the power of two that brings the largest value just to 2^15 or below it."""
    largest = max((float(part.max()) for part in parts if part.numel()), default=0.0)
    return 2.0 ** min(math.floor(math.log2(_LARGEST / largest)), 100) if largest > 0 else 1.0


def decode(path: Path, features: Sequence[str]) -> Trace:
    """Read a trace file that was recorded with these features; what is read is mapped, not copied, until converted."""
    views, parts = [], {name: list[Tensor]() for name in Future._fields}
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["trace"])
        layers, seen, scales = int(facts["layers"]), int(facts["seen"]), facts["scales"]
        names = stored(features)
        for layer in range(layers):
            columns = file.get_tensor(f"{layer}.columns")[:, None].float()
            if len(columns) != len(names):
                raise ValueError(f"{len(columns)} features instead of {len(names)}")
            for part, layers_of_part in parts.items():
                tensor = file.get_tensor(f"{layer}.{part}")[None].float()
                layers_of_part.append(tensor / scales[part] if part in scales else tensor)
            heads = columns.shape[2]
            empty = torch.zeros(1, heads, seen, 0)
            slots, start = torch.arange(seen).expand(1, heads, seen), torch.zeros(1, dtype=torch.int64)
            by_name = dict(zip(names, columns, strict=True))
            views.append(
                LayerView(
                    empty, empty, slots, start, seen, seen, layer, layers, columns=by_name, source=str(path.parent)
                )
            )
    future = Future(**{part: tuple(layers_of_part) for part, layers_of_part in parts.items()})
    return Trace(str(facts["sample"]), str(facts["key"]), tuple(views), future)
