"""Evaluation: where it happens; in this process, or elsewhere."""

from evomem.workers.base import Evaluate, Outcome, Recipe, Unit, WorkerOptions, WorkerPool
from evomem.workers.local import LocalPool

__all__ = ["Evaluate", "LocalPool", "Outcome", "Recipe", "Unit", "WorkerOptions", "WorkerPool"]
