"""Testing: replay recorded updates of a NAMM through this package's own code and report the differences.

``python -m evomem.testing.namm FILE…`` prints one JSON object a file:
``{"file": …, "features": max abs difference, "scores": max abs difference, "kept_mismatches": count}``.

A file (``.npz``) holds the BAM's parameters ``theta`` (4172,), ``mean`` and ``var`` (17,) of the spectrogram, and for
n = 0, 1, … the update n: ``attention_n`` (query heads, queries, slots), after the softmax, of the queries since the
update before; ``positions_n`` (kv heads, slots), the token that every slot holds, ascending; ``features_n``
(kv heads, slots, 25); ``scores_n`` (kv heads, slots); ``kept_dense_n`` (kv heads, kept), positions.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomem.errors import EvomemError
from evomem.managers.learned.namm import FEATURES, NAMM, OBSERVATION
from evomem.managers.vector import vector_size
from evomem.memory import LayerView
from evomem.memory.observations.spectrum import BINS, HOP, advance

PER_UPDATE = ("attention", "positions", "features", "scores", "kept_dense")

DAMAGE = (
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading a damaged archive raises, depending on the byte that is wrong."""


class RecordingError(EvomemError, ValueError):
    """A file of recorded updates is damaged or incomplete; the message names file and field."""


@dataclass(frozen=True)
class Update:
    """One recorded update; shapes as in the module's docstring."""

    attention: Tensor
    positions: Tensor
    features: Tensor
    scores: Tensor
    kept: Tensor

    @property
    def queries(self) -> int:
        """Number of tokens since the update before."""
        return self.attention.shape[1]


@dataclass(frozen=True)
class Recording:
    """A recorded run of one layer."""

    theta: NDArray[Any]
    mean: Tensor
    var: Tensor
    updates: tuple[Update, ...]


@dataclass(frozen=True)
class Differences:
    """Largest absolute differences from a recording, and the number of slots kept by only one of the two."""

    features: float
    scores: float
    kept_mismatches: int


def read(path: Path) -> Recording:
    """Read a recording; raise `RecordingError` if it is not one, or not whole."""
    arrays = _arrays(path)
    size = vector_size(NAMM())
    numbers = {int(name.rsplit("_", 1)[1]) for name in arrays if _is_per_update(name)}
    if not numbers:
        raise RecordingError(f"{path}: no update; attention_0, positions_0, … are missing")
    fields = ["theta", "mean", "var", *(f"{name}_{n}" for n in range(max(numbers) + 1) for name in PER_UPDATE)]
    missing = [name for name in fields if name not in arrays]
    if missing:
        raise RecordingError(f"{path}: incomplete, without {', '.join(missing)}; get the whole file")
    for name in fields:
        kinds = "iu" if name.startswith(("positions", "kept_dense")) else "f"
        if arrays[name].dtype.kind not in kinds:
            raise RecordingError(f"{path}: {name} has the type {arrays[name].dtype}")
        if not np.isfinite(arrays[name]).all():
            raise RecordingError(f"{path}: {name} has values that are not finite")
    for name, shape in (("theta", (size,)), ("mean", (BINS,)), ("var", (BINS,))):
        _expect(path, name, arrays[name], shape)
    if (arrays["var"] < 0).any():
        raise RecordingError(f"{path}: var has negative values")
    updates: list[Update] = []
    seen = 0
    heads = 0
    for n in range(max(numbers) + 1):
        update = _update(path, arrays, n, seen, heads)
        seen += update.queries
        heads = update.positions.shape[0]
        updates.append(update)
    return Recording(
        arrays["theta"],
        torch.from_numpy(arrays["mean"]).float(),
        torch.from_numpy(arrays["var"]).float(),
        tuple(updates),
    )


def _is_per_update(name: str) -> bool:
    field, _, number = name.rpartition("_")
    return field in PER_UPDATE and number.isdecimal()


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise RecordingError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise RecordingError(f"{path}: not an .npz file, or cut short; get it again")
    try:
        with np.load(path, allow_pickle=False) as loaded:
            return {name: loaded[name] for name in loaded.files}
    except DAMAGE as error:
        raise RecordingError(f"{path}: damaged .npz file ({error}); get it again") from None


