"""Evaluation: where it happens; in this process, or elsewhere."""

from evomem.workers.base import Outcome, Unit, WorkerPool
from evomem.workers.local import LocalPool

__all__ = ["LocalPool", "Outcome", "Unit", "WorkerPool"]
