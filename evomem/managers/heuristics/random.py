"""Manager: tokens drawn by lot, the floor that every other manager must beat."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from evomem.bounds import SEED
from evomem.managers.base import MemoryManager, register
from evomem.managers.hashing import absorb, seeded, uniform
from evomem.managers.options import ManagerOptions
from evomem.memory.view import LayerView


class RandomOptions(ManagerOptions):
    """Options of `Random`."""

    seed: int = Field(default=0, le=SEED, ge=-SEED, description="another seed draws other tokens")


@register("random")
class Random(MemoryManager):
    """Keeps tokens drawn uniformly; the same seed always draws the same.

    The score is a hash of (seed, layer, head, the token's position in its own row), so it does not depend on the batch,
    on the order of evaluation, or on what was evicted before: at a later decision the lot of a token is the same.
    """

    Options = RandomOptions
    options: RandomOptions

    def score(self, view: LayerView) -> Tensor:
        """Return uniform numbers in [0, 1): (batch, kv_heads, slots) fp32."""
        heads = torch.arange(view.slots.shape[1], device=view.slots.device)[:, None]
        state = absorb(absorb(seeded(self.options.seed, heads), torch.full_like(heads, view.layer)), heads)
        return uniform(absorb(state, view.position))
