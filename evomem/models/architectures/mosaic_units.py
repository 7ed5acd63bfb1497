"""Model: the units of a Memory Mosaic: keys, values, contextual memories of pairs read so far, persistent ones.

Sources and what v1 and v2 are: `evomem.models.architectures.mosaic_memory`. Scales are learned through exponentials
with the factors of the authors' code, so that a learning rate means the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomem.models.architectures.mosaic_cache import Pairs, Reach, UnitMemory
from evomem.models.architectures.mosaic_decided import DecidedPairs
from evomem.models.architectures.mosaic_memory import bandwidth, leaky_average, precise, unit_norm

Memory = UnitMemory | DecidedPairs
"""What a unit keeps of a text."""

RATE = 10.0
"""Factor of learned exponents: a parameter θ stands for exp(RATE θ), as in the authors' code."""


def per_head(x: Tensor, heads: int) -> Tensor:
    """Return x (batch, tokens, heads * dim) as (batch, heads, tokens, dim)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


class LeakyKeys(nn.Module):
    """Keys of v1: normalised leaky averages of projected tokens, with one decay per head (equation 7).

    Attributes
    ----------
    projection : W_φ.
    decay : (heads,), θ; a head's λ is exp(-|10 θ|). They begin between .6 and .007.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projection = nn.Linear(width, width, bias=False)
        self.decay = nn.Parameter(torch.linspace(0.5, 5.0, heads) / RATE)

    def forward(self, x: Tensor, real: Tensor | None, memory: Memory) -> Tensor:
        """Return keys (batch, heads, tokens, dim) of length 1, and let the memory keep the last average.

        x : (batch, tokens, width). real : (batch, tokens) bool, or None: no token is padding.
        """
        return _averaged(per_head(self.projection(x), self.heads), self.log_decay(x), real, memory).to(x.dtype)

    def log_decay(self, x: Tensor) -> Tensor:
        """Return log λ: (1, heads, 1) in fp32."""
        return -(RATE * precise(self.decay)).abs()[None, :, None]


class GatedKeys(nn.Module):
    """Keys of v2: the leaky average's input is gated, and its decay depends on the token (equation 5).

    Attributes
    ----------
    projection : W_φ.
    gate : W_g; a token's projected key counts exp(W_g x) times.
    decay : W_λ; what was before counts exp(-|W_λ x|) times.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projection = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, heads, bias=False)
        self.decay = nn.Linear(width, heads, bias=False)

    def forward(self, x: Tensor, real: Tensor | None, memory: Memory) -> Tensor:
        """Return keys as `LeakyKeys` does."""
        gates = precise(self.gate(x)).exp().transpose(1, 2)[..., None]
        gated = gates * precise(per_head(self.projection(x), self.heads))
        return _averaged(gated, self.log_decay(x), real, memory).to(x.dtype)

    def log_decay(self, x: Tensor) -> Tensor:
        """Return log λ of every token: (batch, heads, tokens) in fp32."""
        return -precise(self.decay(x)).abs().transpose(1, 2)


def _averaged(inputs: Tensor, log_decay: Tensor, real: Tensor | None, memory: Memory) -> Tensor:
    """Return normalised leaky averages of inputs (batch, heads, tokens, dim), in fp32 or finer."""
    inputs = precise(inputs)
    if real is not None:
        inputs = inputs * real[:, None, :, None]  # padding comes first, where the average is still zero
    before = inputs.new_zeros(inputs.shape[0], *inputs.shape[1::2]) if memory.average is None else memory.average
    averages, memory.average = leaky_average(inputs, log_decay, before)
    return unit_norm(averages)


class PeekingValues(nn.Module):
    """Values that know the token after their key's: α Norm(γ ṽ_t + (1 - γ) ṽ_{t+1}) (equation 6 of v2).

    v1 writes ṽ_t + λ_ψ ṽ_{t+1}; after the norm the two are the same for λ_ψ = (1 - γ) / γ, and the authors' code of v1
    has γ, too.

    Attributes
    ----------
    projection : the matrix of ṽ.
    share : (heads,), γ. They begin evenly spread over (0, 1), where the authors' code draws them.
    scale : (heads,), θ; α is exp(10 θ).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projection = nn.Linear(width, width, bias=False)
        self.share = nn.Parameter((torch.arange(heads) + 0.5) / heads)
        self.scale = nn.Parameter(torch.full((heads,), -0.5 / RATE))

    def projected(self, x: Tensor) -> Tensor:
        """Return ṽ of every token: x (batch, tokens, width) -> (batch, heads, tokens, dim)."""
        return per_head(self.projection(x), self.heads)

    def values(self, now: Tensor, after: Tensor) -> Tensor:
        """Return values of pairs from the ṽ of their tokens and of the next: (batch, heads, pairs, dim) each."""
        share, scale = (precise(part)[:, None, None] for part in (self.share, self.scale))
        mixed = share * precise(now) + (1 - share) * precise(after)
        return ((RATE * scale).exp() * unit_norm(mixed)).to(now.dtype)


class FixedBandwidth(nn.Module):
    """β of v1: the square of the keys' scale exp(min(10 θ, 5)), which both a query and a stored key have."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((heads,), 1.0 / RATE))

    def forward(self, pairs: Tensor) -> Tensor:
        """Return β: (1, heads, 1), the same for any number of pairs."""
        return (2 * (RATE * precise(self.scale)).clamp(max=5)).exp()[None, :, None]


class AdaptiveBandwidth(nn.Module):
    """β of v2, which grows with the number n of pairs: β1 n^α + β0 (equation 3).

    Attributes
    ----------
    slope, offset : (heads,), θ; β1 and β0 are exp(min(θ, 10)).
    power : (heads,), θ; α is min(|θ|, 1).
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.slope, self.offset = (nn.Parameter(torch.full((heads,), 1.5)) for _ in range(2))
        self.power = nn.Parameter(torch.full((heads,), 1 / 3))

    def forward(self, pairs: Tensor) -> Tensor:
        """Return β: pairs (batch, heads or 1, tokens) -> (batch, heads, tokens)."""
        slope, offset = (precise(part).clamp(max=10).exp() for part in (self.slope, self.offset))
        return bandwidth(pairs, slope, offset, precise(self.power).abs().clamp(max=1))


