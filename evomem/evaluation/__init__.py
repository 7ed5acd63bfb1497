"""Evaluation: runs candidates on samples and returns likelihood, exact score, retained bytes, tokens and seconds."""

from evomem.evaluation.evaluator import Evaluator
from evomem.evaluation.population import PopulationPolicy
from evomem.evaluation.store import PrefillStore, Reading
from evomem.evaluation.types import Evaluation, EvaluationProtocol

__all__ = ["Evaluation", "EvaluationProtocol", "Evaluator", "PopulationPolicy", "PrefillStore", "Reading"]
