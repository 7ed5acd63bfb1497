"""Manager: looks at a layer's slots and decides: store, evict, forget."""

from evomem.managers.allocation import (
    Allocation,
    EmergentAllocation,
    HeadProbes,
    LayerAllocation,
    ModelAllocation,
    ProbedAllocation,
    allocations,
    build_allocation,
    head_probes,
    register_allocation,
)
from evomem.managers.allocation.per_head_shares import PerHeadShares
from evomem.managers.base import MemoryManager, managers, register
from evomem.managers.build import build, names, parse, summary
from evomem.managers.heuristics.adakv import AdaKV
from evomem.managers.heuristics.cake import CakeKV
from evomem.managers.heuristics.evicted_rows import EvictedRows
from evomem.managers.heuristics.expected_attention import ExpectedAttention
from evomem.managers.heuristics.full import Full
from evomem.managers.heuristics.h2o import H2O
from evomem.managers.heuristics.keydiff import KeyDiff
from evomem.managers.heuristics.knorm import KNorm
from evomem.managers.heuristics.kvzip import KVzip
from evomem.managers.heuristics.lava import LavaKV
from evomem.managers.heuristics.observed_attention import ObservedAttention
from evomem.managers.heuristics.protected_random import ProtectedRandom
from evomem.managers.heuristics.pyramidkv import PyramidKV
from evomem.managers.heuristics.random import Random
from evomem.managers.heuristics.refit import Refit
from evomem.managers.heuristics.replacement import FIFO, LFU, LRU, SlotRelevance
from evomem.managers.heuristics.snapkv import SnapKV
from evomem.managers.heuristics.streaming_llm import StreamingLLM
from evomem.managers.heuristics.tova import TOVA
from evomem.managers.heuristics.tri_attention import TriAttention
from evomem.managers.learned.feature_scorer import FeatureScorer
from evomem.managers.learned.kv_policy import KVPolicy
from evomem.managers.learned.namm import NAMM
from evomem.managers.learned.retention_gate import RetentionGate
from evomem.managers.learned.surprise_gate import SurpriseGate
from evomem.managers.learned.write_gate import WriteGate
from evomem.managers.options import ManagerOptions, Schedule
from evomem.managers.reallocation import Reallocated, reallocate
from evomem.managers.stochastic import StochasticManager

__all__ = [
    "FIFO",
    "H2O",
    "LFU",
    "LRU",
    "NAMM",
    "TOVA",
    "AdaKV",
    "Allocation",
    "CakeKV",
    "EmergentAllocation",
    "EvictedRows",
    "ExpectedAttention",
    "FeatureScorer",
    "Full",
    "HeadProbes",
    "KNorm",
    "KVPolicy",
    "KVzip",
    "KeyDiff",
    "LavaKV",
    "LayerAllocation",
    "ManagerOptions",
    "MemoryManager",
    "ModelAllocation",
    "ObservedAttention",
    "PerHeadShares",
    "ProbedAllocation",
    "ProtectedRandom",
    "PyramidKV",
    "Random",
    "Reallocated",
    "Refit",
    "RetentionGate",
    "Schedule",
    "SlotRelevance",
    "SnapKV",
    "StochasticManager",
    "StreamingLLM",
    "SurpriseGate",
    "TriAttention",
    "WriteGate",
    "allocations",
    "build",
    "build_allocation",
    "head_probes",
    "managers",
    "names",
    "parse",
    "reallocate",
    "register",
    "register_allocation",
    "summary",
]
