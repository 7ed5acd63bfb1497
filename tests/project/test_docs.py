"""The snippets of docs/plugins.md and of README's "Use a manager" run as they stand, top to bottom, in one namespace.

And every file, heading and name of ours that a page names exists.

Not real are: the language model (a tiny one of the same family answers to the real one's name), the hub (the server of
`tests.hub_server`), and the run that is loaded from (a plug-in is put where a run leaves it).
"""

from __future__ import annotations

import pkgutil
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import evomem.models
from evomem import plugins
from evomem.cli.app import app
from evomem.managers import build, managers
from evomem.managers.allocation import allocations
from evomem.models import LoadedModel
from evomem.plugins.untrusted import DEPTH, LIMITS, PICTURE_COUNT
from evomem.testing.models import tiny, tiny_tokenizer
from tests.support.hub_server import Server

ROOT = Path(__file__).resolve().parents[2]
PLUGINS, README = ROOT / "docs" / "plugins.md", ROOT / "README.md"
ALLOCATIONS = ROOT / "docs" / "allocations.md"


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def section(text, title):
    return re.split(r"^## ", text.partition(f"## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A working folder in which the demo has run, a model, and a hub."""
    from huggingface_hub import constants

    server = Server()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    loaded = LoadedModel("smollm2-135m", tiny("llama"), tiny_tokenizer(), "0" * 64)
    monkeypatch.setattr(evomem.models, "load", {"smollm2-135m": loaded}.__getitem__)
    plugins.save(build("feature_scorer(budget=64)"), tmp_path / "runs/demo/winner/plugin", {"experiment": "demo"})
    yield server
    server.close()
    managers._classes.pop("turns", None)


def run(code):
    """Run snippets like a script: what they define later ones see."""
    names = {"__name__": "__main__"}
    for place, one in enumerate(code):
        exec(compile(one, f"snippet {place + 1}", "exec"), names)
    return names


def test_the_page_about_plug_ins(world, capsys):
    names = run(blocks(PLUGINS.read_text(), "python"))
    printed = capsys.readouterr().out
    assert "schema_version: 3 is unknown; this evomem reads versions 1 to 2." in printed
    assert names["small"].options.budget == 32
    assert names["tokens"].shape[1] > names["inputs"].input_ids.shape[1]
    assert names["manager"].options.budget == 64
    assert int(names["keep"].sum(-1).max()) == 64
    assert world.private == {"somebody/my-manager": True}
    assert sorted(world.state("somebody/my-manager")[1]) == sorted(plugins.FILES)


def test_the_own_manager_is_as_short_as_promised(world):
    (own,) = [block for block in blocks(PLUGINS.read_text(), "python") if "@register" in block]
    (entry,) = blocks(PLUGINS.read_text(), "toml")
    assert len(own.strip().splitlines()) + len(entry.strip().splitlines()) <= 34
    value = tomllib.loads(entry)["project"]["entry-points"]["evomem.managers"]["turns"]
    assert run([own])[value.partition(":")[2]].name == "turns"


def test_the_commands_about_namm(world, tmp_path):
    (commands,) = blocks(section(PLUGINS.read_text(), "Import a NAMM"), "")
    shutil.copy(ROOT / "tests/data/namm_bam_update.npz", tmp_path)
    told = plugins.load(ROOT / "tests/data/plugin_v1/namm")
    state = {"mean": torch.from_numpy(told.to_vector()), "stored_buffers_to_save.x_output_mean": told.spectrum_mean}
    torch.save({"evolution_state": {**state, "stored_buffers_to_save.x_output_var": told.spectrum_var}}, "ckpt.pt")
    for command in commands.strip().splitlines():
        program, *words = shlex.split(command)
        result = CliRunner().invoke(app, words)
        assert program == "evomem"
        assert result.exit_code == 0, result.output
        assert plugins.load("namm").name == "namm"
        shutil.rmtree("namm")  # a plug-in is not replaced unless that is said


def test_readmes_use_of_a_manager(world):
    names = run(blocks(section(README.read_text(), "Use a manager"), "python"))
    assert max(int(held.max()) for held in names["cache"].slots_held()) <= 64 + 20


def test_the_limits_are_as_told():
    table = section(PLUGINS.read_text(), "What is in it")
    for name, limit in LIMITS.items():
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}`")]
        size = f"{limit >> 10} KiB" if limit < 1 << 20 else f"{limit >> 20} MiB"
        assert row.split("|")[3].strip() == (f"{PICTURE_COUNT} of {size}" if "*" in name else size)
    assert f"more than {DEPTH} levels" in section(PLUGINS.read_text(), "What is refused")


def anchors(text):
    """Return what headings of a page are linked by: small letters, dashes for spaces, no punctuation."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(page):
    """Return the links of a page to files and headings of ours that are not there."""
    dead = set()
    for target, title in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
        path = page.parent / target if target else page
        if not path.exists() or (title and title not in anchors(path.read_text(encoding="utf-8"))):
            dead.add(f"{target}#{title}")
    return dead


PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
"""Pages about the code as it is: not CHANGELOG.md and docs/results/, which say what was."""

OURS = ("evomem", "tests", "docs", "experiments", "benchmarks", "search_spaces")


def files_named(text):
    """Return the paths of ours and the Python files that a text names."""
    written = re.findall(r"(?<![\w./:-])[\w.-]+(?:/[\w.*-]*)+|(?<![\w./-])\w+\.py\b", text)
    return {name.rstrip(".") for name in written if name.split("/")[0] in OURS or name.rstrip(".").endswith(".py")}


def missing(name):
    """Return whether a file is neither there nor, where the page leaves the package's folder out, in the package."""
    if "*" in name:
        return not any(ROOT.glob(name))
    if "/" not in name:
        return not any(path for folder in OURS for path in (ROOT / folder).rglob(name))
    return not ((ROOT / name).exists() or (ROOT / "evomem" / name).exists())


def unknown(name):
    """Return whether a dotted name is neither a module nor something that a module has."""
    path = ROOT.joinpath(*name.split("."))
    if path.is_dir() or path.with_suffix(".py").exists():
        return False
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return True
    return False


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs/results").glob("*.md"))], ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page):
    assert not dead_links(page)


def test_links_that_lead_nowhere_are_noticed(tmp_path):
    (tmp_path / "there.md").write_text("# One, *two*: `three`?\n\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text("## Here\n[a](there.md#one-two-three) [b](#here) [c](https://no.where/x#y) [d](there.md)\n")
    assert not dead_links(page)
    page.write_text("## Here\n[a](there.md#no-heading) [b](#gone) [c](gone.md)\n")
    assert dead_links(page) == {"there.md#no-heading", "#gone", "gone.md#"}


def test_pages_that_the_program_names_exist():
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "evomem").rglob("*.py"))
    named = {name for source in sources for name in re.findall(r"docs/[\w/]+\.md", source)}
    assert {"docs/allocations.md", "docs/distributed.md"} <= named
    assert not {name for name in named if not (ROOT / name).exists()}


def test_every_allocation_is_on_the_page_about_them():
    rows = re.findall(r"^\| `(\w+)", section(ALLOCATIONS.read_text(), "What does each do?"), re.MULTILINE)
    assert set(rows) == set(allocations.names())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_and_names_on_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    assert not sorted(filter(missing, files_named(text)))
    assert not sorted(filter(unknown, set(re.findall(r"(?<![\w./])evomem(?:\.[A-Za-z_]\w*)+", text)) - {"evomem.py"}))


def test_files_and_names_that_do_not_exist_are_found():
    gone = ["evomem/cache/view.py", "ray_cluster.py", "tests/test_readers.py", "docs/no.md", "kv/masks.py"]
    there = ["evomem/memory/view.py", "memory/kv/masks.py", "conftest.py", "tests/*/test_docs.py", "docs/", "README.md"]
    assert set(filter(missing, files_named(", ".join(f"`{name}`" for name in gone + there)))) == set(gone)
    assert set(filter(missing, files_named(f"It was in {gone[0]}."))) == {gone[0]}
    assert unknown("evomem.cache")
    assert unknown("evomem.managers.no_such_name")
    assert not unknown("evomem.managers.register")
    assert not unknown("evomem.plugins.kvpress")
