"""Memory: the moving average of the attention's spectrogram of every slot (NAMM, arXiv 2410.13166)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from evomem.memory.observations.base import (
    PER_SLOT,
    Axes,
    Moment,
    Observation,
    Sizes,
    State,
    Window,
    register_observation,
)
from evomem.memory.observations.recorder import Recorder, writable
from evomem.memory.observations.spectrum import BINS, HOP, advance


@register_observation("attention_spectrum")
class AttentionSpectrum(Observation):
    """Moving average of the attention's spectrogram, 17 bins a slot."""

    every_query: ClassVar[bool] = True
    needs_past: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True

    def axes(self) -> dict[str, Axes]:
        """17 magnitudes a slot."""
        return {self.spec: (*PER_SLOT, BINS)}

    def append(self, recorder: Recorder, shape: tuple[int, int, int], like: Tensor) -> None:
        """Begin new slots at zero: the average, and the attention of the queries that wait for a frame."""
        columns = recorder.slotwise.get("columns")
        waiting = columns.shape[3] if columns is not None else HOP
        for name, tail in (("attention_spectrum", BINS), ("columns", waiting)):
            recorder.extend(name, torch.zeros(*shape, tail, device=like.device, dtype=torch.float32))

    def attended(self, recorder: Recorder, attention: Tensor, first: int, starts: tuple[int, ...]) -> None:
        """Advance the spectrogram row by row group: frames count a row's own tokens, so padding shifts them."""
        starts = tuple(max(start, recorder.begin) for start in starts)
        columns, slots = recorder.slotwise["columns"], attention.shape[3]
        queries = attention.shape[2]
        last = first + queries
        waiting = max((max(last - start, 0)) % HOP for start in starts)
        grown = columns.new_zeros(*columns.shape[:3], HOP + waiting)
        for start in sorted(set(starts)):
            rows = torch.tensor([s == start for s in starts], device=columns.device)
            whole = bool(rows.all())
            old = columns if whole else columns[rows]
            pending = max(first - start, 0) % HOP
            arrived = attention if whole else attention[rows]
            arrived = arrived[:, :, max(start - first, 0) :]
            tail = old[:, :, :slots, :HOP].transpose(2, 3)
            stream = arrived
            if pending:
                stream = torch.cat((old[:, :, :slots, HOP : HOP + pending].transpose(2, 3), arrived), dim=2)
            full = stream.shape[2] // HOP * HOP
            if full:
                state = recorder.slotwise["attention_spectrum"] = writable(recorder.slotwise["attention_spectrum"])
                before = state if whole else state[rows]
                after, tail = advance(before[:, :, :slots], tail, stream[:, :, :full])
                if whole:
                    state[:, :, :slots] = after
                else:
                    before[:, :, :slots] = after
                    state[rows] = before
            rest = stream[:, :, full:].transpose(2, 3)
            block = grown if whole else grown[rows]
            block[:, :, :slots, :HOP] = tail.transpose(2, 3)
            block[:, :, :slots, HOP : HOP + rest.shape[3]] = rest
            if not whole:
                grown[rows] = block
        recorder.slotwise["columns"] = grown

    def recorded(self, recorder: Recorder, moment: Moment, window: Callable[[int], Window]) -> dict[str, Tensor]:
        """Return the averages of the slots that were read; tokens ahead have room already."""
        return {self.spec: recorder.slotwise["attention_spectrum"][:, :, : moment.slots.shape[2]]}

    def state(self, tensors: Mapping[str, Tensor], sizes: Sizes) -> dict[str, State]:
        """The averages, and the attention of the last frame's queries and of those that wait for the next."""
        shape = sizes.batch, sizes.kv_heads, sizes.slots
        waiting = max(max(sizes.seen - start, 0) % HOP for start in sizes.since)
        columns = tensors.get("slotwise.columns")
        if columns is not None and columns.dim() == 4 and HOP + waiting < columns.shape[3] < 2 * HOP:
            waiting = columns.shape[3] - HOP  # rows that have gone since the last query waited for more
        return {
            "slotwise.attention_spectrum": ((*shape, BINS), torch.float32),
            "slotwise.columns": ((*shape, HOP + waiting), torch.float32),
        }
