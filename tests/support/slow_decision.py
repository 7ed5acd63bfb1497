"""Which slots a decision keeps, in Python numbers and sets, after the documentation alone.

score → admit → limits(allocation) → protect → best, for one row at a time: the slow way for every allocation. Shares
are exact fractions, so that what is rounded is rounded where the documentation says so and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

LARGEST = 3.4028234663852886e38


@dataclass(frozen=True)
class Head:
    """One KV head of one row.

    Attributes
    ----------
    tokens : index of every slot's token within the row, padding not counted, ascending.
    scores : of the slots; larger is kept.
    stored : of the slots, whether the token may stay: no for a fresh one that was refused.
    """

    tokens: list[int]
    scores: list[float]
    stored: list[bool]

    @property
    def may_stay(self) -> list[int]:
        """Indices of the slots that a decision is about, the oldest first."""
        return [slot for slot, stored in enumerate(self.stored) if stored]


@dataclass(frozen=True)
class Protected:
    """Tokens at a row's ends that come before all others: `Ends` in plain numbers."""

    sinks: int | float = 0
    recent: int | float = 0
    recent_share: float = 1.0

    def among(self, slots: int) -> tuple[int, int]:
        """Return how many of the oldest and of the newest tokens are protected where a head has so many slots."""
        sinks = part(self.sinks, slots) if isinstance(self.sinks, float) else min(self.sinks, slots)
        recent = part(self.recent, slots) if isinstance(self.recent, float) else self.recent
        return sinks, min(recent, part(self.recent_share, slots), slots - sinks)

    def of(self, head: Head, slots: int, read: int) -> set[int]:
        """Return the head's protected slots."""
        sinks, recent = self.among(slots)
        return {slot for slot in head.may_stay if head.tokens[slot] < sinks or head.tokens[slot] >= read - recent}

    @property
    def least(self) -> int:
        """Slots that a head needs for its ends, and one more; an end that is a share of the slots fits."""
        fits = isinstance(self.recent, float) or self.recent_share < 1
        return (0 if isinstance(self.sinks, float) else self.sinks) + (0 if fits else int(self.recent)) + 1


def written(share: float) -> Fraction:
    """Return the number that somebody wrote: .1 is a tenth, and not the nearest double."""
    return Fraction(repr(share))


def part(share: float, slots: int) -> int:
    """Return a share of some slots, rounded down."""
    return math.floor(written(float(share)) * slots)


def slots_of(budget: int | float | None, read: int) -> int:
    """Return the slots per head of a budget; a share of the tokens read is rounded up."""
    if budget is None:
        return read
    return math.ceil(written(budget) * read) if isinstance(budget, float) else budget


# ---- shares --------------------------------------------------------------------------------------------------------


def running(shares: Sequence[Fraction]) -> list[int]:
    """Round by the running sum, halves up, so that the sum stays what it is."""
    total, before, rounded = Fraction(0), 0, []
    for share in shares:
        total += share
        until = math.floor(total + Fraction(1, 2))
        rounded.append(until - before)
        before = until
    return rounded


def clamped(weights: Sequence[Fraction], least: Sequence[int], most: Sequence[int], total: int) -> list[int]:
    """Return clamp(λ w, least, most), rounded by the running sum, with the λ that makes the sum ``total``.

    The sum grows with λ and is linear between two kinks, so λ lies between two neighbouring kinks.
    """
    if total >= sum(most):
        return list(most)

    def at(factor: Fraction) -> list[Fraction]:
        return [min(max(factor * w, Fraction(a)), Fraction(b)) for w, a, b in zip(weights, least, most, strict=True)]

    kinks = {Fraction(0)} | {Fraction(x) / w for w, *ends in zip(weights, least, most, strict=True) if w for x in ends}
    below = max((kink for kink in kinks if sum(at(kink)) <= total), default=Fraction(0))
    above = min((kink for kink in kinks if sum(at(kink)) > total), default=below)
    low, high = sum(at(below)), sum(at(above))
    factor = below if low == high else below + (above - below) * (total - low) / (high - low)
    return running(at(factor))


def at_depth(knots: Sequence[float], layer: int, layers: int) -> float:
    """Return a function, linear between equally spaced knots over the depth, at one layer."""
    if len(knots) == 1 or layers == 1:
        return knots[0]
    where = layer / (layers - 1) * (len(knots) - 1)
    below = min(int(where), len(knots) - 2)
    return knots[below] + (where - below) * (knots[below + 1] - knots[below])


def weights_of(logs: Sequence[float]) -> list[Fraction]:
    """Return exp of log-shares over their sum."""
    top = max(logs)
    parts = [Fraction(math.exp(log - top)) for log in logs]
    return [one / sum(parts) for one in parts]


# ---- allocations over layers ---------------------------------------------------------------------------------------

Options = Mapping[str, Any]


def over_layers(
    name: str, options: Options, mean: int, read: int, layers: int, ends: Protected, logs: Sequence[float] | None
) -> list[int]:
    """Return the slots that a head of every layer has on average."""
    if name == "uniform":
        return [mean] * layers
    if name == "across_heads":
        inner = options["layers"]
        return over_layers(inner["name"], inner["options"], mean, read, layers, ends, logs)
    if name == "pyramid":
        shares = pyramid(mean, read, layers, options["beta"], options["window"], ends)
        weights = [Fraction(share) for share in shares]
    else:
        assert name == "depth_shares"
        knots = logs if logs is not None else options["log_shares"] or [0.0] * options["points"]
        weights = weights_of([at_depth(knots, layer, layers) for layer in range(layers)])
        shares = running([weight * mean * layers for weight in weights])
    low, high = min(ends.least, mean), max(read, mean)
    if all(low <= share <= high for share in shares):
        return shares
    return clamped(weights, [low] * layers, [high] * layers, mean * layers)


