"""Memory: a memory matrix as a layer of a cache: its rows, what was observed of them, and the model's short window."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from evomem.errors import CacheError
from evomem.memory.explicit.matrix_rules import Write, latest, read, scan

WINDOW = ("window_keys", "window_values", "window_real")
TENSORS = (*WINDOW, "matrix", "frequency", "last_read", "last_written", "tail")
"""Attributes of a `MatrixLayer` that are its state, besides ``seen``; the batch is axis 0 of each.

A layer without a memory has those of the window only.
"""


@dataclass(frozen=True)
class Exchange:
    """What the tokens of a chunk see of a memory.

    Attributes
    ----------
    rows : (batch, heads, tokens, slots, width), the rows that each token sees; one token where all see the same.
    context : (batch, heads, tokens, width), what each has read, c.
    bias : (batch, heads, tokens, slots), added to the logits of attention to the rows: the log-decay of a slot, and
        minus infinity where a token does not see it. None: every token sees every row whole.
    """

    rows: Tensor
    context: Tensor
    bias: Tensor | None = None


class MatrixLayer(CacheLayerMixin):
    """The memory matrix of one layer, for every row and head, and the last tokens that its attention sees.

    Attributes
    ----------
    seen : tokens read so far, padding included.
    matrix : (batch, heads, slots, width) fp32, M.
    frequency : (batch, heads, slots) fp32, reads received: the sum of the weights softmax(M k_r) of all tokens.
    last_read, last_written : (batch, heads, slots) fp32, index of the token that read, and wrote, the slot last;
        softly where weights are soft (see `evomem.memory.explicit.matrix_rules.latest`); -1: none yet.
    window_keys, window_values : (batch, attention_heads, tokens, head_dim) of the window.
    window_real : (batch, tokens) bool, which tokens of the window are no padding.
    tail : (batch, reach, hidden), inputs of the last tokens, which later tokens' writes and reads look back to.
    """

    matrix: Tensor | None
    frequency: Tensor | None
    last_read: Tensor | None
    last_written: Tensor | None
    window_keys: Tensor | None
    window_values: Tensor | None
    window_real: Tensor | None
    tail: Tensor | None

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._forget()

    def _forget(self) -> None:
        self.seen = 0
        for name in TENSORS:
            setattr(self, name, None)
        self.is_initialized = False

    def reset(self) -> None:
        """Forget everything."""
        self._forget()

    def exchange(
        self, writes: Write, keys: Tensor, rule: str, decay: Tensor | None, initial: Tensor, real: Tensor | None
    ) -> Exchange:
        """Let the tokens of a chunk read, each before it writes.

        Parameters
        ----------
        writes, rule, decay, real : see `evomem.memory.explicit.matrix_rules.scan`.
        keys : (batch, heads, tokens, width), read keys.
        initial : (heads, slots, width), the matrix before the first token.
        """
        if self.matrix is None:
            self.begin(initial.expand(len(keys), -1, -1, -1))
        before, written, after = scan(self._begun(self.matrix), writes, rule, decay, real)
        context, weights = read(before, keys)
        weights = weights if real is None else weights * real[:, None, :, None]
        self.advance(after, written.detach(), weights.detach())
        return Exchange(before, context)

    def begin(self, matrix: Tensor) -> None:
        """Start with a matrix (batch, heads, slots, width) before the first token."""
        self.matrix = matrix
        self.frequency = matrix.new_zeros(matrix.shape[:-1])
        self.last_read = matrix.new_full(matrix.shape[:-1], -1.0)
        self.last_written = self.last_read

    def advance(self, matrix: Tensor, writes: Tensor, reads: Tensor) -> None:
        """Note the matrix after a chunk, and how strongly its tokens wrote and read: (batch, heads, tokens, slots)."""
        if self.frequency is None or self.last_read is None or self.last_written is None:
            raise CacheError("this memory matrix was not begun; begin(matrix) comes before advance")
        self.matrix = matrix
        self.frequency = self.frequency + reads.sum(2)
        self.last_read = latest(self.last_read, reads, self.seen)
        self.last_written = latest(self.last_written, writes.clamp(max=1), self.seen)

    def finish(self, tokens: int) -> None:
        """Note that a chunk of so many tokens has been read."""
        self.seen += tokens
        self.is_initialized = True

    @property
    def recency(self) -> Tensor:
        """(batch, heads, slots) fp32, steps since the last read; ``seen`` for a slot that was never read."""
        return self.seen - 1 - self._begun(self.last_read)

    @property
    def age(self) -> Tensor:
        """(batch, heads, slots) fp32, steps since the last write; ``seen`` for a slot that was never written."""
        return self.seen - 1 - self._begun(self.last_written)

    @staticmethod
    def _begun(tensor: Tensor | None) -> Tensor:
        if tensor is None:
            raise CacheError("nothing has been read yet: an empty memory matrix has no slots to look at")
        return tensor

    # ---- what transformers asks of a cache's layer ----------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the tensors come with the first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse; raises `CacheError`."""
        raise CacheError(
            "a memory matrix was given keys and values by another model; give every model a cache of its own"
        )

    def get_seq_length(self) -> int:
        """Tokens read so far, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all tokens read."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def crop(self, max_length: int) -> None:
        """Refuse to take tokens back; raises `CacheError`."""
        length = self.seen + max_length if max_length <= 0 else max_length
        if length < self.seen:
            raise CacheError(
                "a memory matrix cannot take tokens back: a write cannot be undone; copy the cache (copy.deepcopy) "
                "before tokens that may be taken back, and go on from the copy"
            )

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor; the batch is axis 0 of each."""
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

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor held, by name; not copies."""
        parts = {name: getattr(self, name) for name in TENSORS}
        return {name: part for name, part in parts.items() if part is not None}

    def nbytes(self) -> int:
        """Bytes of the tensors held; they do not grow with the tokens read once the window is full."""
        return sum(part.numel() * part.element_size() for part in self.tensors().values())


class MatrixCache(Cache):
    """The memory matrices of all layers: what a model with memory matrices sees as its `past_key_values`."""

    layers: list[MatrixLayer]  # type: ignore[assignment]
    max_cache_len = -1

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[MatrixLayer() for _ in range(layers)])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return self.layers[layer_idx].seen

    def nbytes(self) -> int:
        """Bytes of the tensors held, over all layers and rows."""
        return sum(layer.nbytes() for layer in self.layers)

    def require_whole(self) -> None:
        """Raise `CacheError` when an error or interruption cut a forward pass short, so that layers disagree."""
        if len({layer.seen for layer in self.layers}) > 1:
            raise CacheError(
                "a forward pass over this cache was cut short, so some layers read tokens that others did not; reset() "
                "it and read the text again"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that is held, by ``LAYER.NAME``; not copies. ``seen`` is a tensor () int64."""
        self.require_whole()
        named = {"seen": torch.tensor(self.get_seq_length())}
        for index, layer in enumerate(self.layers):
            named |= {f"{index}.{name}": tensor for name, tensor in layer.tensors().items()}
        return named

    def by_block(self, batch: int) -> list[MatrixLayer]:
        """Return what every layer of the model reads and writes."""
        return self.layers

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], layers: int) -> Self:
        """Return the cache that `tensors` describe; it goes on, to the bit, as the one that they were taken of.

        Raises
        ------
        CacheError : names or shapes that no cache of so many layers has.
        """
        cache, rest = cls(layers), dict(tensors)
        seen = rest.pop("seen", None)
        if seen is None or seen.shape or seen.dtype != torch.int64 or seen < 0:
            raise CacheError(
                "saved memory matrices: 'seen' is no count of tokens; the file is damaged or something else"
            )
        for index in range(layers):
            parts = {name: rest.pop(f"{index}.{name}") for name in TENSORS if f"{index}.{name}" in rest}
            cache.layers[index] = layer_of(index, parts, int(seen))
        if rest:
            raise CacheError(
                f"saved memory matrices: {min(rest)!r} belongs to no layer of this model, which has {layers}; load it "
                "with the model that it was saved with"
            )
        if len({len(layer.window_keys) for layer in cache.layers if layer.window_keys is not None}) > 1:
            raise CacheError("saved memory matrices: the layers have differently many rows; the file is damaged")
        return cache


