"""Workers: where evaluation happens, in this process or elsewhere."""

from evomem.workers.local import LocalPool
from evomem.workers.units import Evaluate, Outcome, Recipe, Unit, WorkerOptions, WorkerPool

__all__ = ["Evaluate", "LocalPool", "Outcome", "Recipe", "Unit", "WorkerOptions", "WorkerPool"]
