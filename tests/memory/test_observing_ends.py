"""Observations end with a manager's last decision, and the answers are the same."""

from __future__ import annotations

import pytest
import torch

from evomem.errors import CacheError
from evomem.managers import build
from evomem.memory import attached
from evomem.testing.comparing import random_rows, read
from evomem.testing.models import tiny
from evomem.testing.reference import Batch

OBSERVING = ["h2o(budget=9)", "snapkv(window=4, budget=9)", "expected_attention(budget=9)", "namm(budget=9)"]


@pytest.mark.parametrize("spec", OBSERVING)
def test_after_the_one_decision_nothing_is_observed_and_the_answers_are_the_same(spec: str) -> None:
    """Against ``reading()``, after which the cache goes on observing: a further context may come."""
    model, manager = tiny("qwen2", layers=3), build(spec).with_options(every=None)
    batch = Batch.of(random_rows(model, [40, 29], 4))
    assert manager.observes
    with attached(model):
        stopped, going_on = manager.new_cache(model), manager.new_cache(model)
        got = [read(model, stopped, batch, [30])]
        with going_on.reading():
            wanted = [read(model, going_on, batch, [30])]
        cloned = stopped.clone()
        for at in range(30, 40):
            got.append(read(model, stopped, batch, [1], at=at))
            wanted.append(read(model, going_on, batch, [1], at=at))
        torch.testing.assert_close(torch.cat(got, 1), torch.cat(wanted, 1), atol=1e-4, rtol=1e-4)
        for mine, theirs in zip(stopped.layers, going_on.layers, strict=True):
            assert torch.equal(mine.slots, theirs.slots)
            assert not mine.recorder.tensors()
            assert theirs.recorder.tensors()
        held = sum(t.numel() * t.element_size() for y in stopped.layers for t in (y.keys, y.values, y.slots))
        assert stopped.nbytes() == held < going_on.nbytes()
        for cache in (stopped, cloned):
            with pytest.raises(CacheError, match="nothing was read"), cache.reading():
                pass
            with pytest.raises(CacheError, match=r"cache\.reading"):
                cache.decide()
            assert not any(layer.recorder.tensors() for layer in cache.layers)
        with going_on.reading():
            pass  # decides again
        stopped.crop(-3)  # nothing recorded, nothing to be taken back
        assert stopped.get_seq_length() == 37
        for cache, forget in ((stopped, stopped.reset), (cloned, lambda: cloned.crop(-99))):
            forget()
            again = [read(model, cache, batch, [30]), *(read(model, cache, batch, [1], at=at) for at in range(30, 40))]
            torch.testing.assert_close(torch.cat(again, 1), torch.cat(got, 1), atol=0, rtol=0)


@pytest.mark.parametrize("spec", ["h2o(budget=9, every=8)", "namm(budget=9, every=8)"])
def test_a_manager_that_decides_again_goes_on_observing(spec: str) -> None:
    model, manager = tiny("llama", layers=2), build(spec)
    with attached(model):
        cache = manager.new_cache(model)
        read(model, cache, Batch.of(random_rows(model, [20], 4)), [8, 12])
    assert all(layer.recorder.tensors() for layer in cache.layers)
