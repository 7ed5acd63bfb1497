"""A plug-in under another allocation: the same scorer, what was replaced on record, and a start for a search."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from evomem import plugins
from evomem.cli.app import app
from evomem.errors import ConfigError
from evomem.managers import build, build_allocation
from evomem.managers.reallocation import change_between, with_allocation
from evomem.plugins.reallocation import reallocated_provenance
from evomem.search_space.space import SearchSpace, SpaceConfig
from evomem.testing.models import tiny
from tests.managers.test_reallocation import random_views, searched

OF_THE_OLD = {
    "scores": {"sealed": {"contexts": 3, "loglik": -1.25, "slots": 10.0}},
    "comparison": [{"model": "m", "task": "t", "manager": "demo", "budget": 10, "loglik": -1.25, "role": "subject"}],
    "sentences": ["demo beats the best heuristic"],
}
PROVENANCE = {"experiment": "demo", "model": {"name": "m"}, "seed": 3, "budgets": [10], **OF_THE_OLD}


@pytest.fixture
def source(tmp_path):
    plugins.save(searched(), tmp_path / "source", PROVENANCE)
    return tmp_path / "source"


def export(source, target, *words):
    return CliRunner().invoke(app, ["export", str(source), str(target), *words])


def test_the_scorer_stays_and_what_was_replaced_is_on_record(source, tmp_path):
    spec = "per_head_shares(layers=2, heads=2)"
    result = export(source, tmp_path / "new", "--allocation", spec)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    assert "log_shares (3 numbers)" in shown
    assert "all equal, so they share equally: allocation.log_shares (4 numbers)" in shown
    old, new = plugins.read(source), plugins.read(tmp_path / "new")
    assert new.manager.allocation.describe() == build_allocation(spec).describe()
    for view in random_views():
        assert torch.equal(new.manager.score(view), old.manager.score(view))
    assert new.provenance["experiment"] == f"demo(allocation={new.manager.allocation.name}(heads=2, layers=2))"
    (entry,) = new.provenance["reallocated"]
    assert entry == {
        "before": "depth_shares(points=3)", "after": "per_head_shares(heads=2, layers=2)",
        "dropped": {"log_shares": 3}, "initial": {"allocation.log_shares": 4},
    }  # fmt: skip
    assert not set(OF_THE_OLD) & set(new.provenance)
    assert new.provenance["seed"] == 3
    card = (tmp_path / "new" / "README.md").read_text()
    assert "-1.25" in (source / "README.md").read_text()
    assert "-1.25" not in card
    assert "beats" not in card
    assert (
        "per_head_shares(heads=2, layers=2) in place of depth_shares(points=3). Left out with that: log_shares (3)."
        in card
    )
    assert "Not searched, as a search begins: allocation.log_shares (4)." in card
    assert "in place of" not in (source / "README.md").read_text()


def test_a_second_replacement_is_added_to_the_first(source, tmp_path):
    assert export(source, tmp_path / "one", "--allocation", "pyramid(beta=4)").exit_code == 0
    assert export(tmp_path / "one", tmp_path / "two", "--allocation", "lava").exit_code == 0
    entries = json.loads((tmp_path / "two" / "provenance.json").read_text())["reallocated"]
    assert [(entry["before"], entry["after"]) for entry in entries] == [
        ("depth_shares(points=3)", "pyramid(beta=4.0)"), ("pyramid(beta=4.0)", "lava"),
    ]  # fmt: skip
    assert plugins.read(tmp_path / "two").provenance["experiment"] == "demo(allocation=lava)"
    copied = export(tmp_path / "two", tmp_path / "three")
    assert copied.exit_code == 0
    assert (tmp_path / "three" / "provenance.json").read_bytes() == (tmp_path / "two" / "provenance.json").read_bytes()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("depth_shares(points=3)", "has the allocation depth_shares(points=3) already"),
        ("lukv(layers=2, heads=2)", "evomem allocate"),
        ("lav", "Did you mean 'lava'"),
    ],
)
def test_what_cannot_be_exported_is_said_and_nothing_is_written(source, tmp_path, spec, message):
    result = export(source, tmp_path / "new", "--allocation", spec)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "new").exists()


def space(allocation, plugin):
    options = {**searched().options.model_dump(), "allocation": allocation}
    return SpaceConfig(manager={"name": "feature_scorer", "options": options}, start={"plugin": str(plugin)})


def test_a_search_of_the_new_allocation_starts_from_it(source, tmp_path):
    spec = "per_head_shares(layers=2, heads=2)"
    with pytest.raises(ConfigError, match=r'evomem export SOURCE FOLDER --allocation "per_head_shares\(heads=2'):
        SearchSpace(space(spec, source))
    with pytest.raises(ConfigError, match=r'other tensors .* evomem export SOURCE FOLDER --allocation "uniform"'):
        SearchSpace(space("uniform", source))
    assert export(source, tmp_path / "start", "--allocation", spec).exit_code == 0
    started = SearchSpace(space(spec, tmp_path / "start"))
    assert started.dim == sum(parameter.numel() for parameter in searched(spec).parameters())
    manager = started.decode(started.start)
    for view in random_views():
        assert torch.equal(manager.score(view), searched().score(view))
    assert not manager.allocation.log_shares.any()


def test_the_card_says_whether_heads_were_measured(tmp_path):
    manager = build("keydiff(allocation=probe_shares, budget=8)")
    manager.save_pretrained(tmp_path / "before")
    assert "the file has nothing measured" in (tmp_path / "before" / "README.md").read_text()
    manager.for_model(tiny("llama", layers=2)).save_pretrained(tmp_path / "after")
    card = (tmp_path / "after" / "README.md").read_text()
    assert "The file has what was measured" in card
    assert "nothing measured" not in card


def test_solved_budgets_do_not_tell_what_was_measured_of_others():
    manager = searched()
    other = with_allocation(manager, "lukv(layers=2, heads=2)")
    known = reallocated_provenance({**PROVENANCE, "reallocated": "junk"}, change_between(manager, other))
    assert not set(OF_THE_OLD) & set(known)
    assert [entry["after"] for entry in known["reallocated"]] == ["lukv(layers=2, heads=2)"]


@pytest.mark.parametrize(("spec", "kept"), [
    ("keydiff(budget=32)", "keeps 32 slots per KV head, on average over the layers;"),
    ("keydiff(budget=0.25, allocation=lava)", "keeps 0.25 of the tokens read;"),
    ("keydiff(budget=32, allocation='slots(total=[0.1, 4])')",
     "keeps between 0.1 and 4.0 times 32 slots per KV head, by the input;"),
    ("keydiff(budget=32, allocation=slots)", "keeps 32 slots per KV head, on average over the layers;"),
    ("keydiff(budget=32, allocation=threshold)", "keeps at most 32 slots per KV head, by the scores;"),
    ("namm(budget=32, selection=capped)", "keeps at most 32 slots per KV head, by the scores;"),
    ("keydiff", "Kind `keydiff`; decides once"),
])  # fmt: skip
def test_a_card_says_how_much_is_kept(spec, kept, tmp_path):
    """A budget is what is kept, or at most what is, or what the input decides shares of."""
    plugins.save(build(spec), tmp_path / "p")
    assert kept in (tmp_path / "p" / "README.md").read_text()
