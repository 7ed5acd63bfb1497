"""Memory: the explicit memories of all layers, what a model that has them sees as its cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from evomem.devices import stacked
from evomem.errors import CacheError
from evomem.memory.explicit.layer import ExplicitLayer
from evomem.memory.kv.attention import full_precision
from evomem.memory.kv.due import decisions, needs_all_layers
from evomem.memory.kv.policy import CachePolicy
from evomem.memory.observations import Wanted
from evomem.memory.view import Decision


class ExplicitCache(Cache):
    """Explicit memories, one a layer, and the manager that decides about them.

    The model, or whoever feeds the layers, asks `decide` when the manager's schedule says so.

    Parameters
    ----------
    layers : the memories; they record what the manager observes.
    policy : the manager.

    Raises
    ------
    CacheError : there is no memory, or the memories do not record what the manager observes.
    """

    layers: list[ExplicitLayer]  # type: ignore[assignment]
    max_cache_len = -1
    model: None = None
    """The cache does not know which model it is of; whoever saves it says so."""

    def __init__(self, layers: Sequence[ExplicitLayer], policy: CachePolicy) -> None:
        self.policy = policy
        if not layers:
            raise CacheError("a cache of no memories has nothing to decide about; give at least one")
        missing = policy.observes - frozenset.intersection(*(layer.observes for layer in layers))
        if missing:
            raise CacheError(
                f"the manager observes {', '.join(sorted(missing))}, and the memories do not record it; make them with "
                "observes=manager.observes"
            )
        super().__init__(layers=list(layers))

    @property
    def wanted(self) -> Wanted:
        """The observations that the memories record."""
        return self.layers[0].wanted

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def whole_model(self) -> bool:
        """Whether the manager decides about all layers at once."""
        return needs_all_layers(self.policy)

    def decide(self) -> None:
        """Let the manager decide about every layer now.

        Raises
        ------
        CacheError : nothing was read, or layers have read differently many tokens.
        """
        for layer, decision in zip(self.layers, self.decisions(), strict=True):
            layer.apply(decision)

    def decisions(self) -> list[Decision]:
        """Return what the manager says about every layer now; see `decide`."""
        if len({layer.seen for layer in self.layers}) > 1:
            raise CacheError("layers have read differently many tokens; feed all of them before a decision")
        views = [layer.view() for layer in self.layers]
        with full_precision(views[0].keys):
            return list(decisions(self.policy, views))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return self.layers[layer_idx].seen

    def reset(self) -> None:
        """Forget everything; the cache is as new."""
        for layer in self.layers:
            layer.reset()

    # ---- measurements ---------------------------------------------------------------------------------------------

    def nbytes(self) -> int:
        """Bytes of the tensors held now, over all layers and rows."""
        return sum(layer.nbytes() for layer in self.layers)

    def bytes_by_row(self) -> Tensor:
        """Bytes that every row would hold in a cache of its own: (batch,) int64."""
        return stacked([layer.bytes_by_row() for layer in self.layers]).sum(0)

    def slots_held(self) -> list[Tensor]:
        """Slots that are filled, per layer: (batch, heads)."""
        return [layer.counts() for layer in self.layers]

    # ---- copies and state -----------------------------------------------------------------------------------------

    def clone(self) -> ExplicitCache:
        """Return an independent continuation of this cache."""
        return type(self)([layer.clone() for layer in self.layers], self.policy)

    def __copy__(self) -> ExplicitCache:
        return self.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> ExplicitCache:
        return self.clone()

    def state(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Return all that the memories are between two tokens: plain values a layer, and tensors by ``LAYER.NAME``."""
        facts, tensors = [], dict[str, Tensor]()
        for layer in self.layers:
            own, named = layer.state()
            facts.append(own)
            tensors |= {f"{layer.index}.{name}": tensor for name, tensor in named.items()}
        return facts, tensors

    def load_state(self, facts: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        """Go on, to the bit, as the cache that `state` was taken of.

        Raises
        ------
        CacheError : the state is of another number of layers, or no state of such memories.
        """
        if not isinstance(facts, list) or not all(isinstance(own, dict) for own in facts) or len(facts) != self.depth:
            raise CacheError(f"a state of other layers than the {self.depth} of this cache")
        named: list[dict[str, Tensor]] = [{} for _ in self.layers]
        for name, tensor in tensors.items():
            number, _, rest = name.partition(".")
            if not (number.isascii() and number.isdecimal() and len(number) < 9 and int(number) < self.depth):
                raise CacheError(f"state: {name!r} is a tensor of no layer")
            named[int(number)][rest] = tensor
        for layer, own, parts in zip(self.layers, facts, named, strict=True):
            layer.load_state(own, parts)
