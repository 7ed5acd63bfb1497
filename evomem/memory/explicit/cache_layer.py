"""Memory: a layer of a cache that only its own model reads: what transformers calls on it, answered or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from evomem.errors import CacheError
from evomem.memory.explicit.reader import HasReader
from evomem.memory.kv.layer_memory import CountedLayer


class MemoryCacheLayer(CountedLayer):  # type: ignore[no-untyped-call]
    """A layer of a cache that no attention of transformers reads or writes.

    Attributes
    ----------
    seen : tokens read so far, padding included.

    Class attributes
    ----------------
    title : the memory's name in messages, with an article.
    not_undone : why tokens that were read cannot be taken back.
    """

    title: ClassVar[str] = "an explicit memory"
    not_undone: ClassVar[str] = "what it was before they were read is not kept"
    is_sliding = False
    is_croppable = False
    seen: int

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: tensors come with what is written."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse; raises `CacheError`: what a model of transformers hands over here is to be attended to whole."""
        raise CacheError(
            f"{self.title} was given the keys and values of another model's attention; give every model a cache of its "
            "own"
        )

    def crop(self, max_length: int) -> None:
        """Refuse to take tokens back; raises `CacheError`.

        max_length : tokens that are to stay; or, not above 0, minus the number of those that are to leave.
        """
        length = self.seen + int(max_length) if max_length <= 0 else int(max_length)
        if length < self.seen:
            raise CacheError(
                f"{self.title} cannot take tokens back: {self.not_undone}; copy the cache (copy.deepcopy) before "
                "tokens that may be taken back, and go on from the copy"
            )


