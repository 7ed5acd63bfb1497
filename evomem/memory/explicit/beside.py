"""Memory: an explicit memory that keeps, beside its slots, tensors of the rows: a window, an average, half a pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.memory.explicit.cache_layer import named_tensors
from evomem.memory.explicit.layer import ExplicitLayer


class LayerWithTensors(ExplicitLayer):  # type: ignore[no-untyped-call]
    """An explicit memory with further tensors, which are there as soon as something was read.

    Attributes
    ----------
    beside_names : names of the tensors, attributes of the layer; the batch is axis 0 of each. None before the first
        token.
    beside_optional : those that a memory may have no use for, and that stay None.
    """

    beside_names: ClassVar[tuple[str, ...]] = ()
    beside_optional: ClassVar[frozenset[str]] = frozenset()

    def reset(self) -> None:
        """Forget everything; the memory is as new."""
        super().reset()
        for name in self.beside_names:
            setattr(self, name, None)

    def beside(self) -> dict[str, Tensor]:
        """Return the tensors that are none of the slots', by name."""
        return named_tensors(self, self.beside_names)

    def note_padding(self, real: Tensor) -> None:
        """Move the beginning of rows that have read nothing but padding behind the padding of a chunk.

        real : (batch, tokens) bool.
        """
        padding = (~real).long().cumprod(1).sum(1)
        self.start = torch.where(self.start == self.seen, self.start + padding, self.start)
        self.starts = tuple(self.start.tolist())

    def finish(self, tokens: int) -> None:
        """Note that a chunk of so many tokens has been read."""
        before = self.nbytes()
        self.seen += tokens
        self._read += tokens
        self.is_initialized = True
        self.note_bytes(before, tokens)

    def select_rows(self, index: Tensor) -> None:
        """Rows ``index`` (new_batch,) of everything held."""
        if self.seen:
            super().select_rows(index)
            for name, part in self.beside().items():
                setattr(self, name, part.index_select(0, torch.as_tensor(index, device=part.device)))

    def expand(self, rows: int) -> None:
        """Let the only row become ``rows`` equal ones."""
        super().expand(rows)
        for name, part in self.beside().items():
            setattr(self, name, part.expand(rows, *part.shape[1:]))

    def nbytes(self) -> int:
        """Bytes of every tensor held now, those beside the slots included."""
        return super().nbytes() + sum(part.numel() * part.element_size() for part in self.beside().values())

    def bytes_by_row(self) -> Tensor:
        """Bytes that every row holds, as it would in a memory of its own: (batch,) int64."""
        beside = sum(part.shape[1:].numel() * part.element_size() for part in self.beside().values())
        return super().bytes_by_row() + beside

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return all that the memory is between two tokens; see `ExplicitLayer.state`."""
        facts, tensors = super().state()
        return facts, tensors | self.beside()

    def load_state(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on, to the bit, as the memory that `state` was taken of.

        Raises
        ------
        CacheError : see `ExplicitLayer.load_state`; or a tensor beside the slots is missing, or has other rows.
        """
        beside = {name: tensor for name, tensor in tensors.items() if name in self.beside_names}
        if facts.get("seen") and (absent := set(self.beside_names) - self.beside_optional - beside.keys()):
            missing = min(absent)
            raise CacheError(f"state of {self.title}: {missing!r} is missing; save it again")
        super().load_state(facts, {name: tensor for name, tensor in tensors.items() if name not in beside})
        for name, tensor in beside.items():
            if len(tensor) != len(self.starts):
                raise CacheError(
                    f"state of {self.title}: {name!r} has {len(tensor)} rows instead of {len(self.starts)}"
                )
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CacheError(f"state of {self.title}: {name!r} holds what is no number; the file is damaged")
            setattr(self, name, tensor)
