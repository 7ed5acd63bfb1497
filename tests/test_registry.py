"""What other packages offer: read once, and again as soon as a package is installed or removed."""

from __future__ import annotations

import shutil
import time

from evomem import registry
from evomem.registry import Registry, offered


def install(site, name, value="managers_of_others:Newest"):
    """Write the record of an installed package that offers one class."""
    folder = site / f"{name}-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[evomem.tests]\n{name} = {value}\n")
    return folder


def test_packages_are_read_again_only_when_one_comes_or_goes(tmp_path, monkeypatch):
    reads, read = [], registry.entry_points

    def counted(**options):
        reads.append(options)
        return read(**options)

    monkeypatch.setattr(registry, "entry_points", counted)
    known: Registry[type] = Registry("thing", "evomem.tests")
    assert known.names() == []
    monkeypatch.syspath_prepend(tmp_path / "site")  # a folder that Python imports from by now
    first = install(tmp_path / "site", "one")
    assert known.names() == ["one"]
    assert "one" in known
    count = len(reads)
    assert [known.names() for _ in range(5)] == [["one"]] * 5
    assert len(reads) == count
    time.sleep(0.01)  # a file system's clock may be coarse
    install(tmp_path / "site", "two")
    assert known.names() == ["one", "two"]
    time.sleep(0.01)
    shutil.rmtree(first)
    assert known.names() == ["two"]
    assert [point.name for point in offered("evomem.tests")] == ["two"]
