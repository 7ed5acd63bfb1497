"""Manager: attention that queries to come are expected to pay."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from evomem.bounds import LARGE, TOKENS
from evomem.managers.base import MemoryManager, register
from evomem.managers.options import ManagerOptions
from evomem.managers.selection import Ends
from evomem.memory.view import LayerView


class ExpectedAttentionOptions(ManagerOptions):
    """Options of `ExpectedAttention`."""

    epsilon: float = Field(
        default=0.02, ge=0, le=LARGE, description="added to the expected attention before the value's norm"
    )
    sinks: int = Field(default=4, ge=0, le=TOKENS, description="tokens kept at the beginning")


@register("expected_attention")
class ExpectedAttention(MemoryManager):
    """Keeps what queries to come will attend to, by their statistics (Devoto et al., arXiv 2510.00636).

    Queries to come are taken as Gaussian with the mean μ and covariance Σ of the queries so far before rotation, turned
    by the mean rotation R̄ of the next positions. Then E[exp(q·k/√d)] = exp(z) with

        z_i = k_iᵀ R̄ μ / √d + k_iᵀ R̄ Σ R̄ᵀ k_i / (2 d),    s_i = (mean_G softmax_i(z) + ε) ‖v_i‖₂.

    The sinks are kept and take no part in the softmax: they would take nearly all of it.
    """

    Options = ExpectedAttentionOptions
    options: ExpectedAttentionOptions

    @property
    def observes(self) -> frozenset[str]:
        """Mean and covariance of the queries, and the mean rotation to come."""
        return frozenset({"query_statistics"})

    def make_ends(self) -> Ends:
        """The sinks."""
        return Ends(sinks=self.options.sinks)

    def score(self, view: LayerView) -> Tensor:
        """Return s_i: (batch, kv_heads, slots) fp32."""
        keys = view.keys.float()
        batch, heads, _, dim = keys.shape
        rotation = view.recorded["future_rotation"].float().expand(batch, dim, dim)
        mean = view.recorded["query_mean"].float() @ rotation.mT
        turned = rotation[:, None]
        covariance = turned @ view.recorded["query_covariance"].float() @ turned.mT
        # Query head h reads KV head h // G.
        mean = mean.reshape(batch, heads, -1, dim)
        covariance = covariance.reshape(batch, heads, -1, dim, dim)
        linear = mean @ keys.mT
        k = keys[:, :, None]
        quadratic = ((k @ covariance) * k).sum(-1)
        z = linear / math.sqrt(dim) + quadratic / (2 * dim)
        counted = view.valid & (view.position >= self.options.sinks)
        # The smallest number instead of -inf: a head that holds nothing but sinks would give NaN.
        z = torch.where(counted[:, :, None], z, torch.finfo(z.dtype).min)
        expected = torch.softmax(z, dim=-1).mean(2)
        length: Tensor = torch.linalg.vector_norm(view.values.float(), dim=-1)
        return (expected + self.options.epsilon) * length
