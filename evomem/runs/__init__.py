"""Run: one search on disk."""

from evomem.runs.bench import Bench, BenchFactory, CandidateEvaluator, model_bench
from evomem.runs.config import ExperimentConfig
from evomem.runs.experiment_file import load_experiment, parse_experiment
from evomem.runs.result import RunResult, Score
from evomem.runs.run import Run, open_run
from evomem.runs.search import search

__all__ = [
    "Bench",
    "BenchFactory",
    "CandidateEvaluator",
    "ExperimentConfig",
    "Run",
    "RunResult",
    "Score",
    "load_experiment",
    "model_bench",
    "open_run",
    "parse_experiment",
    "search",
]
