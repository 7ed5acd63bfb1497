"""Where a plug-in plugs in: pipelines, chats, sampling, assistants, device maps, and the parts of other libraries."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from evomem.cache import attached
from evomem.cache.cache import SlotCache
from evomem.cache.recompute import recomputed
from evomem.cache.rotary import find_rotaries
from evomem.evaluation.evaluator import Recording
from evomem.testing.comparing import random_rows, read
from evomem.testing.models import tiny
from evomem.testing.reference import Batch, explicit_biases, explicit_pass

ALL = frozenset({"attention_sum", "attention_spectrum", "window_attention:5", "query_statistics"})


# ---- other engines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_observations_of_another_engine_equal_what_our_cache_records(family: str, monkeypatch) -> None:
    monkeypatch.setattr("evomem.cache.recompute.BLOCK_ELEMENTS", 1)  # many blocks
    model = tiny(family, layers=2)
    batch = Batch.of(random_rows(model, [70, 70], 3))
    with attached(model):
        cache = SlotCache.for_model(model, Recording(ALL))
        cache.decides_after_forward = False
        read(model, cache, batch)
        views = [layer.view() for layer in cache.layers]
    _, _, queries = explicit_pass(model, batch, explicit_biases({}, batch, 2, views[0].slots.shape[1], None))
    rotaries = find_rotaries(model, 2)
    for view, query, rotary in zip(views, queries, rotaries, strict=True):
        got = recomputed(ALL, query, view.keys, scale=query.shape[-1] ** -0.5, rotary=rotary)
        assert got.keys() == view.recorded.keys()
        for name, wanted in view.recorded.items():
            torch.testing.assert_close(got[name], wanted, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_missing_libraries_are_explained() -> None:
    """In this environment neither is installed; the message says what to install, and where."""
    for module, words in (("kvpress", ("transformers < 5.3", "environment of its own")), ("lm_eval", ("lm_eval[hf]",))):
        code = f"import sys; sys.modules[{module!r}] = None; import evomem.plugins.{module}"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
        assert "ConfigError" in said
        assert all(word in said for word in (*words, "pip install"))
