"""Manager: tokens drawn by lot, all alike or between two protected ends."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from evomem.bounds import SEED
from evomem.managers.base import MemoryManager, register
from evomem.managers.hashing import absorb, seeded, uniform
from evomem.managers.options import CountOrShare, ManagerOptions
from evomem.managers.selection import Ends
from evomem.memory.view import LayerView


class RandomOptions(ManagerOptions):
    """Options of `Random`."""

    seed: int = Field(default=0, le=SEED, ge=-SEED, description="another seed draws other tokens")
    sinks: CountOrShare = Field(
        default=0, description="tokens kept at the beginning: a whole number, or a share of the slots in [0, 1]"
    )
    recent: CountOrShare = Field(
        default=0, description="newest tokens that are kept: a whole number, or a share of the slots in [0, 1]"
    )


@register("random")
class Random(MemoryManager):
    """Keeps tokens drawn uniformly; the same seed always draws the same.

    Nothing is protected by default. With ``sinks`` and ``recent`` the ends of the text are kept, and the lot decides
    about what is between them (`evomem.managers.heuristics.protected_random`).

    The score is a hash of (seed, layer, head, the token's position in its own row), so it does not depend on the batch,
    on the order of evaluation, or on what was evicted before: at a later decision the lot of a token is the same.
    """

    Options = RandomOptions
    options: RandomOptions

    def make_ends(self) -> Ends:
        """The first and the newest tokens, by default none."""
        return Ends(self.options.sinks, self.options.recent)

    def score(self, view: LayerView) -> Tensor:
        """Return uniform numbers in [0, 1): (batch, kv_heads, slots) fp32."""
        heads = torch.arange(view.slots.shape[1], device=view.slots.device)[:, None]
        state = absorb(absorb(seeded(self.options.seed, heads), torch.full_like(heads, view.layer)), heads)
        return uniform(absorb(state, view.position))
