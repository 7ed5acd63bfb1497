"""Cache: every version of transformers that is allowed: both names of a cache, and no warnings of our own calls."""

from __future__ import annotations

import re
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from evomem.errors import CacheError
from evomem.evaluation import EvaluationProtocol, Evaluator
from evomem.evaluation.measurement import EXACT
from evomem.managers import build
from evomem.memory import attached
from evomem.memory.kv import versions
from evomem.memory.kv.switch import Usage
from evomem.memory.kv.versions import as_output, given, passed, returned, warn_untested
from evomem.models import LoadedModel
from evomem.tasks.base import Sample
from evomem.testing.comparing import greedy
from evomem.testing.models import tiny, tiny_tokenizer

ROOT = Path(__file__).parents[2]


class Older(nn.Module):
    def forward(self, ids, past_key_values=None): ...


class Newer(nn.Module):
    def forward(self, ids, cache=None): ...


class Wrapper(nn.Module):
    def forward(self, *arguments, **options): ...


@pytest.mark.parametrize("installed", [(5, 17), (5, 23), (5, 24), (5, 40), (6, 0)])
def test_a_cache_is_passed_by_the_name_that_is_taken(monkeypatch, installed):
    monkeypatch.setattr(versions, "_installed", lambda: installed)
    versions._of_forward.cache_clear()
    own = "cache" if installed >= (5, 24) else "past_key_values"
    assert passed(1, Older()) == {"past_key_values": 1}  # of other people, who may not have followed yet
    assert passed(1, Newer()) == {"cache": 1}
    assert passed(1, Wrapper()) == passed(1) == {own: 1}
    versions._of_forward.cache_clear()
    assert [given(call) for call in ({}, {"cache": None, "past_key_values": 1}, {"cache": 2})] == [None, 1, 2]


def test_outputs_say_it_by_the_name_that_they_have():
    kind = BaseModelOutputWithPast
    made = kind(last_hidden_state=torch.zeros(1), **as_output(DynamicCache(), kind))
    assert isinstance(returned(made), DynamicCache)
    assert returned(kind(last_hidden_state=torch.zeros(1))) is None


@pytest.fixture
def said(monkeypatch):
    """What transformers logs: everything, though it says some things once a process only, and propagates nothing."""
    from transformers.utils import logging

    lines: list[str] = []
    for say in ("warning", "warning_once"):
        monkeypatch.setattr(logging.logging.Logger, say, lambda self, text, *more, **_: lines.append(str(text)))
    return lines


class Nothing:
    """A metric of texts that does not look at them."""

    name, uniform_chance, has_exact = "nothing", 0.0, True

    def score(self, sample, output):
        return 0.0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.filterwarnings("error::FutureWarning", "error::DeprecationWarning")
def test_no_version_warns_of_what_evomem_calls(family, said):
    model, ids = tiny(family, layers=2), torch.randint(4, 100, (1, 20))
    with torch.no_grad(), build("h2o(budget=8, every=8)").attach(model) as cache:
        model(ids, use_cache=True, **passed(cache, model))
        greedy(model, build("full").new_cache(model), ids, 4)
    tokenizer = tiny_tokenizer()
    words = [w for w in map(tokenizer.decode, range(6, 60)) if len(tokenizer.encode(w, add_special_tokens=False)) == 1]
    sample = Sample("s", " ".join(words[:30]), " ".join(words[30:33]), f" {words[3]}", ("w",), 3)
    for protocol in (EvaluationProtocol(), EvaluationProtocol(kind="streaming", every=8)):
        evaluator = Evaluator(LoadedModel(family, model, tokenizer, family), protocol)
        manager = build("keydiff(budget=8)")
        evaluator.evaluate([manager], sample, Nothing(), EXACT)
        evaluator.evaluate_plainly(manager, sample, Nothing(), EXACT)
        evaluator.loglik_without_context(sample)
    assert not [line for line in said if "deprecated" in line]


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_users_call_is_managed_under_either_name_or_refused(name):
    model, ids, manager = tiny("llama", layers=2), torch.randint(4, 100, (1, 20)), build("keydiff(budget=8)")

    def used() -> list[int]:
        with torch.no_grad(), manager.attach(model) as cache:
            model(ids, use_cache=True, **{name: cache})
        return [int((layer.slots >= 0).sum(-1).max()) for layer in cache.layers]

    if name == "cache" and versions._installed() < versions.RENAMED:  # transformers takes it for something else
        with pytest.raises(CacheError, match="pass past_key_values=cache to the model"):
            used()
    else:
        assert used() == [8, 8]


def test_users_are_told_the_name_that_is_installed(monkeypatch):
    for installed, name in (((5, 23), "past_key_values=cache"), ((5, 24), "cache=cache")):
        monkeypatch.setattr(versions, "_installed", lambda installed=installed: installed)
        assert versions.argument() == name
        with pytest.raises(CacheError, match=f"pass {name} to the model"):
            Usage(unmanaged=1).require_managed()


def test_prompt_lookup_crops_by_tensors():
    """As transformers 5.17 does: layers that are cropped by one tensor are still equally long."""
    model, ids = tiny("llama", layers=2), torch.randint(4, 100, (1, 20))
    with torch.no_grad(), build("full").attach(model) as cache:
        model(ids, use_cache=True, **passed(cache, model))
        cache.crop(-torch.tensor(3))
        assert {(type(layer.seen), layer.seen) for layer in cache.layers} == {(int, 17)}
        model(ids[:, 17:], use_cache=True, **passed(cache, model))
        cache.crop(torch.tensor(0))
        assert cache.get_seq_length() == 20


def test_a_newer_version_is_named_once(monkeypatch):
    model = tiny("llama", layers=2)
    for installed, count in ((versions.NEWEST, 0), ((versions.NEWEST[0], versions.NEWEST[1] + 1), 1)):
        monkeypatch.setattr(versions, "_installed", lambda installed=installed: installed)
        warn_untested.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                with attached(model):
                    pass
        assert len(caught) == count
        assert all(f"transformers {installed[0]}.{installed[1]} is newer" in str(one.message) for one in caught)
    monkeypatch.undo()
    warn_untested.cache_clear()


def test_what_is_declared_is_what_was_tested():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (oldest,) = (re.match(r"transformers>=(\d+)\.(\d+),<6", one) for one in declared if one.startswith("transformers"))
    assert tuple(map(int, oldest.groups())) == versions.OLDEST
    pinned = re.search(r"^transformers==(\d+)\.(\d+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert versions.OLDEST <= tuple(map(int, pinned.groups())) <= versions.NEWEST
    installed = tuple(map(int, transformers.__version__.split(".")[:2]))
    assert versions.OLDEST <= installed <= versions.NEWEST, (
        "tests pass? then raise NEWEST in evomem/memory/kv/versions.py"
    )
