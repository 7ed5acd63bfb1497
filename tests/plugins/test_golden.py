"""Plug-ins of schema 1 load and decide as the code that wrote them (commit 1ffdb50, see tests/data/golden/make.py)."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from evomem import plugins
from evomem.errors import EvomemError
from evomem.memory import layer_view

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
DECISIONS, SUPERSEDED = (json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("decisions", "superseded"))
LAYERS, BATCH, HEADS, SLOTS = SHAPE = DECISIONS["shape"]
PLUGINS = sorted({case["plugin"] for case in DECISIONS["cases"] + SUPERSEDED["cases"]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("golden")
    with zipfile.ZipFile(GOLDEN / "plugins.zip") as archive:
        archive.extractall(path)
    return path


@pytest.fixture(scope="module")
def views():
    return {which: made(np.load(GOLDEN / f"view_{which}.npz")) for which in ("read", "later")}


def made(arrays):
    """Return the arguments of the views of all layers."""
    tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
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


def recorded(name):
    """Return the recorded keep-masks (cases, layers, batch, kv_heads, slots) bool."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return torch.from_numpy(np.unpackbits(arrays["keep"], axis=1).astype(bool).reshape(-1, *SHAPE))


def same_numbers(found, expected):
    """To the bit where they were made by the same torch on the same kind of processor."""
    made_with = {"torch": torch.__version__, "processor": torch.backends.cpu.get_cpu_capability()}
    if made_with == DECISIONS["made_with"]:
        return torch.equal(found, expected)
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plug_in_of_schema_1_decides_as_it_did(folder, views, name):
    """Every budget, on a context that was just read and at a later decision: the same slots, the same decay."""
    loaded, masks, arrays = plugins.load(folder / name), recorded("decisions"), np.load(GOLDEN / "decisions.npz")
    assert json.loads((folder / name / "config.json").read_text())["schema_version"] == 1
    for case, mask in zip(DECISIONS["cases"], masks, strict=True):
        if case["plugin"] != name:
            continue
        keep, decay = decided(loaded.with_options(budget=case["budget"]), views[case["view"]])
        assert torch.equal(keep, mask), case
        key = f"{name}/{case['view']}"
        assert (decay is not None) == (key in arrays.files), case
        if decay is not None:
            assert same_numbers(decay, torch.from_numpy(arrays[key])), case


@pytest.mark.xfail(reason="the total over layers and heads is not conserved yet where shares meet floors or adakv")
@pytest.mark.parametrize("name", sorted({case["plugin"] for case in SUPERSEDED["cases"]}))
def test_what_was_wrong_is_right_or_refused(folder, views, name):
    """The total over layers and heads is what the budget says, in every row, where that many tokens may be kept.

    These cases were recorded as wrong, each with its reason: see superseded.json.
    """
    loaded, masks = plugins.load(folder / name), recorded("superseded")
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
        if "store" in name:
            assert (total <= LAYERS * HEADS * mean).all(), case
        else:
            assert torch.equal(total, LAYERS * HEADS * mean), case
        if case["budget"] is not None and not ("store" in name and case["why"].startswith("a layer's share")):
            assert not torch.equal(keep, before), case
