"""Memory: masks worked out from what the slots hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """Which tokens the queries of one call may attend to.

    Attributes
    ----------
    padding : (batch, tokens ever read) bool, True = real, or None when nothing is padded.
    window : width of the sliding window in tokens, or None.
    explicit : (1 or batch, 1 or kv_heads, queries, tokens ever read), bool or additive, or None for a causal mask. It
        includes the window, and hides the padding.
    """

    padding: Tensor | None = None
    window: int | None = None
    explicit: Tensor | None = None
    _known: dict[tuple[tuple[int, ...], str], bool] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device) -> Visibility:
        """Return the same on another device."""
        moved = [None if mask is None else mask.to(device) for mask in (self.padding, self.explicit)]
        return Visibility(moved[0], self.window, moved[1])

    def rows(self, queries: slice) -> Visibility:
        """Return the same for some of the queries."""
        if self.explicit is None:
            return self
        return Visibility(self.padding, self.window, self.explicit[:, :, queries])

    def hides_padding_only(self, starts: tuple[int, ...]) -> bool:
        """Whether ``padding`` hides what comes before every row's first real token, and nothing else.

        Worked out once a pass, for the layers of one device share this object, and ``starts`` is the same for all.
        """
        if self.padding is None:
            return True
        if (starts, "hides") not in self._known:
            first = torch.tensor(starts, device=self.padding.device)[:, None]
            real = torch.arange(self.padding.shape[1], device=self.padding.device) >= first
            self._known[starts, "hides"] = torch.equal(self.padding.bool(), real)
        return self._known[starts, "hides"]

    def seeing_themselves(self) -> Visibility:
        """Return the same, but that a query which an explicit mask lets look at nothing looks at itself."""
        if self.explicit is None:
            return self
        queries, tokens = self.explicit.shape[-2:]
        own = torch.ones(queries, tokens, dtype=torch.bool, device=self.explicit.device)
        own = own.tril(tokens - queries).triu(tokens - queries) & ~_seen(self.explicit).any(-1, keepdim=True)
        return Visibility(self.padding, self.window, torch.where(own, torch.ones_like(self.explicit), self.explicit))

    @cached_property
    def reaches(self) -> list[int] | None:
        """Per query, one past the last token that it or an earlier query may look at; None when that is itself."""
        if self.explicit is None:
            return None
        seen = _seen(self.explicit)
        queries, tokens = seen.shape[-2:]
        last = torch.where(seen, torch.arange(1, tokens + 1, device=seen.device), 0).amax(-1).amax((0, 1))
        own = torch.arange(tokens - queries + 1, tokens + 1, device=seen.device)
        reach: list[int] = torch.maximum(last, own).cummax(0).values.tolist()
        return reach


def causal_rows(first: int, queries: int, window: int | None, device: torch.device) -> Tensor:
    """Rows of a causal mask for ``queries`` tokens from ``first`` on: (1, 1, queries, first + queries) bool."""
    index = torch.arange(first, first + queries, device=device)[:, None]
    tokens = torch.arange(first + queries, device=device)
    rows = tokens <= index
    return (rows if window is None else rows & (tokens > index - window))[None, None]


def joined_rows(old: Tensor, new: Tensor) -> Tensor:
    """Rows of two explicit masks (batch, heads, queries, tokens) below each other: bool if both are, else additive.

    Tokens that only one of the two has are hidden from the other's queries.
    """
    if new.dtype != torch.bool or old.dtype != torch.bool:
        old, new = (m if m.dtype != torch.bool else torch.where(m, 0.0, -torch.inf) for m in (old, new))
        old, new = old.float(), new.float()
    heads, tokens = max(old.shape[1], new.shape[1]), max(old.shape[3], new.shape[3])
    hidden = False if old.dtype == torch.bool else -torch.inf
    wide = [F.pad(m, (0, tokens - m.shape[3]), value=hidden).expand(-1, heads, -1, -1) for m in (old, new)]
    return torch.cat(wide, 2)


def leading_padding(mask: Tensor) -> Tensor | None:
    """Return which tokens of a first input are real, (batch, tokens) bool, by its mask; None when all are.

    Padding is the tokens at the beginning that no other token looks at. One that looks at itself and nothing else is no
    padding, but a text of one token (packed texts).

    mask : (batch, heads, queries, tokens), bool or additive.
    """
    seen = _seen(mask)
    queries, tokens = seen.shape[-2:]
    if queries != tokens or tokens == 1:
        return None  # not a first input: what is padding was known then
    looked, own = seen.any(1), torch.eye(tokens, dtype=torch.bool, device=seen.device)
    alone = (looked & own).any(-1) & (looked.sum(-1) == 1)
    real = ((looked & ~own).any(1) | alone).cumsum(-1) > 0
    return None if bool(real.all()) else real | ~real.any(-1, keepdim=True)


def _seen(mask: Tensor) -> Tensor:
    """Where an explicit mask lets a query look."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def slot_mask(
    slots: Tensor,
    index: Tensor,
    *,
    uniform: bool = False,
    decays: Tensor | None = None,
    window: int | None = None,
    padding: Tensor | None = None,
    real: Tensor | None = None,
    explicit: Tensor | None = None,
) -> Tensor:
    """Which slots every query may attend to.

    Parameters
    ----------
    slots : (batch, kv_heads, slots) int64, token index held, -1 = empty.
    index : (queries,) int64, token index of the queries.
    uniform : all rows and heads hold the same, so one mask does for all.
    decays : (batch, kv_heads, slots) log-decay to be added, or None.
    window : sliding window, in tokens.
    padding : (batch, tokens ever read) bool, True = visible now. It may hide a token that was visible when it was read.
    real : (batch, queries) bool, which queries are no padding; None when all are.
    explicit : (1 or batch, 1 or kv_heads, queries, tokens ever read), bool or additive: what the model's own mask says,
        instead of causality, ``window`` and ``padding``.

    Returns
    -------
    (1 or batch, 1 or kv_heads, queries, slots): bool, or with decays or an additive mask additive fp32 (-inf where not
    allowed).
    """
    if explicit is not None:
        return _gathered(explicit, slots, uniform=uniform, decays=decays)
    index = index[:, None]
    token = slots[:1, :1, None] if uniform else slots[:, :, None]
    allowed = (token >= 0) & (token <= index)
    if window is not None:
        allowed = allowed & (token > index - window)
    if padding is not None:
        allowed = allowed & _visible(slots, padding)[:, :, None]
        if real is not None:
            # A padded query sees everything: its output is never used, but it must be finite.
            allowed = allowed | ~real[:, None, :, None]
    if decays is None:
        return allowed
    return torch.where(allowed, decays[:, :, None], -torch.inf)


