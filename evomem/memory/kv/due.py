"""Memory: when a decision is due, and whether it is about one layer or about all.

Both the cache and the evaluator ask here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from evomem.errors import CacheError, UnsupportedModelError
from evomem.memory.view import Decision, LayerView

if TYPE_CHECKING:
    from evomem.memory.kv.policy import CachePolicy


def turns(begin: int, count: int, starts: Sequence[int], every: int | None) -> Iterator[tuple[int, list[bool]]]:
    """Cut ``count`` new tokens, the first of index ``begin``, wherever a row has read another ``every`` of its own.

    ``starts`` are the indices of the rows' first real tokens. Yields (tokens up to the cut, which rows decide there);
    what follows the last decision comes with no row. Without ``every`` nothing is cut and nobody decides.
    """
    if every is None:
        yield count, [False] * len(starts)
        return
    firsts = {(start - begin) % every or every for start in starts}
    cuts = {cut for first in firsts for cut in range(first, count + 1, every)} | {count}
    for cut in sorted(cuts):
        read = [begin + cut - start for start in starts]
        rows = [own > 0 and own % every == 0 for own in read]
        if any(rows) or cut == count:
            yield cut, rows


def fell_due(begin: int, count: int, starts: Sequence[int], every: int) -> list[bool]:
    """Return which rows have their turn anywhere in ``count`` new tokens, for a decision that waits for their end."""
    return [any(rows) for rows in zip(*(rows for _, rows in turns(begin, count, starts, every)), strict=True)]


def needs_all_layers(policy: object) -> bool:
    """Whether a policy decides about all layers at once (``whole_model``)."""
    return bool(getattr(policy, "whole_model", False))


def check_heads(policy: object, counts: Iterable[int]) -> None:
    """Raise `UnsupportedModelError` where layers with different numbers of heads get different parts of a budget.

    Such a policy (``layers_differ``) works out every layer's slots per head from its depth, as if all layers had
    as many heads. Where they have not, the slots of all heads would not add up to the budget.

    Parameters
    ----------
    counts : KV heads of the layers, as far as they are known.
    """
    heads = sorted(set(counts))
    if len(heads) > 1 and getattr(policy, "layers_differ", False):
        name = getattr(policy, "name", type(policy).__name__)
        raise UnsupportedModelError(
            f"manager {name!r} gives layers different parts of its budget by their depth, and layers of this model "
            f"have {' and '.join(map(str, heads))} KV heads, so that the slots of all heads would not add up to the "
            "budget; take allocation=uniform, across_heads, or one that sees all layers: per_head_shares, cake, lava"
        )


def decisions(policy: CachePolicy, views: Sequence[LayerView]) -> Iterable[Decision]:
    """Return the decisions about all layers: one after the other as they are asked for, or all at once.

    Raises `UnsupportedModelError`, see `check_heads`.
    """
    check_heads(policy, (view.slots.shape[1] for view in views))
    return decide_all(policy, views) if needs_all_layers(policy) else map(policy.decide, views)


def decide_all(policy: Any, views: Sequence[LayerView]) -> list[Decision]:
    """Return what a policy that needs all layers decides.

    Raises
    ------
    CacheError : it returned another number of decisions than there are layers.
    """
    made = list(policy.decide_all(views))
    if len(made) != len(views):
        name = getattr(policy, "name", type(policy).__name__)
        raise CacheError(f"manager {name!r}: decide_all returned {len(made)} decisions about {len(views)} layers")
    return made
