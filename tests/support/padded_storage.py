"""The slots of one layer as they were stored before heads paid for their own: padded to the longest of the layer."""

from __future__ import annotations

import torch
from torch import Tensor

from evomem.memory.kv.storage import SlotStorage
from evomem.memory.observations import Recorder


class PaddedStorage(SlotStorage):
    """The slow path: nothing is ever flat; shorter heads have empty slots in front, and masks hide them."""

    def keep(self, mask: Tensor, recorder: Recorder) -> None:
        """Gather every head's kept slots to the right, zero what is left of the others."""
        mask = mask & (self.even["slots"] >= 0)
        if bool(mask.all()):
            return
        counts = mask.sum(-1, keepdim=True)
        longest = int(counts.max())
        index = torch.sort(mask.to(torch.uint8), dim=-1, stable=True).indices[..., mask.shape[-1] - longest :]
        filled = torch.arange(longest) >= longest - counts

        def change(_: Tensor | None, even: Tensor) -> tuple[None, Tensor]:
            wide = index.view(*index.shape, *[1] * (even.dim() - 3)).expand(*index.shape, *even.shape[3:])
            return None, even.gather(2, wide)

        self._change(change, recorder)
        self.dense, self.padded = False, not bool(filled.all())
        self.even["slots"] = torch.where(filled, self.even["slots"], -1)
        for name in ("keys", "values"):
            self.even[name] = self.even[name].masked_fill(~filled[..., None], 0)

    def settle(self, recorder: Recorder) -> None:
        """Let empty slots stay."""

    def copy(self) -> PaddedStorage:
        """Return a storage of the same tensors."""
        other = PaddedStorage()
        vars(other).update(vars(self) | {"even": dict(self.even)})
        return other