def _gathered(explicit: Tensor, slots: Tensor, *, uniform: bool, decays: Tensor | None) -> Tensor:
    """An explicit mask at the tokens that the slots hold."""
    if uniform:
        gathered = explicit[..., : slots.shape[2]]
        valid = torch.ones((), dtype=torch.bool, device=slots.device)
    else:
        batch, kv_heads, count = slots.shape
        shape = (batch, kv_heads, explicit.shape[2])
        index = slots.clamp(min=0)[:, :, None].expand(*shape, count)
        gathered = explicit.expand(*shape, explicit.shape[3]).gather(3, index)
        valid = (slots >= 0)[:, :, None]
    if explicit.dtype == torch.bool and decays is None:
        return gathered & valid
    bias = gathered.float() if explicit.dtype != torch.bool else torch.where(gathered, 0.0, -torch.inf)
    return torch.where(valid, bias if decays is None else bias + decays[:, :, None], -torch.inf)


def hides(slots: Tensor, padding: Tensor) -> bool:
    """Whether ``padding`` (batch, tokens ever read) hides a token that the slots (batch, kv_heads, slots) hold."""
    return not bool((_visible(slots, padding) | (slots < 0)).all())


def _visible(slots: Tensor, padding: Tensor) -> Tensor:
    return padding[:, None].expand(-1, slots.shape[1], -1).gather(2, slots.clamp(min=0))
