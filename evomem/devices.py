"""Cache: tensors of layers that may lie on different devices, brought together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stacked(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Return what every layer gave as one tensor with a new axis ``dim``, on the first layer's device.

    A model that is too big for one device has layers on several. On one device nothing is copied and nobody waits.
    """
    device = parts[0].device
    return torch.stack([part.to(device) for part in parts], dim)