class ContextualUnit(nn.Module):
    """A memory of the pairs that a text has shown so far.

    y_T = Σ_i softmax(β k_T·k_i) v_i over pairs i at least ``nearest`` and at most ``farthest`` tokens back. A query is
    the token's own key. A value peeks one token ahead, so the pair of the newest token is not there yet: nothing
    before token T changes when T is read.

    Attributes
    ----------
    nearest, farthest : see `evomem.models.architectures.mosaic_memory.readable`.
    drawn_nearest : in training every pass draws between ``nearest`` and this.
    dropout : share of the pairs that a query overlooks in training.
    """

    def __init__(self, keys: nn.Module, values: PeekingValues, bandwidth: nn.Module, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.keys, self.values, self.bandwidth, self.dropout = keys, values, bandwidth, dropout
        self.nearest, self.drawn_nearest = 1, 1
        self.farthest: int | None = None

    def forward(self, x: Tensor, real: Tensor | None, memory: Memory) -> Tensor:
        """Read tokens; return what the memory says at each: (batch, tokens, width).

        Parameters
        ----------
        x : (batch, tokens, width).
        real : (batch, tokens) bool, or None: no token is padding.
        memory : what the unit knows of the tokens before; it is given what it knows afterwards.
        """
        queries = self.keys(x, real, memory)
        pairs = self._pairs(queries, self.values.projected(x), real, memory)
        reach = Reach(self._nearest(), self.farthest)
        y = memory.exchange(pairs, queries, reach, self.bandwidth, real, self.dropout * self.training)
        memory.finish(x.shape[1])
        if self.farthest is not None:
            memory.forget_beyond(self.farthest)
        return y.transpose(1, 2).flatten(2)

    def _nearest(self) -> int:
        if not self.training or self.drawn_nearest <= self.nearest:
            return self.nearest
        return int(torch.randint(self.nearest, self.drawn_nearest + 1, ()))

    def _pairs(self, keys: Tensor, projected: Tensor, real: Tensor | None, memory: Memory) -> Pairs:
        """Return pairs of all tokens whose next one is known now: keys and projected (batch, heads, tokens, dim)."""
        batch, _, tokens, _ = keys.shape
        if real is None:
            real = torch.ones(batch, tokens, dtype=torch.bool, device=keys.device)
        newest = (keys[:, :, -1], projected[:, :, -1], real[:, -1])
        first = memory.seen
        if memory.next_key is not None and memory.next_value is not None and memory.next_real is not None:
            keys = torch.cat((memory.next_key[:, :, None], keys), 2)
            projected = torch.cat((memory.next_value[:, :, None], projected), 2)
            real = torch.cat((memory.next_real[:, None], real), 1)
            first -= 1
        memory.next_key, memory.next_value, memory.next_real = newest
        values = self.values.values(projected[:, :, :-1], projected[:, :, 1:])
        return Pairs(keys[:, :, :-1], values, first, real[:, :-1])


class PersistentUnit(nn.Module):
    """A memory of learned pairs, v1's place for what does not depend on the text.

    Attributes
    ----------
    keys : of queries, averaged as a contextual unit's are.
    stored_keys, stored_values : (heads, pairs, dim); the keys have no fixed length.
    key_scale, scale : (heads,), θ of β = exp(min(20 θ, 5)), and of the factor exp(10 θ) of what is read.
    """

    def __init__(self, width: int, heads: int, pairs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.keys = LeakyKeys(width, heads)
        self.dropout = dropout
        dim = width // heads
        self.stored_keys, self.stored_values = (nn.Parameter(torch.empty(heads, pairs, dim)) for _ in range(2))
        self.key_scale = nn.Parameter(torch.full((heads,), 1.0 / RATE))
        self.scale = nn.Parameter(torch.full((heads,), -0.5 / RATE))

    def forward(self, x: Tensor, real: Tensor | None, memory: Memory) -> Tensor:
        """Read tokens, as a `ContextualUnit` does."""
        queries = self.keys(x, real, memory)
        batch, heads, tokens, dim = queries.shape
        beta = (2 * RATE * precise(self.key_scale)).clamp(max=5).exp()
        values = (RATE * precise(self.scale)).exp()[:, None, None] * precise(self.stored_values)
        # All rows read the same pairs: as queries of one row, which the fused kernel is made for.
        read = F.scaled_dot_product_attention(
            (precise(queries) * beta[:, None, None]).transpose(0, 1).reshape(1, heads, batch * tokens, dim),
            precise(self.stored_keys)[None],
            values[None],
            dropout_p=self.dropout * self.training,
            scale=1.0,
        )
        memory.finish(tokens)
        return read.reshape(heads, batch, tokens, dim).permute(1, 2, 0, 3).flatten(2).to(x.dtype)


class GatedPersistentUnit(nn.Module):
    """v2's persistent memory: a SwiGLU, down(silu(gate x) * up x). It keeps nothing of the text."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, size, bias=False) for _ in range(2))
        self.down = nn.Linear(size, width, bias=False)

    def forward(self, x: Tensor, real: Tensor | None, memory: Memory) -> Tensor:
        """Return (batch, tokens, width) of tokens x (batch, tokens, width); see `ContextualUnit.forward`."""
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y
