"""Plug-ins of schema 1 load and decide as the code that wrote them (commit 1ffdb50, see tests/data/golden/make.py)."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch

from evomem import plugins
from evomem.errors import EvomemError
from evomem.evaluation import EvaluationProtocol, Evaluator
from evomem.memory import layer_view
from evomem.models import LoadedModel
from evomem.tasks.base import Sample
from evomem.testing.models import tiny, tiny_tokenizer
from tests.support.golden import arrays, same_numbers, told, unpacked

DECISIONS, SUPERSEDED, ANSWERS = told("decisions"), told("superseded"), told("answers")
UNPADDED = {(case["plugin"], case["protocol"]): case for case in told("unpadded_bytes")["cases"]}
"""Bytes of answers that were recorded when shorter heads were padded."""
LAYERS, BATCH, HEADS, SLOTS = SHAPE = DECISIONS["shape"]
PLUGINS = sorted({case["plugin"] for case in DECISIONS["cases"] + SUPERSEDED["cases"]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return unpacked("plugins", tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def views():
    return {which: made(arrays(f"view_{which}")) for which in ("read", "later")}


@pytest.fixture(scope="module")
def decays():
    return arrays("decisions")


def made(tensors):
    """Return the arguments of the views of all layers."""
    seen, fresh = tensors.pop("counts").tolist()
    slots = tensors.pop("slots").long()
    start = tensors.pop("start").long()
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    keys, values = tensors.pop("keys"), tensors.pop("values")
    return [
        ((keys[layer], values[layer], slots[layer]),
         {"recorded": {name: tensor[layer] for name, tensor in tensors.items()},
          "start": start, "seen": seen, "fresh": fresh, "layer": layer, "layers": LAYERS})
        for layer in range(LAYERS)
    ]  # fmt: skip


def decided(manager, views):
    """Return the decisions about all layers: keep (layers, batch, kv_heads, slots) and decay, or None."""
    found = [manager.decide(layer_view(*tensors, observes=manager.observes, **others)) for tensors, others in views]
    decay = None if found[0].decay is None else torch.stack([one.decay for one in found])
    return torch.stack([one.keep for one in found]), decay


@cache
def recorded(name):
    """Return the recorded keep-masks (cases, layers, batch, kv_heads, slots) bool."""
    bits = np.unpackbits(arrays(name)["keep"].numpy(), axis=1)
    return torch.from_numpy(bits.astype(bool).reshape(-1, *SHAPE))


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plug_in_of_schema_1_decides_as_it_did(folder, views, decays, name):
    """Every budget, on a context that was just read and at a later decision: the same slots, the same decay."""
    loaded, masks = plugins.load(folder / name), recorded("decisions")
    assert json.loads((folder / name / "config.json").read_text())["schema_version"] == 1
    for case, mask in zip(DECISIONS["cases"], masks, strict=True):
        if case["plugin"] != name:
            continue
        keep, decay = decided(loaded.with_options(budget=case["budget"]), views[case["view"]])
        assert torch.equal(keep, mask), case
        key = f"{name}/{case['view']}"
        assert (decay is not None) == (key in decays), case
        if decay is not None:
            assert same_numbers(decay, decays[key], DECISIONS["made_with"]), case


@pytest.mark.parametrize("name", sorted({case["plugin"] for case in SUPERSEDED["cases"]}))
def test_what_was_wrong_is_right_or_refused(folder, views, name):
    """The total over layers and heads is what the budget says, in every row, where that many tokens may be kept.

    These cases were recorded as wrong, each with its reason: see superseded.json.
    """
    loaded, masks = plugins.load(folder / name), recorded("superseded")
    scorer = loaded.inner if loaded.name == "adakv" else loaded
    stores = "store" in getattr(scorer.options, "actions", ())
    for case, before in zip(SUPERSEDED["cases"], masks, strict=True):
        # At a later decision nobody knows what other layers hold; with "store" fewer tokens may be kept.
        if case["plugin"] != name or case["view"] != "read":
            continue
        try:
            keep, _ = decided(loaded.with_options(budget=case["budget"]), views["read"])
        except EvomemError:
            continue  # refused, which is right too
        read = torch.tensor(
            [tensors[2][row, 0].ge(0).sum() for tensors, _ in views["read"][:1] for row in range(BATCH)]
        )
        mean = read if case["budget"] is None else case["budget"] * torch.ones_like(read)
        mean = torch.ceil(case["budget"] * read).long() if isinstance(case["budget"], float) else mean
        total = keep.sum((0, 2, 3))
        if stores:
            assert (total <= LAYERS * HEADS * mean).all(), case
        else:
            assert torch.equal(total, LAYERS * HEADS * mean), case
        if case["budget"] is not None and not (stores and case["why"].startswith("a layer's share")):
            assert not torch.equal(keep, before), case


@pytest.mark.parametrize("name", ["adakv_expected_attention", "adakv_kv_policy_store"])
def test_with_a_safeguard_of_1_nothing_is_shared(folder, views, name):
    """The manager inside decides, also where a head cannot fill its slots."""
    loaded = plugins.load(folder / name)
    for budget in (7, 12, 20, 0.5, None):
        for which in views:
            keep, _ = decided(loaded.with_options(budget=budget), views[which])
            alone, _ = decided(loaded.inner.with_options(budget=budget), views[which])
            assert torch.equal(keep, alone), (budget, which)


# ---- with a model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny("llama", layers=LAYERS)


def managers(folder, cases):
    return [plugins.load(folder / case["plugin"]).with_options(budget=case["budget"]) for case in cases]


@pytest.mark.parametrize("kind", ["compress_once", "streaming"])
def test_a_model_holds_the_tokens_and_says_the_answer_that_it_did(folder, model, kind):
    """A padded batch read in one pass: the same tokens in every head; one answer: likelihood and bytes."""
    before = arrays("answers")
    cases = [case for case in ANSWERS["cases"] if case["protocol"] == kind]
    ready, every = managers(folder, cases), ANSWERS["every"]
    tokens, mask = before["tokens"].long(), before["mask"].long()
    for case, manager in zip(cases, ready, strict=True):
        deciding = manager.with_options(every=every if kind == "streaming" else None)
        with torch.no_grad(), deciding.attach(model) as cache, cache.reading():
            model(input_ids=tokens, attention_mask=mask, past_key_values=cache)
        for layer, expected in zip(cache.layers, before[f"{case['plugin']}/{kind}"], strict=True):
            held = [row[row >= 0].tolist() for row in layer.slots.flatten(0, 1)]
            assert held == [row[row >= 0].tolist() for row in expected.flatten(0, 1)], case
    evaluator = Evaluator(
        LoadedModel("tiny", model, tiny_tokenizer(), "tiny"), EvaluationProtocol(kind=kind, every=every)
    )
    context, question, answer = ANSWERS["texts"]
    found = evaluator.evaluate(ready, Sample("golden", context, question, answer, (answer,), 4), None)
    for case, one in zip(cases, found, strict=True):
        assert same_numbers(one.loglik, case["loglik"], ANSWERS["made_with"]), case
        held = UNPADDED.get((case["plugin"], kind), case)
        assert held["bytes_peak"] <= case["bytes_peak"], case
        assert held["bytes_mean"] <= case["bytes_mean"], case
        assert (one.slots, one.bytes_peak, one.bytes_mean) == (case["slots"], held["bytes_peak"], held["bytes_mean"])
