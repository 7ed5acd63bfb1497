"""Placement: a manager's tensors follow the view to its device, are copied once, and keep their gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from evomem.evaluation import Evaluator
from evomem.managers import MemoryManager
from evomem.managers.selection import Ends
from evomem.models import LoadedModel
from evomem.testing.models import tiny, tiny_tokenizer
from tests.evaluation.test_evaluation import (
    made,
    make_sample,
)


def seen_on(manager, device):
    """What a manager sees of the first layer of a context, here and on a device."""
    evaluator = Evaluator(LoadedModel("llama", tiny("llama", layers=2), tiny_tokenizer(), "llama"))
    view = evaluator.reading(evaluator.tokens(make_sample()).read, manager.observes).views[0]
    parts = {name: getattr(view, name).to(device) for name in ("keys", "values", "slots", "start")}
    recorded = {name: tensor.to(device) for name, tensor in view.recorded.items()}
    return view, replace(view, **parts, recorded=recorded, memo={})


class Table(MemoryManager):
    """Has a parameter, a buffer, a plain tensor and a module inside."""

    name = "table"

    def __init__(self, **options):
        super().__init__(**options)
        self.weight, self.plain = nn.Parameter(torch.ones(16)), torch.ones(16)
        self.register_buffer("scale", torch.ones(16))
        self.inner = nn.Linear(16, 1)

    def score(self, view):
        x = view.keys.float() * self.scale
        return (x * self.weight * self.plain).sum(-1) + self.inner(x)[..., 0]


CHANGES = {
    "a parameter": lambda m: m.weight.mul_(-2),
    "its data, which no version counts": lambda m: m.weight.data.mul_(-2),
    "a buffer": lambda m: m.scale.copy_(torch.arange(16.0)),
    "a plain tensor": lambda m: m.plain.mul_(-3),
    "a plain tensor in its place": lambda m: setattr(m, "plain", torch.arange(16.0)),
    "a part of a part": lambda m: m.inner.weight.mul_(-9),
    "another parameter in its place": lambda m: setattr(m, "weight", nn.Parameter(torch.arange(16.0))),
    "the protected ends": lambda m: setattr(m, "ends", Ends(sinks=3)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_are_copied_once_a_device_and_again_when_they_change(change, devices):
    manager = Table(budget=9).requires_grad_(False)
    here, there = seen_on(manager, "pretend:1")
    assert manager.decide(there).keep.tolist() == manager.decide(here).keep.tolist()
    devices.log.clear()
    before = manager.decide(there).keep.tolist()
    assert not devices.log.copies
    with torch.no_grad():
        CHANGES[change](manager)
    after = manager.decide(there).keep.tolist()
    assert after == manager.decide(here).keep.tolist()
    assert after != before
    assert {tensor.device.type for tensor in manager.state_dict().values()} == {"cpu"}


def test_gradients_reach_the_parameters_from_another_device(devices):
    manager = Table(budget=9)
    here, there = seen_on(manager, "pretend:0")
    with torch.inference_mode():  # a copy that is made here must not be in the way of gradients
        manager.decide(there)
    found = []
    for view in (here, there):
        manager.zero_grad()
        manager.score(view).square().sum().backward()
        found.append([p.grad.tolist() for p in manager.parameters()])
        manager.requires_grad_(True)
    assert found[0] == found[1]


def test_parameters_of_a_call_follow_too(devices):
    """As in a search: stacked parameters of the processor under vmap, a view of the device."""
    manager = Table(budget=9).requires_grad_(False)
    here, there = seen_on(manager, "pretend:0")
    stacked = {n: torch.stack([p, -2 * p, p + 1]) for n, p in manager.named_parameters()}
    found = [
        torch.func.vmap(lambda p, view=view: torch.func.functional_call(manager, p, (view,)).keep)(stacked).tolist()
        for view in (here, there)
    ]
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_a_manager_may_lie_on_a_device_itself(devices):
    manager = made("kv_policy(scale=model)")
    here, there = seen_on(manager, "pretend:1")
    wanted = manager.decide(here).keep.tolist()
    manager.to("pretend:0")
    assert manager.with_options(budget=12).decide(there).keep.tolist() == wanted
    assert manager.decide(here).keep.tolist() == wanted
