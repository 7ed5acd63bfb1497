"""Pushing to and loading from a hub over real HTTP, by processes of their own as users have them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from evomem import plugins
from evomem.managers import build
from tests.support.hub_server import Server

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
PUSH = """
import sys
from evomem.managers import MemoryManager
from evomem.errors import PluginError
manager = MemoryManager.from_pretrained(sys.argv[1])
print(manager.push_to_hub("somebody/mine", commit_message="first", private=True, token="good"))
nine = manager.with_options(budget=9)
print(nine.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="somebody/mine", token="good"))
for name, token in (("somebody/mine", "bad"), ("no name at all", "good")):
    try:
        manager.push_to_hub(name, token=token)
    except PluginError as error:
        print("PluginError:", error)
"""
LOAD = """
import json, sys
import torch
from evomem.managers import MemoryManager, FeatureScorer
from evomem.errors import PluginError
first, second, cache = sys.argv[1:4]
found = {}
manager = MemoryManager.from_pretrained("somebody/mine")
found["newest"] = manager.options.budget
found["provenance"], found["pictures"] = dict(manager.provenance), sorted(manager.pictures)
found["weights"] = manager.weights.tolist()
found["first"] = FeatureScorer.from_pretrained("somebody/mine", revision=first).options.budget
found["changed"] = MemoryManager.from_pretrained("somebody/mine", budget=3).options.budget
found["elsewhere"] = MemoryManager.from_pretrained("somebody/mine", cache_dir=cache, force_download=True).options.budget
for name, options in {
    "nobody/nothing": {}, "somebody/mine": {"revision": "nowhere"}, "somebody/other": {"local_files_only": True},
    "somebody/huge": {}, "somebody/model": {},
}.items():
    try:
        MemoryManager.from_pretrained(name, **options)
    except PluginError as error:
        found[name + str(options.get("revision", ""))] = str(error)
print(json.dumps(found))
"""
OFFLINE = """
import sys
from evomem.plugins import load
print(load("somebody/mine").options.budget, load("somebody/mine", revision=sys.argv[1]).options.budget)
print(load("somebody/mine", local_files_only=True).options.budget)
"""


def run(code, *arguments, home, url):
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def hub():
    server = Server()
    server.tokens = {"good"}
    yield server
    server.close()


def test_a_manager_goes_to_the_hub_and_comes_back(hub, tmp_path):
    manager = build("feature_scorer(budget=5, features=[keydiff, age])")
    manager.weights.data.uniform_()
    told = {"experiment": "mine", "model": {"name": "m"}}
    plugins.save(manager, tmp_path / "plug", told, pictures={"fitness.png": PNG})
    printed = run(PUSH, tmp_path / "plug", tmp_path / "again", home=tmp_path / "home", url=hub.url).splitlines()
    (_, start, _), (first, message, files), (second, _, changed) = hub.commits["somebody/mine"]
    assert (start, message) == ("initial", "first")
    assert hub.private["somebody/mine"] is True
    assert printed[0].endswith(first)
    assert printed[1].endswith(second)
    assert printed[2].startswith("PluginError: plug-in 'somebody/mine': cannot be pushed: ")
    assert printed[3].startswith("PluginError: plug-in 'no name at all': cannot be pushed: ")
    # What lies there is the folder, to the byte but for the card's title.
    assert sorted(files) == sorted([*plugins.FILES, "assets/fitness.png"])
    for name in ("config.json", "model.safetensors", "provenance.json", "assets/fitness.png"):
        assert files[name] == (tmp_path / "plug" / name).read_bytes()
        assert changed[name] == (tmp_path / "again" / name).read_bytes()

    hub.commits["somebody/huge"] = [("1" * 40, "huge", files)]
    hub.lies["somebody/huge", "model.safetensors"] = 10**12
    hub.commits["somebody/model"] = [("2" * 40, "a model", {"config.json": b"{}", "pytorch_model.bin": b"x"})]
    shown = run(LOAD, first, second, tmp_path / "cache", home=tmp_path / "home2", url=hub.url)
    found = json.loads(shown)
    assert found["newest"] == found["elsewhere"] == 9
    assert (found["first"], found["changed"]) == (5, 3)
    assert found["provenance"] == told
    assert found["pictures"] == ["fitness.png"]
    assert found["weights"] == manager.weights.tolist()
    assert (tmp_path / "cache").is_dir()
    assert "the hub has no such repository" in found["nobody/nothing"]
    assert "no revision 'nowhere'" in found["somebody/minenowhere"]
    assert "not in the local hub cache" in found["somebody/other"]
    assert "schema_version: is missing" in found["somebody/model"]
    assert "model.safetensors: 1,000,000,000,000 bytes; a plug-in's has at most" in found["somebody/huge"]
    fetched = {path for _, path in hub.asked if "/resolve/" in path}
    assert fetched
    assert not any(path.endswith(".bin") or path.startswith("somebody/huge") for path in fetched)

    # Without the hub, what was fetched once is there, each revision as it was.
    nowhere = "http://127.0.0.1:9"
    assert run(OFFLINE, first, home=tmp_path / "home2", url=nowhere).split() == ["9", "5", "9"]
