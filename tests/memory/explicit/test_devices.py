"""A memory on an accelerator that only pretends: the processor's numbers to the bit, and nothing mixes devices."""

from __future__ import annotations

import pytest
import torch

from evomem.evaluation import EXACT
from evomem.evaluation.measurement import HEAD_MEMORY, EvaluationProtocol
from evomem.evaluation.streams import evaluator_of
from evomem.managers import build
from evomem.models import LoadedModel
from evomem.models.architectures.pair_memory import PairMemoryConfig, PairMemoryModel, pair_memory_tokenizer
from evomem.tasks import build as build_task
from evomem.testing.pretend import PretendDevices

FEATURES = ["recency", "frequency", "frequency_decayed:8", "relevance:4", "novelty", "surprise", "age"]


@pytest.mark.parametrize("beta", [None, 8.0], ids=["by name", "softmax"])
def test_streams_are_read_on_an_accelerator(beta):
    model = PairMemoryModel(PairMemoryConfig(beta=beta, num_attention_heads=2)).eval()
    loaded = LoadedModel("pairs", model, pair_memory_tokenizer(), "pairs")
    task = build_task("zipf:length=24,keys=16,dim=4,topics=2", loaded.tokenizer)
    sample = task.samples("train", 1, 0)[0]
    scorers = [build("feature_scorer", features=FEATURES, sinks=0, recent=1, budget=3) for _ in range(2)]
    draw = torch.Generator().manual_seed(0)
    for scorer in scorers:
        with torch.no_grad():
            scorer.weights.copy_(torch.randn(scorer.weights.shape, generator=draw))
    managers = [*scorers, build("random", budget=3), build("h2o", budget=3)]
    managers.append(build("kv_policy(features=['recency', 'relevance:4'])", budget=3))
    protocol, measurement = EvaluationProtocol(kind="streaming", every=3), EXACT.also(HEAD_MEMORY)

    def measured():
        evaluations = evaluator_of(loaded, protocol).evaluate(managers, sample, task, measurement)
        return [(one.values, one.slots, one.bytes_peak, one.bytes_mean) for one in evaluations]

    here = measured()
    with PretendDevices(1):
        model.to("pretend:0")
        assert measured() == here
        model.to("cpu")