def pyramid(mean: int, read: int, layers: int, beta: float, window: int | None, ends: Protected) -> list[int]:
    """Return PyramidKV's budgets: linear in depth, symmetric about the mean, and whole."""
    window = ends.among(mean)[1] if window is None else window
    last = max(Fraction(mean) / Fraction(beta), Fraction(1))
    first = 2 * mean - last
    if first >= read - window:
        first = Fraction(read - window)
        last = 2 * mean - first
    if first < mean:  # upside down
        first = last = Fraction(mean)
    shares = [mean] * layers
    for layer in range(layers // 2):
        step = (first - last) / (layers - 1)
        shares[layer] = math.floor(first - layer * step + Fraction(1, 2))
        shares[layers - 1 - layer] = 2 * mean - shares[layer]
    return shares


# ---- allocations over heads ----------------------------------------------------------------------------------------


def order(head: Head, first: set[int]) -> list[int]:
    """Return the slots that may stay in the order in which they are kept; of equal scores the older token is first."""

    def key(slot: int) -> tuple[bool, float, int]:
        score = head.scores[slot]
        score = -LARGEST if math.isnan(score) else min(max(score, -LARGEST), LARGEST)
        return slot not in first, 0.0 if slot in first else -score, head.tokens[slot]

    return sorted(head.may_stay, key=key)


def across_heads(heads: Sequence[Head], n: int, safeguard: float, ends: Protected, read: int) -> list[set[int]]:
    """Return what one ranking over the heads of a layer keeps; every head is sure of its best."""
    ranked, certain = [], part(safeguard, n)
    for number, head in enumerate(heads):
        first = ends.of(head, n, read)
        for rank, slot in enumerate(order(head, first)):
            score = head.scores[slot]
            score = -LARGEST if math.isnan(score) else min(max(score, -LARGEST), LARGEST)
            protected = slot in first
            group = 0 if protected or rank < certain else 1
            ranked.append((group, -score if group else 0.0, head.tokens[slot] if group else 0, number, slot))
    kept: list[set[int]] = [set() for _ in heads]
    for *_, number, slot in sorted(ranked)[: n * len(heads)]:
        kept[number].add(slot)
    return kept


def across_layers(
    layers: Sequence[Sequence[Head]], mean: int, safeguard: float, ends: Protected, read: int
) -> list[list[set[int]]]:
    """Return what one ranking over the heads of all layers keeps: all of them are the heads of one layer."""
    flat = iter(across_heads([head for layer in layers for head in layer], mean, safeguard, ends, read))
    return [[next(flat) for _ in layer] for layer in layers]


def per_head(
    heads: Sequence[Sequence[Head]], logs: Sequence[Sequence[float]], mean: int, ends: Protected
) -> list[list[int]]:
    """Return every head's slots by the softmax of log-shares (layers, heads) over all heads of all layers."""
    held = [len(head.may_stay) for layer in heads for head in layer]
    sure = [min(ends.least, mean, count) for count in held]
    weights = weights_of([log for layer in logs for log in layer])
    more = clamped(
        weights, [0] * len(held), [h - s for h, s in zip(held, sure, strict=True)],
        mean * len(held) - sum(sure),
    )  # fmt: skip
    slots = iter(s + m for s, m in zip(sure, more, strict=True))
    return [[next(slots) for _ in layer] for layer in heads]


def threshold(head: Head, cap: int, ends: Protected, read: int) -> set[int]:
    """Return the newest slot and, up to the cap, the protected ones and the best of scores from zero on."""
    newest = [slot for slot in head.may_stay if head.tokens[slot] == read - 1]
    first = ends.of(head, cap, read)
    others = [slot for slot in order(head, first) if slot not in newest]
    return {*newest, *(s for s in others[: cap - len(newest)] if s in first or head.scores[s] >= 0)}


# ---- the decision --------------------------------------------------------------------------------------------------


def decide(
    heads: Sequence[Sequence[Head]],
    read: int,
    budget: int | float | None,
    ends: Protected,
    allocation: Mapping[str, Any],
    logs: Any = None,
) -> list[list[set[int]]]:
    """Return the slots that every head of every layer of one row keeps.

    Parameters
    ----------
    heads : (layers, heads).
    read : tokens of its own that the row has read.
    allocation : ``{"name": ..., "options": ...}`` as `Allocation.describe` gives it.
    logs : learned log-shares: (points,) of ``depth_shares``, (layers, heads) of ``per_head_shares``.
    """
    name, options, layers = allocation["name"], allocation["options"], len(heads)
    mean = slots_of(budget, read)
    if name == "threshold":
        cap = slots_of(options["cap"] if budget is None else budget, read)
        return [[threshold(head, cap, ends, read) for head in layer] for layer in heads]
    if name == "across_layers":
        return across_layers(heads, mean, options["safeguard"], ends, read)
    if name == "per_head_shares":
        counts = per_head(heads, logs, mean, ends)
        return [
            [set(order(head, ends.of(head, n, read))[:n]) for head, n in zip(layer, slots, strict=True)]
            for layer, slots in zip(heads, counts, strict=True)
        ]
    kept, means = [], over_layers(name, options, mean, read, layers, ends, logs)
    for layer, n in zip(heads, means, strict=True):
        if name == "across_heads" and options["safeguard"] < 1:  # 1 shares nothing
            kept.append(across_heads(layer, n, options["safeguard"], ends, read))
        else:
            kept.append([set(order(head, ends.of(head, n, read))[:n]) for head in layer])
    return kept
