"""The plain install is what using a plug-in needs; other engines need less; other packages bring managers of their own.

The environment is built, not imitated: a folder with exactly the distributions that ``[project.dependencies]`` asks
for, directly or not, and beside it what pip installs of this checkout and of a small package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
import safetensors.torch
import torch
from packaging.requirements import Requirement

from evomem import plugins
from evomem.errors import PluginError
from evomem.managers import build
from evomem.testing.models import tiny

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("ray", "cma", "cmaes", "evotorch", "wandb", "tensorboard", "matplotlib", "scipy", "gguf", "accelerate")

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "other-managers"
version = "1.0"
[project.entry-points."evomem.managers"]
newest = "other_managers.newest:Newest"
absent = "other_managers.newest:Absent"
broken = "other_managers.broken:Broken"
stranger = "other_managers.stranger:Stranger"
undecorated = "other_managers.stranger:Undecorated"
"""
NEWEST = '''
import torch
from evomem.managers import ManagerOptions, MemoryManager, register

@register("newest")
class Newest(MemoryManager):
    """Keeps the newest tokens."""
    class Options(ManagerOptions):
        slope: float = 1.0
    def __init__(self, **options):
        super().__init__(**options)
        self.scale = torch.nn.Parameter(torch.ones(1))
    def score(self, view):
        return -view.age.float() * self.scale * self.options.slope
'''
STRANGER = """
from evomem.managers import MemoryManager
class Stranger: pass
class Undecorated(MemoryManager):
    def score(self, view): return -view.age.float()
"""

USE = """
import importlib.util, json, sys
folder, namm, out, extras = sys.argv[1:5]
present = [name for name in json.loads(extras) if importlib.util.find_spec(name)]
import torch
from evomem.managers import MemoryManager
from evomem.testing.models import tiny
manager = MemoryManager.from_pretrained(folder)
model, tokens = tiny("llama"), torch.arange(4, 64)[None]
with manager.attach(model) as cache:
    text = model.generate(tokens, past_key_values=cache, max_new_tokens=6, do_sample=False)
    kept = [layer.slots.tolist() for layer in cache.layers]
from typer.testing import CliRunner
from evomem.cli.app import app
run = CliRunner().invoke(app, ["import-namm", namm, "--out", out])
print(json.dumps({"present": present, "text": text.tolist(), "kept": kept, "namm": run.output}))
"""
OTHERS = """
import json, sys
from evomem import plugins
from evomem.errors import EvomemError
from evomem.errors import PluginError
from evomem.managers import build
found = {}
manager = build("newest(budget=9, slope=2)")
manager.scale.data.fill_(3)
plugins.save(manager, sys.argv[1])
loaded = plugins.load(sys.argv[1])
found["loaded"] = [type(loaded).__module__, loaded.describe(), loaded.scale.item()]
for name in ("absent", "broken", "stranger", "undecorated", "nonesuch"):
    try:
        build(name)
    except EvomemError as error:
        found[name] = str(error)
from typer.testing import CliRunner
from evomem.cli.app import app
run = CliRunner().invoke(app, ["list", "managers", "--json"])
found["listed"] = json.loads(run.output)
print(json.dumps(found))
"""
ENGINE = """
import importlib.util, json, sys
import safetensors.torch
assert importlib.util.find_spec("transformers") is None
from evomem.memory import layer_view
from evomem.plugins import load
manager = load(sys.argv[1])
told = safetensors.torch.load_file(sys.argv[2])
same = 0
while f"{same}.keys" in told:
    one = {name.partition(".")[2]: tensor for name, tensor in told.items() if name.startswith(f"{same}.")}
    recorded = {name.removeprefix("recorded."): t for name, t in one.items() if name.startswith("recorded.")}
    place = {name: int(one[name]) for name in ("seen", "fresh", "layer", "layers")}
    place.update(recorded=recorded, observes=manager.observes, start=one["start"])
    view = layer_view(one["keys"], one["values"], one["slots"], **place)
    assert manager.score(view).equal(one["score"])
    assert manager.decide(view).keep.equal(one["keep"])
    same += 1
heavy = [name for name in sys.modules if name.partition(".")[0] in ("transformers", "scipy", "ray", "matplotlib")]
print(json.dumps({"same": same, "heavy": heavy}))
"""


