"""Evaluation: runs candidates on samples and returns likelihood, exact score, retained bytes, tokens and seconds."""

from evomem.evaluation.evaluator import Evaluator
from evomem.evaluation.measurement import EXACT, LOGLIK, Evaluation, EvaluationProtocol, Measurement, Quantity
from evomem.evaluation.objectives import Objective, objectives, register_objective
from evomem.evaluation.population import PopulationPolicy
from evomem.evaluation.store import PrefillStore, Reading

__all__ = [
    "EXACT",
    "LOGLIK",
    "Evaluation",
    "EvaluationProtocol",
    "Evaluator",
    "Measurement",
    "Objective",
    "PopulationPolicy",
    "PrefillStore",
    "Quantity",
    "Reading",
    "objectives",
    "register_objective",
]
