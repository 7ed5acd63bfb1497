"""Memory: the cache of a model with a memory of its own, some of whose layers a manager decides about, and some not."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor

from evomem.memory.explicit.cache import ExplicitCache
from evomem.memory.explicit.cache_layer import TensorLayer, require_whole
from evomem.memory.explicit.layer import ExplicitLayer
from evomem.memory.explicit.reader import HasReader
from evomem.memory.kv.policy import CachePolicy

logger = logging.getLogger("evomem")


class DecidedCache(ExplicitCache, HasReader):
    """Layers that are decided about, and beside them layers that keep a few tensors of the text.

    Parameters
    ----------
    layers : those that are decided about.
    beside : the others, by number.
    policy : the manager.

    Attributes
    ----------
    interrupted : a forward pass over the cache has begun and not ended.
    reader : see `HasReader`.

    Class attributes
    ----------------
    beside_title : what the other layers are called in a state.
    """

    beside_title: ClassVar[str] = "beside"

    def __init__(self, layers: Sequence[ExplicitLayer], beside: Mapping[int, Any], policy: CachePolicy) -> None:
        super().__init__(layers, policy)
        self.beside: dict[int, Any] = dict(beside)
        self.interrupted, self.reader = False, None
        self._said_unasked = False

    def say_unasked(self, unit: str, size: int) -> None:
        """Warn, once, that a pass went on past a ``unit`` of ``size`` tokens about which nobody was asked to decide."""
        if not self._said_unasked:
            self._said_unasked = True
            logger.warning(
                "a %s of %d tokens ended within a pass and the manager was not asked: it has no `every`, so its cache "
                "decides when decide() is called; give every=%d, or read one %s at a time",
                unit, size, size, unit,
            )  # fmt: skip

    def copy_empty(self) -> DecidedCache:
        """Return an empty cache of the same kind; a subclass with arguments of its own overrides it."""
        raise NotImplementedError

    def fill_beside(self, layer: TensorLayer, number: int, tensors: Mapping[str, Tensor], seen: int) -> None:
        """Let a layer that nobody decides about hold what a state has of it.

        Raises
        ------
        CacheError : the tensors are not those of such a layer.
        """
        layer.fill(f"saved state, {self.beside_title} {number}", tensors, seen)

    def tensor_name(self, number: int, name: str) -> str:
        """Return what a tensor of a layer that nobody decides about is called in a state."""
        return f"{self.beside_title}.{number}.{name}"

    @property
    def parts(self) -> list[Any]:
        """Everything that has rows of the batch: layers, and those beside them."""
        return [*self.layers, *self.beside.values()]

    def expand_beside(self, rows: int) -> None:
        """Let the layers beside have ``rows`` rows, where they have read one for all of them."""
        for layer in self.beside.values():
            layer.expand_to(rows)

    def require_whole(self) -> None:
        """Raise `CacheError` when an error or interruption cut a forward pass short, so that layers disagree."""
        require_whole(self.interrupted, self.parts)

    def require_finished(self) -> None:
        """Raise `CacheError` when the last pass was cut short; asked where a block of ``manager.attach`` ends."""
        self.require_whole()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read a context in any number of passes; a manager without ``every`` decides when the block ends."""
        yield
        self.require_whole()
        if self.policy.schedule.every is None:
            self.decide()

    def reset(self) -> None:
        """Forget everything; the cache is as new."""
        super().reset()
        for layer in self.beside.values():
            layer.reset()
        self.interrupted, self.reader = False, None

    # ---- rows -----------------------------------------------------------------------------------------------------

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on as row ``beam_idx[i]``."""
        for part in self.parts:
            part.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        for part in self.parts:
            part.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        for part in self.parts:
            part.batch_repeat_interleave(repeats)

    # ---- measurements ---------------------------------------------------------------------------------------------

    def nbytes(self) -> int:
        """Bytes of the tensors held, over all layers and rows."""
        return super().nbytes() + self._nbytes_beside()

    def _nbytes_beside(self) -> int:
        return sum(layer.nbytes() for layer in self.beside.values())

    def bytes_by_row(self) -> Tensor:
        """Bytes that every row would hold in a cache of its own: (batch,) int64."""
        beside: int = sum(layer.bytes_per_row() for layer in self.beside.values())
        return super().bytes_by_row() + beside

    @property
    def bytes_peak(self) -> int:
        """The layers' peaks together."""
        return sum(layer.bytes_peak for layer in self.layers) + self._nbytes_beside()

    @property
    def bytes_mean(self) -> float:
        """Mean of the bytes held, over the tokens read."""
        return sum(layer.bytes_mean for layer in self.layers) + self._nbytes_beside()

    # ---- copies and state -----------------------------------------------------------------------------------------

    def clone(self) -> DecidedCache:
        """Return an independent continuation of this cache."""
        other = self.copy_empty()
        other.layers = [layer.clone() for layer in self.layers]
        other.beside = {number: layer.clone() for number, layer in self.beside.items()}
        other.interrupted, other.reader = self.interrupted, self.reader
        return other

    def state(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Return all that the cache is between two tokens.

        See `ExplicitCache.state`, `tensor_name`, and `HasReader.reader_tensors`.
        """
        self.require_whole()
        facts, tensors = super().state()
        tensors |= self.reader_tensors()
        for number, layer in self.beside.items():
            tensors |= {self.tensor_name(number, name): part for name, part in layer.tensors().items()}
        return facts, tensors

    def load_state(self, facts: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        """Go on, to the bit, as the cache that `state` was taken of.

        Raises
        ------
        CacheError : the state is of another number of layers, or no state of such memories.
        """
        names = {
            self.tensor_name(number, name): (number, name)
            for number, layer in self.beside.items()
            for name in layer.tensor_names
        }
        beside: dict[int, dict[str, Tensor]] = {number: {} for number in self.beside}
        reader, rest = self.parsed_reader(tensors.get("reader")), dict[str, Tensor]()
        for key, tensor in tensors.items():
            if key == "reader":
                continue
            if key in names:
                number, name = names[key]
                beside[number][name] = tensor
            else:
                rest[key] = tensor
        super().load_state(facts, rest)
        seen = self.get_seq_length()
        for number, layer in self.beside.items():
            layer.reset()
            self.fill_beside(layer, number, beside[number], seen)
        self.interrupted, self.reader = False, reader
