"""A manager by its name as a plug-in: what it decides is what the named manager decides; what cannot be is refused."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from evomem import plugins
from evomem.cli.app import app
from evomem.managers import build
from evomem.models import load
from evomem.testing.models import tiny, tiny_tokenizer
from tests.managers.test_reallocation import random_views


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "llama"
    tiny("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def export(*words):
    result = CliRunner().invoke(app, ["export", *map(str, words)])
    return result.exit_code, " ".join(result.output.split())


def test_a_named_manager_decides_as_the_one_that_is_built(tmp_path):
    code, said = export("snapkv(window=4)", tmp_path / "plug", "--budget", "6")
    assert code == 0, said
    loaded, built = plugins.load(tmp_path / "plug"), build("snapkv(window=4)", budget=6)
    assert loaded.describe() == built.describe()
    assert "evomem.load(" in said
    code, said = export("keydiff", tmp_path / "shares", "--budget", "0.5", "--allocation", "pyramid(beta=4)")
    assert code == 0, said
    loaded, built = plugins.load(tmp_path / "shares"), build("keydiff(allocation=pyramid(beta=4))", budget=0.5)
    for view in random_views():
        assert torch.equal(loaded.decide(view).keep, built.decide(view).keep)


def test_a_model_says_what_cannot_decide_about_it_and_gives_what_its_heads_do(tmp_path, model):
    code, said = export("keydiff", tmp_path / "razor", "--budget", 6, "--allocation", "razor", "-m", model)
    assert code == 0, said
    plugin = plugins.read(tmp_path / "razor")
    assert torch.equal(
        plugin.manager.allocation.probes,
        build("keydiff(allocation=razor)", budget=6).for_model(load(model).model).allocation.probes,
    )
    assert plugin.provenance["fitted_to"]["model"] == model
    code, said = export("expected_attention", tmp_path / "pairs", "--budget", 6, "-m", "pair-memory")
    assert code != 0
    assert "--model pair-memory: " in said
    assert not (tmp_path / "pairs").exists()


def test_what_makes_no_plugin_is_refused(tmp_path, model):
    export("lru", tmp_path / "lru", "--budget", 4)
    for words, message in (
        (["keydiff", tmp_path / "out"], "give --budget"),
        (["keydiff", tmp_path / "out", "--budget", "4,8"], "a plug-in has one"),
        (["keydiff", tmp_path / "out", "--budget", "4", "--place", "0"], "for a run that has a front"),
        (["kv_policy", tmp_path / "out", "--budget", "4"], "numbers that a search gives"),
        (["keydif", tmp_path / "out", "--budget", "4"], "no manager either"),
        ([tmp_path / "lru", tmp_path / "out", "--budget", "8"], "with_options(budget=64)"),
        (["keydiff", tmp_path / "lru", "--budget", "4"], "--overwrite"),
        (["keydiff(allocation=uniform)", tmp_path / "out", "--budget", "4", "--allocation", "uniform"], "already"),
    ):
        code, said = export(*words)
        assert code != 0, words
        assert message in said
        assert not (tmp_path / "out").exists()
    assert export("full", tmp_path / "out")[0] == 0  # it takes none
