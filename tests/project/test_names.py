"""The names of `evomem` itself: cheap to import, each its package's own, known to type checkers, hiding nothing."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import evomem

HEAVY = ("torch", "transformers", "numpy", "pydantic", "ray", "rich", "scipy")


def typed_names():
    """Return {name: (package, name there)} as a type checker reads them."""
    tree = ast.parse(Path(evomem.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {alias.asname or alias.name: (node.module, alias.name) for node in block.body for alias in node.names}


def test_every_name_is_the_one_that_type_checkers_see():
    names = typed_names()
    assert sorted([*names, "__version__"]) == sorted(evomem.__all__)
    for name, (package, there) in names.items():
        assert getattr(evomem, name) is getattr(import_module(package), there)


def test_no_name_hides_a_module_and_all_are_listed():
    modules = {module.name for module in pkgutil.iter_modules(evomem.__path__)}
    assert not modules & set(evomem.__all__)
    assert set(evomem.__all__) <= set(dir(evomem))
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = evomem.nonesuch
    with pytest.raises(ImportError, match="nonesuch"):
        from evomem import nonesuch  # noqa: F401


def test_importing_evomem_imports_nothing_heavy():
    code = f"import sys, evomem; dir(evomem); print(*[name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


def test_a_class_that_lacks_a_method_is_refused_where_it_is_registered():
    from evomem.drivers import Driver, drivers
    from evomem.errors import ConfigError
    from evomem.evaluation.objectives import Objective, register_objective
    from evomem.managers import MemoryManager, register, register_allocation
    from evomem.managers.allocation import LayerAllocation
    from evomem.memory.observations import Observation, register_observation

    for base, decorate, lacks in (
        (MemoryManager, register, "score"),
        (LayerAllocation, register_allocation, "layer_limit"),
        (Observation, register_observation, "recorded"),
        (Driver, drivers.register, "_ask, _tell"),
        (Objective, register_objective, "value"),
    ):
        with pytest.raises(ConfigError, match=f"'lacking': .*Lacking has no {lacks}; every"):
            decorate("lacking")(type("Lacking", (base,), {"__doc__": "Lacks a method."}))
