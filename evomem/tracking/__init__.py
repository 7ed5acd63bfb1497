"""Tracking: who is told how a search goes."""

from evomem.tracking.base import GenerationRecord, Tracker, Trackers
from evomem.tracking.build import build_tracker, build_trackers
from evomem.tracking.jsonl import JsonlTracker
from evomem.tracking.replay import replay
from evomem.tracking.tensorboard import TensorBoardTracker
from evomem.tracking.terminal import TerminalTracker
from evomem.tracking.weights_and_biases import WandbTracker

__all__ = [
    "GenerationRecord",
    "JsonlTracker",
    "TensorBoardTracker",
    "TerminalTracker",
    "Tracker",
    "Trackers",
    "WandbTracker",
    "build_tracker",
    "build_trackers",
    "replay",
]
