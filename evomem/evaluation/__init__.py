"""Evaluation: runs candidates on samples and returns likelihood, exact score, retained bytes, tokens and seconds."""

from evomem.evaluation.evaluator import Evaluator
from evomem.evaluation.measurement import Evaluation, EvaluationProtocol
from evomem.evaluation.population import PopulationPolicy
from evomem.evaluation.store import PrefillStore, Reading

__all__ = ["Evaluation", "EvaluationProtocol", "Evaluator", "PopulationPolicy", "PrefillStore", "Reading"]
