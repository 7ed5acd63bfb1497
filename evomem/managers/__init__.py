"""Manager: looks at a layer's slots and decides: store, evict, forget."""

from evomem.managers.adakv import AdaKV
from evomem.managers.base import ManagerOptions, MemoryManager, Schedule, managers, register
from evomem.managers.build import build, names, parse, summary
from evomem.managers.expected_attention import ExpectedAttention
from evomem.managers.feature_scorer import FeatureScorer
from evomem.managers.full import Full
from evomem.managers.h2o import H2O
from evomem.managers.keydiff import KeyDiff
from evomem.managers.knorm import KNorm
from evomem.managers.kv_policy import KVPolicy
from evomem.managers.namm import NAMM
from evomem.managers.observed_attention import ObservedAttention
from evomem.managers.pyramidkv import PyramidKV
from evomem.managers.random import Random
from evomem.managers.snapkv import SnapKV
from evomem.managers.stochastic import StochasticManager
from evomem.managers.streaming_llm import StreamingLLM
from evomem.managers.tova import TOVA

__all__ = [
    "H2O",
    "NAMM",
    "TOVA",
    "AdaKV",
    "ExpectedAttention",
    "FeatureScorer",
    "Full",
    "KNorm",
    "KVPolicy",
    "KeyDiff",
    "ManagerOptions",
    "MemoryManager",
    "ObservedAttention",
    "PyramidKV",
    "Random",
    "Schedule",
    "SnapKV",
    "StochasticManager",
    "StreamingLLM",
    "build",
    "managers",
    "names",
    "parse",
    "register",
    "summary",
]
