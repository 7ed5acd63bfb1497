"""Memory: where the slots of heads lie that hold differently many: one after the other, with nothing between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RaggedLayout:
    """Which part of flat tensors belongs to which row and KV head.

    A *flat* tensor has the slots of all heads on axis 0: those of row 0, head 0, then of row 0, head 1, and so on, each
    head's in the order of their tokens. Its *padded* form is (batch, kv_heads, longest, …), right-aligned.

    Attributes
    ----------
    lengths : (batch, kv_heads) int64 on the processor, slots of every head.
    device : where the flat tensors lie.
    """

    lengths: Tensor
    device: torch.device

    @cached_property
    def total(self) -> int:
        """Slots of all heads of all rows."""
        return int(self.lengths.sum())

    @cached_property
    def longest(self) -> int:
        """Slots of the longest head."""
        return int(self.lengths.max())

    @cached_property
    def equal_rows(self) -> bool:
        """Whether every row has the lengths of the first, head by head."""
        return bool((self.lengths == self.lengths[:1]).all())

    @cached_property
    def bounds(self) -> Tensor:
        """Where every head begins, and the last one ends: (batch * kv_heads + 1,) int64 on the processor."""
        return torch.nn.functional.pad(self.lengths.flatten().cumsum(0), (1, 0))

    @cached_property
    def counts(self) -> Tensor:
        """Slots of every head, as `lengths`, on the device."""
        return self.lengths.to(self.device)

    @cached_property
    def device_bounds(self) -> Tensor:
        """As `bounds`, int32 on the device, as kernels for sequences of different lengths want it."""
        return self.bounds.to(self.device, torch.int32)

    @cached_property
    def ends(self) -> Tensor:
        """One past the last slot of every head: (batch, kv_heads) int64 on the device."""
        return self.bounds[1:].view(self.lengths.shape).to(self.device)

    @property
    def filled(self) -> Tensor:
        """Which places of the padded form hold a slot: (batch, kv_heads, longest) bool."""
        return torch.arange(self.longest, device=self.device) >= self.longest - self.counts[..., None]

    def pad(self, flat: Tensor, empty: float = 0) -> Tensor:
        """Return the padded form of a flat tensor: (slots of all heads, …) -> (batch, kv_heads, longest, …)."""
        shape = (*self.lengths.shape, self.longest)
        if not self.longest:
            return flat.new_empty(*shape, *flat.shape[1:])
        # Counted back from a head's end. Before its first slot that finds another head's, which is overwritten.
        index = self.ends[..., None] + torch.arange(-self.longest, 0, device=self.device)
        padded = flat.index_select(0, index.clamp_(min=0).flatten()).view(*shape, *flat.shape[1:])
        filled = self.filled.view(*shape, *[1] * (flat.dim() - 1))
        return padded.masked_fill_(~filled, empty)

    def flatten(self, padded: Tensor) -> Tensor:
        """Return the flat form of a padded tensor: (batch, kv_heads, longest, …) -> (slots of all heads, …)."""
        heads = torch.arange(1, self.lengths.numel() + 1) * self.longest - self.bounds[1:]
        index = torch.arange(self.total) + heads.repeat_interleave(self.lengths.flatten())
        return padded.flatten(0, 2).index_select(0, index.to(self.device))

    def rows(self, index: Tensor) -> tuple[RaggedLayout, Tensor]:
        """Return the layout of the rows ``index`` (new_batch,), and which slots of a flat tensor are theirs."""
        index = index.cpu()
        layout = RaggedLayout(self.lengths[index], self.device)
        begins = self.bounds[:-1].view(self.lengths.shape)[index].flatten()
        # The n-th slot of a head is n after its begin, in the old tensor as in the new one.
        shift = (begins - layout.bounds[:-1]).repeat_interleave(layout.lengths.flatten())
        return layout, (torch.arange(layout.total) + shift).to(self.device)
