from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from evomem.errors import ConfigError, UnknownNameError
from evomem.files.resources import KINDS, list_resources, resource_path

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_name_a_shipped_file(kind, tmp_path, monkeypatch):
    on_disk = sorted(path.relative_to(ROOT / kind).with_suffix("").as_posix() for path in (ROOT / kind).rglob("*.yaml"))
    assert list_resources(kind) == on_disk
    assert on_disk
    monkeypatch.chdir(tmp_path)
    for name in on_disk:
        expected = ROOT / kind / f"{name}.yaml"
        for spelling in (name, f"{name}.yaml", f"{kind}/{name}", f"{kind}/{name}.yaml", str(expected)):
            assert resource_path(kind, spelling).samefile(expected)


def test_a_users_file_wins_over_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = list_resources("experiments")[0]
    Path(f"{name}.yaml").parent.mkdir(parents=True, exist_ok=True)
    Path(f"{name}.yaml").write_text("mine: true")
    assert resource_path("experiments", f"{name}.yaml").read_text() == "mine: true"
    assert resource_path("experiments", name).is_relative_to(ROOT)


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(UnknownNameError, match=r"unknown experiment 'nonesuch'.*" + list_resources("experiments")[0]):
        resource_path("experiments", "nonesuch")
    with pytest.raises(UnknownNameError):
        resource_path("experiments", "../search_spaces/" + list_resources("search_spaces")[0])
    with pytest.raises(ConfigError, match="folder"):
        resource_path("experiments", str(tmp_path))
    with pytest.raises(UnknownNameError):
        list_resources("plugins")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(target), str(ROOT)], check=True, cwd=target)
    (built,) = target.glob("evomem_toolkit-*.whl")
    return built


def test_the_wheel_ships_the_yaml_and_finds_it(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import evomem, evomem.files.resources as r; print(evomem.__file__)\n"
        "for kind in r.KINDS:\n"
        "    for name in r.list_resources(kind): print(kind, name, r.resource_path(kind, name))"
    )
    # -I would also drop PYTHONPATH; an empty working folder keeps the checkout out of sys.path.
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"}
    (tmp_path / "empty").mkdir()
    shown = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment,
        cwd=tmp_path / "empty",
        check=True,
        text=True,
        capture_output=True,
    )
    first, *rest = shown.stdout.splitlines()
    assert Path(first).is_relative_to(tmp_path / "site")
    found = {(kind, name): Path(path) for kind, name, path in (line.split(" ", 2) for line in rest)}
    assert set(found) == {(kind, name) for kind in KINDS for name in list_resources(kind)}
    for (kind, name), path in found.items():
        assert path.is_relative_to(tmp_path / "site")
        assert path.read_bytes() == resource_path(kind, name).read_bytes()


def test_the_wheel_is_typed_and_holds_only_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "evomem/py.typed" in names
    own = {"evomem", "evomem_toolkit.py", wheel.name.split("-py3")[0] + ".dist-info"}
    assert {name.split("/")[0] for name in names} == own
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "evomem").rglob("*.py")}
    assert modules <= set(names)


def lock_entries():
    """The requirements of the lock file, with how many hashes each has."""
    from packaging.requirements import Requirement

    entries = re.split(r"\n(?=[a-zA-Z])", (ROOT / "requirements.lock").read_text().split("\n", 2)[2].strip())
    return [(Requirement(entry.split(" \\")[0]), entry.count("--hash=sha256:")) for entry in entries]


def test_the_lock_file_is_made_from_what_is_declared():
    script = runpy.run_path(str(ROOT / ".ci/lock.py"))
    second = (ROOT / "requirements.lock").read_text().splitlines()[1]
    assert second == f"# Made from: {script['source_digest']()}", "run: make lock"


def test_the_lock_file_pins_every_package_with_hashes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert len(lock_entries()) > len(pinned) + 50
    for requirement, hashes in lock_entries():
        (pin,) = requirement.specifier
        assert (pin.operator, hashes > 0) == ("==", True), requirement
        name = requirement.name.lower()
        assert pinned.get(name, pinned.get(name.replace("-", "_"), pin.version)) == pin.version
    locked = {requirement.name.lower() for requirement, _ in lock_entries()}
    assert {name.lower().replace("_", "-") for name in pinned} <= locked
    assert project["name"] not in locked


def test_what_is_installed_is_what_the_lock_file_says():
    for requirement, _ in lock_entries():
        if requirement.marker is None or requirement.marker.evaluate():
            found = version(requirement.name).partition("+")[0]  # PyTorch's builds: 2.13.0+cpu
            assert requirement.specifier.contains(found), f"{requirement} is installed as {found}; run: make test"


def test_constraints_satisfy_the_declared_requirements():
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {Requirement(line).name.lower(): Requirement(line) for line in lines if line and not line.startswith("#")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name == "evomem-toolkit":
            continue
        (pin,) = pins[requirement.name.lower()].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), requirement
