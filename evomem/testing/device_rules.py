"""Testing: what CUDA asks of the tensors of an operation, and which operations the processor has to wait for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

aten: Any = torch.ops.aten

ANYWHERE = {aten.copy_, aten._to_copy, aten.set_, aten.lift_fresh}
"""Operations whose tensors may lie on different devices."""
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
"""Operations that take indices from the processor."""
SCALARS = {aten.masked_fill, aten.masked_fill_, aten.fill_, aten.fill, aten.where, aten.index_put, aten.index_put_}
"""Operations, besides the pointwise ones, that take a number (a tensor without axes) from the processor."""
WAITING = {
    aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.is_nonzero, aten._unique2,
    aten.unique_dim, aten.unique_consecutive,
}  # fmt: skip
"""Operations whose result, or the shape of it, the processor has to wait for."""
RESHAPING = {aten.resize_, aten.set_, aten.t_, aten.transpose_, aten.unsqueeze_, aten.squeeze_, aten.as_strided_}
"""Operations that change a tensor's shape in its place."""


@dataclass(frozen=True)
class Operation:
    """What is to be known of an operation.

    Attributes
    ----------
    writes : it writes to an argument.
    views : it returns a view of an argument.
    pointwise : it treats every element alone, so that it takes numbers from the processor.
    """

    writes: bool
    views: bool
    pointwise: bool

    @classmethod
    @cache
    def of(cls, func: Any) -> Self:
        """Return what PyTorch's schema of the operation says, read once per operation."""
        returned = [result.alias_info for result in func._schema.returns]
        return cls(
            any(
                argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments
            ),
            any(alias is not None and not alias.is_write for alias in returned),
            torch.Tag.pointwise in func.tags,
        )


def check_one_device(func: Any, operation: Operation, args: Sequence[Any], tensors: list[Tensor]) -> None:
    """Raise `RuntimeError` where CUDA would: tensors of several devices meet."""
    packet = func.overloadpacket
    if packet in INDEXING:
        whole = args[0].device
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        if any(index.device not in (whole, torch.device("cpu")) for index in indices):
            raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor ({whole})")
        tensors = [tensor for tensor in tensors if not any(tensor is index for index in indices)]
    numbers = operation.pointwise or packet in SCALARS
    devices = {t.device for t in tensors if not (numbers and t.device.type == "cpu" and t.dim() == 0)}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {names}! (in {func})"
        )
