"""Evaluation: objectives, one a file, and the measures that they need."""

from evomem.evaluation.objectives.attention import Attention
from evomem.evaluation.objectives.base import Objective, make, objectives, register_objective
from evomem.evaluation.objectives.evolkv import EvolKVLikelihood, EvolKVScore
from evomem.evaluation.objectives.exact import Exact
from evomem.evaluation.objectives.expected_cost import ExpectedCost
from evomem.evaluation.objectives.loglik import Loglik
from evomem.evaluation.objectives.trace_cost import TraceCost

__all__ = [
    "Attention",
    "EvolKVLikelihood",
    "EvolKVScore",
    "Exact",
    "ExpectedCost",
    "Loglik",
    "Objective",
    "TraceCost",
    "make",
    "objectives",
    "register_objective",
]
