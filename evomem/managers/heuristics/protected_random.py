"""Manager: tokens drawn by lot between two protected ends: the floor that a manager must beat."""

from __future__ import annotations

from pydantic import Field

from evomem.managers.base import register
from evomem.managers.heuristics.random import Random, RandomOptions
from evomem.managers.options import CountOrShare


class ProtectedRandomOptions(RandomOptions):
    """Options of `ProtectedRandom`: those of `Random`, with a tenth of the slots at each end."""

    sinks: CountOrShare = Field(
        default=0.1, description="tokens kept at the beginning: a whole number, or a share of the slots in [0, 1]"
    )
    recent: CountOrShare = Field(
        default=0.1, description="newest tokens that are kept: a whole number, or a share of the slots in [0, 1]"
    )


@register("protected_random")
class ProtectedRandom(Random):
    """Keeps the first and the newest tokens, a tenth of the slots each, and tokens drawn uniformly between them.

    The draws are those of `Random`. Fewer than ten slots have no whole tenth: nothing is protected, and it is `Random`.
    One of the three trivial managers whose best is the floor of a comparison (`evomem.evaluation.rows.TRIVIAL`):
    attention sinks and recent tokens cost no knowledge of the text, and without them a lot loses what every model
    needs, so that beating it says little.
    """

    Options = ProtectedRandomOptions
    options: ProtectedRandomOptions
