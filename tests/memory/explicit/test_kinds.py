"""Every kind of explicit memory is held to one kit, with one scorer over the observations that all of them have."""

from __future__ import annotations

import pytest
import torch

from evomem.managers import build
from evomem.models.architectures.fam import Fam, FamConfig
from evomem.models.architectures.memory_matrix import MemoryMatrix, MemoryMatrixConfig
from evomem.models.architectures.mosaic import MemoryMosaic, MosaicConfig
from evomem.models.architectures.titans import Titans, TitansConfig
from evomem.testing.memories import CHECKS, Subject

ROWS, TOKENS, VOCABULARY = 3, 30, 20
IDS = torch.randint(2, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
SHARED = "['recency', 'frequency', 'frequency_decayed:8', 'relevance:4', 'novelty', 'age']"
BY_RATE = "lru(allocation=by_distinct_rate(window=4))"
BY_WRITES = "lru(allocation=by_effective_writes)"
SPECS = (f"feature_scorer(features={SHARED}, sinks=0, recent=1)", "h2o")


def matrix():
    return MemoryMatrix(
        MemoryMatrixConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_attention_heads=4, intermediate_size=24, window=4,
            matrix_slots=5, matrix_width=6, matrix_heads=2, initializer_range=0.4,
        )
    )  # fmt: skip


def mosaic():
    return MemoryMosaic(
        MosaicConfig(
            form="v2", vocab_size=VOCABULARY, hidden_size=16, num_attention_heads=2, persistent_size=8, short_window=8,
            long_delay=3, longest_delay=3, initializer_range=0.4,
        )
    )  # fmt: skip


def feedback():
    """Its block ends at the kit's first decision of the second half, at which every check has come to deciding."""
    return Fam(
        FamConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_attention_heads=2, intermediate_size=24, block=TOKENS // 2 + 3,
            feedback=6, initializer_range=0.4,
        )
    )  # fmt: skip


def neural():
    """Its segment ends where the block of `feedback` does, for the same reason."""
    return Titans(
        TitansConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_attention_heads=2, intermediate_size=24, memory_heads=2,
            segment=TOKENS // 2 + 3, initializer_range=0.4,
        )
    )  # fmt: skip


def subject_of(make):
    """Return an untrained model of a kind, as the checks take it."""
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)

    def feed(cache, rows, begin, end):
        with torch.no_grad():
            model(IDS[list(rows), begin:end], past_key_values=cache)

    return Subject(model.decided_cache, feed, ROWS, TOKENS)


@pytest.fixture(scope="module", params=[matrix, mosaic, feedback], ids=["matrix", "mosaic", "feedback"])
def subject(request):
    return subject_of(request.param)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "spec", [f"feature_scorer(features={SHARED}, sinks=0, recent=1)", "h2o", BY_RATE], ids=["shared", "h2o", "by rate"]
)
def test_a_kind_of_memory_conforms(subject, spec, check):
    CHECKS[check](subject, build(spec, budget=4))


@pytest.mark.parametrize("check", CHECKS)
def test_a_matrix_that_goes_by_its_writes_conforms(check):
    """No other memory has writes of different strength."""
    CHECKS[check](subject_of(matrix), build(BY_WRITES, budget=4))


@pytest.mark.parametrize("check", CHECKS)
def test_a_gate_on_what_is_written_conforms(check):
    """No other memory has slots that are rewritten."""
    CHECKS[check](subject_of(feedback), build("write_gate"))


OF_TOKENS = "['surprise', 'surprise_ratio', 'change', 'agreement', 'relevance:4', 'novelty', 'recency', 'rate_gate']"


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    ("spec", "budget"),
    [
        (f"surprise_gate(features={OF_TOKENS})", None),
        (f"feature_scorer(features={OF_TOKENS}, sinks=0, recent=1)", 4),
        ("kv_policy(features=['surprise', 'age'], actions=['evict', 'store', 'forget'])", 6),
    ],
    ids=["gates", "scorer", "policy"],
)
def test_a_memory_that_learns_conforms(check, spec, budget):
    """Nobody attends to its tokens, so what is shared with the others is less."""
    CHECKS[check](subject_of(neural), build(spec, budget=budget))
