"""No module of evomem imports upwards: folders are layers, and a module imports from its own layer or a lower one.

Every import counts: at the top of a module, inside a function, and under ``TYPE_CHECKING``. An import for a type is no
import when the program runs, but a reader has to know the other module all the same.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

LAYERS = (
    "errors plain_text bounds modes registry",
    "installing devices terminal statistics files spec validation",
    "memory",
    "models managers",
    "plugins",
    "search_space tasks",
    "evaluation",
    "drivers workers tracking",
    "runs",
    "report testing",
    "cli __main__",
)
"""The layers, lowest first. Each names modules and folders of ``evomem/``."""

EXCEPTIONS = {
    (
        "evomem.managers.pretrained",
        "evomem.plugins",
    ): "from_pretrained and save_pretrained, as in transformers",
}
"""Imports upwards that are meant: (module, folder) with the reason. They lie in functions."""

HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names.split()}


def layer(module):
    """Return the height of a module's layer."""
    return HEIGHT[module.split(".")[1]]


@functools.cache
def modules():
    """Return every module of evomem with its tree."""
    found = {}
    for path in sorted((ROOT / "evomem").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree, names):
    """Return (module, line) for every import of evomem's modules; ``from folder import module`` is that module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] == "evomem")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "evomem":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in names or node.module == "evomem" else node.module, node.lineno


def upwards(found):
    """Return (module, what it imports, line) for every import of a higher layer."""
    for module, tree in found.items():
        if module == "evomem":
            continue
        for imported, line in imports(tree, found):
            if imported in ("evomem", "evomem.__version__"):
                continue
            if layer(imported) > layer(module):
                yield module, imported, line


def test_every_module_is_in_a_layer():
    names = {module.split(".")[1] for module in modules() if module != "evomem"}
    assert names == set(HEIGHT)


def test_imports_are_absolute():
    for module, tree in modules().items():
        assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree)), module


def test_no_module_imports_upwards():
    known, wrong = set(), []
    for module, imported, line in upwards(modules()):
        exception = (module, ".".join(imported.split(".")[:2]))
        if exception in EXCEPTIONS:
            known.add(exception)
        else:
            wrong.append(f"{module}:{line} imports {imported}")
    assert not wrong, "\n".join(wrong)
    assert known == set(EXCEPTIONS), "an exception that nothing needs"


def test_every_import_is_seen():
    """Imports in functions, for types, of a module from its folder, and of a name that the package exports."""
    code = """
from typing import TYPE_CHECKING
from evomem.errors import RunError
from evomem import __version__, spec, runs
if TYPE_CHECKING:
    from evomem.runs.run import Run
def one():
    import evomem.cli.app
    from evomem.managers import build
"""
    found = {**modules(), "evomem.files.made_up": ast.parse(code)}
    seen = [imported for module, imported, _ in upwards(found) if module == "evomem.files.made_up"]
    assert sorted(seen) == ["evomem.cli.app", "evomem.managers.build", "evomem.runs", "evomem.runs.run"]
