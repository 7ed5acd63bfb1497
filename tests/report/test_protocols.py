"""The protocol of a model that no search named: that of searches on the same kind of memory, never of another kind."""

from __future__ import annotations

import pytest

from evomem.evaluation.measurement import EvaluationProtocol
from evomem.managers import build
from evomem.models import load
from evomem.report.conditions import Conditions, make_scenarios
from evomem.report.protocols import DEFAULTS, default_protocol, memory_kind, memory_kind_of
from evomem.report.subjects import Subject
from evomem.runs.experiment_parts import TaskConfig
from evomem.testing.models import tiny, tiny_tokenizer

EVERY_2, EVERY_4, EVERY_512 = (EvaluationProtocol(kind="streaming", every=every) for every in (2, 4, 512))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two pair memories, a memory matrix, a mosaic, a tiny llama in a folder, each loaded, by name."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    names = ("pair-memory", "pair-memory-soft", "zoo-memory-matrix", "zoo-mosaic", str(folder))
    return {name: load(name) for name in names}


def subject(name, protocol, *models, tasks=(), **protocols):
    return Subject(
        name, name, build("lru", budget=4), models=models, protocol=protocol, tasks=tasks, protocols=protocols
    )


def test_the_kind_of_a_memory_is_known_without_loading_the_model(models):
    assert {name: memory_kind_of(name) for name in models} == {name: memory_kind(one) for name, one in models.items()}
    assert len({memory_kind(one) for one in models.values()}) == len(DEFAULTS) == 3
    for name in ("smollm2-135m", "somebody/on-the-hub", "no-such-thing"):
        assert memory_kind_of(name) == "a KV cache"


def test_the_order_is_this_model_then_this_kind_then_the_default(models):
    llama = next(name for name in models if "/" in name)
    requests = subject("requests", EVERY_4, "pair-memory")
    texts = subject("texts", EVERY_512, "zoo-gpt2")
    own = subject("own", EVERY_2, "zoo-memory-matrix")
    both = subject("both", EVERY_4, "pair-memory", llama, **{llama: EVERY_512})
    for model, subjects, expected, said in (
        ("pair-memory", [requests], EVERY_4, ""),
        ("pair-memory-soft", [requests], EVERY_4, ""),
        (llama, [requests], DEFAULTS["a KV cache"], "the default there; requests was searched under streaming:4"),
        ("zoo-mosaic", [requests], DEFAULTS["a memory of the model's own"], "the default there"),
        ("zoo-mosaic", [requests, own], EVERY_2, "as own was searched; requests was"),
        ("zoo-mosaic", [own], EVERY_2, ""),
        (llama, [requests, texts], EVERY_512, "as texts was searched"),
        (llama, [texts, both], EVERY_512, ""),
        (llama, [both], EVERY_512, "as both was searched"),
        ("pair-memory", [both], EVERY_4, ""),
        (llama, [subject("plain", None)], DEFAULTS["a KV cache"], ""),
        (llama, [subject("old", EVERY_512)], EVERY_512, ""),
        (llama, [subject("old", EVERY_4, tasks=(TaskConfig(spec="zipf"),))], DEFAULTS["a KV cache"], "the default"),
    ):
        protocol, sentence = default_protocol(models[model], subjects)
        assert protocol == expected, (model, subjects)
        assert said in sentence
        assert bool(sentence) == bool(said)


def test_a_comparison_takes_it_too_and_the_users_word_goes_before(models):
    requests = subject("requests", EVERY_4, "pair-memory")
    there = Conditions(models=[models["zoo-mosaic"]], tasks=["zoo_needle:length=64"])
    (scenario,) = make_scenarios(there, [requests])
    assert scenario.evaluator.protocol == DEFAULTS["a memory of the model's own"]
    (scenario,) = make_scenarios(
        Conditions(models=[models["zoo-mosaic"]], tasks=["zoo_needle:length=64"], protocol="streaming:2"), [requests]
    )
    assert scenario.evaluator.protocol == EVERY_2