def _expect(path: Path, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise RecordingError(f"{path}: {name} has the shape {array.shape}, expected {shape}")


def _update(path: Path, arrays: dict[str, NDArray[Any]], n: int, seen: int, heads: int) -> Update:
    """Check update n, before which ``seen`` tokens were read by ``heads`` KV heads (0: not yet known)."""
    attention, positions, kept = (arrays[f"{name}_{n}"] for name in ("attention", "positions", "kept_dense"))
    if attention.ndim != 3 or positions.ndim != 2 or kept.ndim != 2 or 0 in (*attention.shape, *positions.shape):
        raise RecordingError(
            f"{path}: update {n} has attention {attention.shape}, positions {positions.shape}, kept {kept.shape}; "
            "expected (query heads, queries, slots), (kv heads, slots), (kv heads, kept)"
        )
    groups = positions.shape[0]
    query_heads, queries, slots = attention.shape
    if query_heads % groups or queries % HOP or (heads and groups != heads):
        raise RecordingError(
            f"{path}: update {n} has {query_heads} query heads, {groups} KV heads and {queries} queries; "
            f"expected whole groups of query heads, the same KV heads in every update, a multiple of {HOP} queries"
        )
    _expect(path, f"positions_{n}", positions, (groups, slots))
    _expect(path, f"features_{n}", arrays[f"features_{n}"], (groups, slots, FEATURES))
    _expect(path, f"scores_{n}", arrays[f"scores_{n}"], (groups, slots))
    _expect(path, f"kept_dense_{n}", kept, (groups, kept.shape[1]))
    newest = seen + queries - 1
    ascending = (np.diff(positions.astype(np.int64), axis=1) > 0).all()
    if not ascending or (positions < 0).any() or (positions[:, -1] != newest).any():
        raise RecordingError(f"{path}: positions_{n} must ascend from at least 0 to the newest token, {newest}")
    if (kept < 0).any() or (kept > newest).any():
        raise RecordingError(f"{path}: kept_dense_{n} has positions outside 0..{newest}")
    return Update(
        torch.from_numpy(attention).float(),
        torch.from_numpy(positions.astype(np.int64)),
        torch.from_numpy(arrays[f"features_{n}"]).float(),
        torch.from_numpy(arrays[f"scores_{n}"]).float(),
        torch.from_numpy(kept.astype(np.int64)),
    )


class _Memory:
    """What the slots carry from update to update, by token: an evicted token's entry is zero again."""

    def __init__(self, heads: int, tokens: int) -> None:
        self.state = torch.zeros(heads, tokens, BINS)
        self.tail = torch.zeros(heads, HOP, tokens)

    def take(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return state (1, heads, slots, 17) and tail (1, heads, 16, slots) of the tokens at ``positions``."""
        heads = torch.arange(positions.shape[0])[:, None]
        return self.state[heads, positions][None], self.tail[heads, :, positions].transpose(1, 2)[None]

    def put(self, positions: Tensor, kept: Tensor, state: Tensor, tail: Tensor) -> None:
        """Replace everything by the slots of ``positions`` (heads, slots) that are ``kept`` (heads, slots)."""
        self.state.zero_()
        self.tail.zero_()
        head, slot = kept.nonzero(as_tuple=True)
        self.state[head, positions[head, slot]] = state[0, head, slot]
        self.tail[head, :, positions[head, slot]] = tail[0, head, :, slot]


def replay(recording: Recording) -> Differences:
    """Run the recorded updates through the spectrogram, the NAMM and the dense selection.

    Only the attention and the positions at hand are taken from the recording: the spectrogram that an update starts
    from is what the slots kept by the own decision before carry on.
    """
    manager = NAMM(selection="dense").from_vector(recording.theta)
    manager.set_statistics(recording.mean, recording.var)
    tokens = sum(update.queries for update in recording.updates)
    memory = _Memory(recording.updates[0].positions.shape[0], tokens)
    features = scores = 0.0
    mismatches = 0
    with torch.no_grad():
        for update, view, tail in _views(recording, memory):
            decision = manager.decide(view)
            keep = decision.keep[0]
            memory.put(update.positions, keep, view.recorded[OBSERVATION], tail)
            features = max(features, (manager.features(view)[0] - update.features).abs().max().item())
            scores = max(scores, (manager.score(view)[0] - update.scores).abs().max().item())
            for head in range(keep.shape[0]):
                ours = set(update.positions[head][keep[head]].tolist())
                mismatches += len(ours ^ set(update.kept[head].tolist()))
    return Differences(features, scores, mismatches)


def _views(recording: Recording, memory: _Memory) -> Iterator[tuple[Update, LayerView, Tensor]]:
    seen = 0
    for update in recording.updates:
        seen += update.queries
        heads, slots = update.positions.shape
        attention = update.attention.reshape(heads, -1, update.queries, slots).mean(1)[None]
        state, tail = advance(*memory.take(update.positions), attention)
        nothing = torch.zeros(1, heads, slots, 0)
        yield (
            update,
            LayerView(
                keys=nothing,
                values=nothing,
                slots=update.positions[None],
                start=torch.zeros(1, dtype=torch.int64),
                seen=seen,
                fresh=update.queries,
                layer=0,
                layers=1,
                recorded={OBSERVATION: state},
            ),
            tail,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay every file; return 0, or 2 if a file could not be used (its message is on the error stream)."""
    parser = argparse.ArgumentParser(
        prog="python -m evomem.testing.namm", description="Replay recorded NAMM updates and report the differences."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".npz file of recorded updates")
    status = 0
    for path in parser.parse_args(arguments).files:
        try:
            differences = replay(read(path))
        except EvomemError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
            continue
        report = {
            "file": str(path),
            "features": differences.features,
            "scores": differences.scores,
            "kept_mismatches": differences.kept_mismatches,
        }
        print(json.dumps(report, ensure_ascii=False), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