def layer_of(index: int, parts: Mapping[str, Tensor], seen: int) -> MatrixLayer:
    """Return layer ``index`` with these tensors after ``seen`` tokens; raises `CacheError` where they do not fit."""
    _check(index, parts, seen)
    layer = MatrixLayer()
    for name, part in parts.items():
        setattr(layer, name, part)
    layer.seen, layer.is_initialized = seen, bool(parts)
    return layer


def _check(index: int, parts: Mapping[str, Tensor], seen: int) -> None:
    """Raise `CacheError` unless a layer's tensors fit each other and the number of tokens read."""
    where = f"saved memory matrices, layer {index}"
    if not seen and not parts:
        return
    names = TENSORS if parts.keys() - set(WINDOW) else WINDOW
    if missing := set(names) - parts.keys():
        raise CacheError(f"{where}: {min(missing)!r} is missing; the file is damaged")
    keys = parts["window_keys"]
    if keys.dim() != 4 or keys.shape[2] > seen:
        raise CacheError(
            f"{where}: 'window_keys' has shape {tuple(keys.shape)} after {seen} tokens; its axes are (batch, "
            "attention_heads, tokens, head_dim)"
        )
    batch, tokens = keys.shape[0], keys.shape[2]
    shapes = {"window_values": tuple(keys.shape), "window_real": (batch, tokens)}
    if "matrix" in parts:
        matrix = parts["matrix"]
        shapes |= dict.fromkeys(("frequency", "last_read", "last_written"), tuple(matrix.shape[:-1]))
        shapes |= {"matrix": (batch, *matrix.shape[1:4]), "tail": (batch, *parts["tail"].shape[1:3])}
    for name, shape in shapes.items():
        if tuple(parts[name].shape) != shape:
            raise CacheError(f"{where}: {name!r} has shape {tuple(parts[name].shape)} instead of {shape}")
    for name, tensor in parts.items():
        if (tensor.dtype == torch.bool) != (name == "window_real") or not bool(torch.isfinite(tensor).all()):
            raise CacheError(f"{where}: {name!r} is {tensor.dtype}, or holds what is no number; the file is damaged")
