"""Run: who is told how a search goes."""

from evomem.tracking.base import GenerationRecord, Tracker, Trackers
from evomem.tracking.jsonl import JsonlTracker
from evomem.tracking.terminal import TerminalTracker

__all__ = ["GenerationRecord", "JsonlTracker", "TerminalTracker", "Tracker", "Trackers"]