def closure(names):
    """The distributions that some requirements ask for, directly or not, without extras."""
    found, waiting = {}, [Requirement(name).name for name in names]
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name not in found:
            found[name] = distribution(name)
            wanted = map(Requirement, found[name].requires or [])
            waiting += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def site(folder, names):
    """A folder to import from with these distributions and nothing else."""
    folder.mkdir()
    for one in names.values():
        for top in {file.parts[0] for file in one.files if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists() and Path(one.locate_file(top)).exists():
                (folder / top).symlink_to(one.locate_file(top))
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(a folder that pip installed evomem and another package to, one with evomem's dependencies)."""
    root = tmp_path_factory.mktemp("plain")
    package = root / "other" / "other_managers"
    package.mkdir(parents=True)
    (root / "other" / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").write_text("")
    (package / "newest.py").write_text(NEWEST)
    (package / "broken.py").write_text("import a_library_that_nobody_has\n")
    (package / "stranger.py").write_text(STRANGER)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += [
        "--no-compile",
        "--disable-pip-version-check",
        "--target",
        str(root / "own"),
        str(ROOT),
        str(root / "other"),
    ]
    subprocess.run(command, check=True, cwd=root)
    return root / "own", site(root / "site", closure(PROJECT["dependencies"]))


def run(code, *arguments, places, cwd):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", code, *map(str, arguments)],
        env=environment, cwd=cwd, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def plug(tmp_path_factory):
    """A plug-in that observes everything a scorer can, and what it decided when it was attached, in this process."""
    folder = tmp_path_factory.mktemp("plug")
    manager = build(
        "feature_scorer(budget=12, hidden=2, allocation=2, layers=3, heads=2, "
        "features=[keydiff, valuediff, 'mean:7:key_norm', attention, 'window:8', 'spectrum:2', age])"
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in manager.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    plugins.save(manager, folder / "plug", {"experiment": "mine"})
    told, decide = {}, manager.decide

    def recording(view):
        decision, number = decide(view), sum(name.endswith(".keys") for name in told)
        numbers = {name: torch.tensor(getattr(view, name)) for name in ("seen", "fresh", "layer", "layers")}
        tensors = {name: getattr(view, name) for name in ("keys", "values", "slots", "start")}
        recorded = {f"recorded.{name}": tensor for name, tensor in view.recorded.items()}
        found = {**numbers, **tensors, **recorded, "score": manager.score(view), "keep": decision.keep}
        told.update({f"{number}.{name}": tensor.detach().clone().contiguous() for name, tensor in found.items()})
        return decision

    manager.decide = recording
    model, tokens = tiny("llama"), torch.arange(4, 64)[None]
    with manager.attach(model) as cache:
        text = model.generate(tokens, past_key_values=cache, max_new_tokens=6, do_sample=False)
        kept = [layer.slots.tolist() for layer in cache.layers]
    safetensors.torch.save_file(told, folder / "told.safetensors")
    return folder, text.tolist(), kept


def test_the_plain_install_uses_a_plug_in_and_decides_the_same(installed, plug, tmp_path):
    folder, text, kept = plug
    namm = ROOT / "tests" / "data" / "namm_bam_update.npz"
    found = run(USE, folder / "plug", namm, tmp_path / "namm", json.dumps(EXTRAS), places=installed, cwd=tmp_path)
    assert found["present"] == []
    assert found["text"] == text
    assert found["kept"] == kept
    assert max(len(head) for head in kept[0][0]) < 60
    assert "model.safetensors" in found["namm"]
    assert plugins.is_plugin(tmp_path / "namm")


def test_managers_of_other_packages(installed, tmp_path):
    found = run(OTHERS, tmp_path / "newest", places=installed, cwd=tmp_path)
    module, described, scale = found["loaded"]
    assert module == "other_managers.newest"
    assert described == {"name": "newest", "options": {"budget": 9, "every": None, "slope": 2.0}}
    assert scale == 3
    for name, words in {
        "absent": ("'absent' of other-managers cannot be imported", "Absent"),
        "broken": ("'broken' of other-managers cannot be imported", "a_library_that_nobody_has"),
        "stranger": ("is no manager registered as 'stranger'", "@register('stranger')"),
        "undecorated": ("is no manager registered as 'undecorated'",),
        "nonesuch": ("unknown manager 'nonesuch'", "newest"),
    }.items():
        assert all(word in found[name] for word in words), found[name]
    assert found["listed"]["newest"] == "Keeps the newest tokens. Options: slope"
    assert found["listed"]["broken"].startswith("cannot be used: ")
    assert "snapkv" in found["listed"]
    # Here, where that package is not installed, its plug-in says what it needs.
    with pytest.raises(PluginError, match=r"config\.json: manager: unknown manager 'newest'.*package installed"):
        plugins.load(tmp_path / "newest")


def test_an_engine_without_transformers_gets_the_attached_decisions(installed, plug, tmp_path):
    own, _ = installed
    needed = closure(
        name for name in PROJECT["dependencies"] if Requirement(name).name not in ("transformers", "tokenizers")
    )
    assert "transformers" not in needed
    folder, _, kept = plug
    bare = site(tmp_path / "site", needed)
    found = run(ENGINE, folder / "plug", folder / "told.safetensors", places=(own, bare), cwd=tmp_path)
    assert found == {"same": len(kept), "heavy": []}