class TensorLayer(MemoryCacheLayer):  # type: ignore[no-untyped-call]
    """A layer that is a few tensors of fixed names, about which nobody decides.

    Class attributes
    ----------------
    tensor_names : names of the tensors, attributes of the layer; the batch is axis 0 of each. None before the first
        token, and where a layer has no use for one.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.seen = 0
        for name in self.tensor_names:
            setattr(self, name, None)
        self.is_initialized = False

    def finish(self, tokens: int) -> None:
        """Note that a chunk of so many tokens has been read."""
        self.seen += tokens
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor held, by name; not copies."""
        return named_tensors(self, self.tensor_names)

    def fill(self, where: str, tensors: Mapping[str, Tensor], seen: int) -> None:
        """Hold these tensors after ``seen`` tokens; ``where`` names the layer in messages.

        Raises
        ------
        CacheError : see `check`.
        """
        self.check(where, tensors, seen)
        for name, part in tensors.items():
            setattr(self, name, part)
        self.seen, self.is_initialized = seen, bool(tensors)

    def check(self, where: str, tensors: Mapping[str, Tensor], seen: int) -> None:
        """Raise `CacheError` unless tensors fit each other and the number of tokens read."""

    @property
    def rows(self) -> int | None:
        """Rows of the batch; None before the first token."""
        return next((len(part) for part in self.tensors().values()), None)

    def expand_to(self, rows: int) -> None:
        """Let the only row become ``rows`` equal ones, if there is one row."""
        if self.rows == 1 < rows:
            self.map(lambda part: part.expand(rows, *part.shape[1:]))

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor."""
        for name, tensor in self.tensors().items():
            setattr(self, name, change(tensor))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on as row ``beam_idx[i]``."""
        self.map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, (rows,) int64 or bool."""
        self.map(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(part.numel() * part.element_size() for part in self.tensors().values())

    def bytes_per_row(self) -> int:
        """Bytes of one row."""
        return sum(part.shape[1:].numel() * part.element_size() for part in self.tensors().values())

    def clone(self) -> Self:
        """Return an independent continuation; the tensors, which are never written to, are shared."""
        return copy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.clone()  # tensors of a pass with gradients have no deep copy


class TensorCache(Cache, HasReader):
    """What a model keeps of a text where nobody decides: one `TensorLayer` a layer.

    Attributes
    ----------
    interrupted : a forward pass over the cache has begun and not ended.
    reader : see `HasReader`.

    Class attributes
    ----------------
    saved_title, layer_title : names of a saved cache, and of a layer, in messages.
    """

    layers: list[Any]
    max_cache_len = -1
    saved_title: ClassVar[str]
    layer_title: ClassVar[str] = "layer"

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self.interrupted = False
        self.reader = None

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.layers:
            layer.reset()
        self.interrupted, self.reader = False, None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        seen: int = self.layers[layer_idx].seen
        return seen

    def nbytes(self) -> int:
        """Bytes of the tensors held, over all layers and rows."""
        return sum(layer.nbytes() for layer in self.layers)

    def require_whole(self) -> None:
        """Raise `CacheError` when an error or interruption cut a forward pass short, so that layers disagree."""
        require_whole(self.interrupted, self.layers)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that is held, by ``LAYER.NAME``; not copies.

        ``seen`` is a tensor () int64; beside it is `HasReader.reader_tensors`.
        """
        self.require_whole()
        named = {"seen": torch.tensor(self.get_seq_length())} | self.reader_tensors()
        for index, layer in enumerate(self.layers):
            named |= {f"{index}.{name}": tensor for name, tensor in layer.tensors().items()}
        return named

    def fill(self, tensors: Mapping[str, Tensor]) -> Self:
        """Hold what `tensors` describe, and return the cache; it goes on to the bit as the one they were taken of.

        Raises
        ------
        CacheError : names or shapes that no cache of so many layers has.
        """
        title, one, rest = self.saved_title, self.layer_title, dict(tensors)
        seen = rest.pop("seen", None)
        if seen is None or seen.shape or seen.dtype != torch.int64 or seen < 0:
            raise CacheError(f"{title}: 'seen' is no count of tokens; the file is damaged or something else")
        reader = self.parsed_reader(rest.pop("reader", None))
        for index, layer in enumerate(self.layers):
            parts = {name: rest.pop(f"{index}.{name}") for name in layer.tensor_names if f"{index}.{name}" in rest}
            layer.fill(f"{title}, {one} {index}", parts, int(seen))
        if rest:
            raise CacheError(
                f"{title}: {min(rest)!r} belongs to no {one} of this model, which has {len(self.layers)}; load it with "
                "the model that it was saved with"
            )
        if len({layer.rows for layer in self.layers} - {None}) > 1:
            raise CacheError(f"{title}: the {one}s have differently many rows; the file is damaged")
        self.reader = reader
        return self


def require_whole(interrupted: bool, layers: list[Any]) -> None:
    """Raise `CacheError` when an error or interruption cut a forward pass short, so that layers disagree."""
    if interrupted or len({layer.seen for layer in layers}) > 1:
        raise CacheError(
            "a forward pass over this cache was cut short, so some layers read tokens that others did not; reset() it "
            "and read the text again"
        )


def named_tensors(layer: object, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the attributes of these names that are tensors already."""
    parts = {name: getattr(layer, name) for name in names}
    return {name: part for name, part in parts.items() if part is not None}


def require_shapes(where: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `CacheError` unless saved tensors have these shapes; ``where`` names the layer in messages."""
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise CacheError(f"{where}: {name!r} has shape {tuple(tensors[name].shape)} instead of {shape}")


def require_numbers(where: str, tensors: Mapping[str, Tensor], types: Mapping[str, torch.dtype]) -> None:
    """Raise `CacheError` unless saved tensors are finite, and of these types or, all others, of floating point."""
    for name, tensor in tensors.items():
        right = tensor.dtype == types[name] if name in types else tensor.is_floating_point()
        if not right or not bool(torch.isfinite(tensor).all()):
            raise CacheError(f"{where}: {name!r} is {tensor.dtype}, or holds what is no number; the file is damaged")
