"""Cache: where in a run of new tokens which rows have their turn to decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def turns(begin: int, count: int, starts: Sequence[int], every: int) -> Iterator[tuple[int, list[bool]]]:
    """Cut ``count`` new tokens, the first of index ``begin``, wherever a row has read another ``every`` of its own.

    ``starts`` are the indices of the rows' first real tokens. Yields (tokens up to the cut, which rows decide there);
    what follows the last decision comes with no row.
    """
    firsts = {(start - begin) % every or every for start in starts}
    cuts = {cut for first in firsts for cut in range(first, count + 1, every)} | {count}
    for cut in sorted(cuts):
        read = [begin + cut - start for start in starts]
        rows = [own > 0 and own % every == 0 for own in read]
        if any(rows) or cut == count:
            yield cut, rows
