"""Driver: the state of a search as plain values and arrays, and back, without running anything that a file says.

A state that comes from a file is data: numbers, texts, lists, dictionaries, arrays, and objects of a few classes that
the reader names. The searchers of libraries can only pickle themselves, and a pickle runs code. So theirs is taken
apart instead: `snapshot` walks through a searcher and keeps what varies; `overlay` puts it into a searcher that was
made anew from the configuration. Functions, modules, settings and all that a file must not name stay the new one's own.
"""

from __future__ import annotations

import dataclasses
import gc
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from evomem.errors import RunError

_PLAIN = (type(None), bool, int, float, str)
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {"list": list, "tuple": tuple, "set": set, "deque": deque}
_DICTIONARIES = (dict, OrderedDict, defaultdict)
_CODE = ("builtins.function", "builtins.method", "builtins.module", "builtins.type")
_MODULES = ("cma", "cmaes", "evotorch", "torch.optim", "evomem")


class Tree(dict[str, Any]):
    """A snapshot of a value; a snapshot of it is the same."""


def snapshot(value: Any, skip: Iterable[str] = ()) -> Any:
    """Return a value as a tree of plain values, arrays, and mappings that say what they stand for.

    Parameters
    ----------
    skip : attributes of objects, and classes by name, that are left out.
    """
    collecting = gc.isenabled()
    gc.disable()  # it would look through all that is alive again and again, and finds nothing in here
    try:
        return _Snapshot(frozenset(skip)).take(value)
    finally:
        if collecting:
            gc.enable()


class _Snapshot:
    """One walk through a value; an object that is met twice is one in the copy too."""

    def __init__(self, skip: frozenset[str]) -> None:
        self._skip = skip
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no number is given to another object

    def take(self, value: Any) -> Any:
        if type(value) in _PLAIN:
            return value
        if type(value) is Tree:
            return Tree({"is": "tree", "number": -1, "value": value})
        if id(value) in self._seen:
            return Tree({"is": "again", "number": self._seen[id(value)]})
        self._seen[id(value)] = number = len(self._seen)
        self._alive.append(value)
        return Tree({**self._node(value), "number": number})

    def _node(self, value: Any) -> dict[str, Any]:
        if isinstance(value, np.ndarray) and type(value) is np.ndarray and value.dtype.kind in "biuf":
            turned = value.ndim > 1 and value.flags.f_contiguous and not value.flags.c_contiguous
            return {"is": "array", "turned": turned, "value": np.array(value.T if turned else value, order="C")}
        if isinstance(value, np.generic) and value.dtype.kind in "biuf":
            return {"is": "scalar", "value": np.array(value)}
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and not value.is_sparse:
            plain = value.detach().as_subclass(torch.Tensor)
            turned = plain.ndim == 2 and plain.T.is_contiguous() and not plain.is_contiguous()
            content = (plain.T if turned else plain).contiguous().clone().numpy()
            return {"is": "tensor", "turned": turned, "gradient": value.requires_grad, "value": content}
        if isinstance(value, range):
            return {"is": "range", "value": [value.start, value.stop, value.step]}
        if isinstance(value, bytes):
            return {"is": "bytes", "value": np.frombuffer(value, dtype=np.uint8).copy()}
        if isinstance(value, np.random.Generator):
            return {"is": "generator", "value": self.take(value.bit_generator.state)}
        if isinstance(value, np.random.RandomState):
            return {"is": "random state", "value": self.take(value.get_state(legacy=False))}
        if isinstance(value, torch.Generator):
            return {"is": "torch generator", "value": value.get_state().numpy().copy()}
        if type(value).__name__ in _SEQUENCES and type(value) in (list, tuple, set, deque):
            return {"is": type(value).__name__, "value": [self.take(part) for part in value]}
        if type(value) in _DICTIONARIES:
            return {"is": "dict", "value": self._pairs(value)}
        if _is_object(type(value)) and type(value).__name__ not in self._skip:
            return self._object(value)
        return {"is": "kept", "class": _name(type(value))}

    def _object(self, value: Any) -> dict[str, Any]:
        attributes = {name: part for name, part in vars(value).items() if name not in self._skip}
        described = {"is": "object", "class": _name(type(value)), "value": self._pairs(attributes)}
        return {**described, "items": self._pairs(value)} if isinstance(value, dict) else described

    def _pairs(self, values: Mapping[Any, Any]) -> list[Any]:
        return [[self.take(key), self.take(part)] for key, part in values.items()]


def _is_object(cls: type) -> bool:
    root = cls.__module__
    ours = any(root == name or root.startswith(f"{name}.") for name in _MODULES)
    return (ours or dataclasses.is_dataclass(cls)) and not issubclass(cls, type) and hasattr(cls, "__dict__")


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def overlay(fresh: Any, tree: Any, classes: Iterable[type] = (), skip: Iterable[str] = ()) -> Any:
    """Return the value of a `snapshot`; objects of ``fresh`` are used where they fit.

    Parameters
    ----------
    fresh : a value of the same structure, which is changed in place; None where there is none.
    classes : those of objects that may be made although ``fresh`` has none; nothing of theirs is called.
    skip : as for `snapshot`: attributes and classes that stay as they are.

    Raises
    ------
    RunError : the tree is none, or holds what neither ``fresh`` nor ``classes`` has.
    """
    try:
        return _Overlay({_name(cls): cls for cls in classes}, frozenset(skip)).restore(tree, fresh)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise RunError(f"the state of a search cannot be read: {type(error).__name__}: {error}") from None


def unsaved_classes(tree: Any) -> list[str]:
    """Return the classes of the objects that `snapshot` left out, functions and modules excepted."""
    if isinstance(tree, list):
        return sorted({name for part in tree for name in unsaved_classes(part)})
    if not isinstance(tree, dict):
        return []
    if tree.get("is") == "kept":
        return [] if tree["class"] in _CODE else [tree["class"]]
    return sorted({name for part in tree.values() for name in unsaved_classes(part)})


_NOTHING = object()
"""Stands for a function that the new searcher has not got yet, and will make itself."""


class _Overlay:
    def __init__(self, classes: Mapping[str, type], skip: frozenset[str]) -> None:
        self._classes = classes
        self._skip = skip
        self._made: dict[int, Any] = {}

    def restore(self, node: Any, fresh: Any = None) -> Any:
        if type(node) in _PLAIN:
            return node
        if node["is"] == "again":
            return self._made[node["number"]]
        made = self._build(node, fresh)
        self._made[node["number"]] = made
        return made

    def _build(self, node: Mapping[str, Any], fresh: Any) -> Any:
        form, value = node["is"], node.get("value")
        if form == "tree":
            return value
        if form == "array":
            return np.array(_array(value).T, order="F") if node["turned"] else _array(value).copy()
        if form == "scalar":
            return _array(value)[()]
        if form == "tensor":
            tensor = torch.from_numpy(_array(value).copy())
            tensor = tensor.T if node["turned"] else tensor
            return tensor.requires_grad_(True) if node["gradient"] else tensor
        if form == "range":
            start, stop, step = node["value"]
            return range(start, stop, step)
        if form == "bytes":
            return _array(value).tobytes()
        if form == "generator":
            generator = fresh if isinstance(fresh, np.random.Generator) else np.random.default_rng(0)
            generator.bit_generator.state = self.restore(value)
            return generator
        if form == "random state":
            state = fresh if isinstance(fresh, np.random.RandomState) else np.random.RandomState(0)
            state.set_state(self.restore(value))
            return state
        if form == "torch generator":
            source = fresh if isinstance(fresh, torch.Generator) else torch.Generator()
            source.set_state(torch.from_numpy(_array(value).copy()))
            return source
        if form in _SEQUENCES:
            return self._sequence(form, node, fresh)
        if form == "dict":
            return self._dictionary(node, fresh)
        if form == "object":
            return self._object(node, fresh)
        if form == "kept" and fresh is not None:
            return fresh
        if form == "kept" and node["class"] in ("builtins.function", "builtins.method"):
            return _NOTHING
        raise ValueError(f"{form!r} {node.get('class', '')} has no place here")

    def _sequence(self, form: str, node: Mapping[str, Any], fresh: Any) -> Any:
        old = list(fresh) if isinstance(fresh, list | tuple | deque) else []
        if form == "list":  # it may hold what holds it
            made: list[Any] = fresh if type(fresh) is list else []
            self._made[node["number"]] = made
            made[:] = [self.restore(part, _at(old, number)) for number, part in enumerate(node["value"])]
            return made
        return _SEQUENCES[form]([self.restore(part, _at(old, number)) for number, part in enumerate(node["value"])])

    def _dictionary(self, node: Mapping[str, Any], fresh: Any) -> Any:
        made: dict[Any, Any] = fresh if type(fresh) in _DICTIONARIES else {}
        self._made[node["number"]] = made
        self._fill(made, node["value"])
        return made

    def _fill(self, made: dict[Any, Any], pairs: list[Any]) -> None:
        before = dict(made)
        made.clear()
        for key, part in pairs:
            name = self.restore(key)
            made[name] = self.restore(part, before.get(name) if type(name) in (str, int) else None)
            if made[name] is _NOTHING:
                del made[name]

    def _object(self, node: Mapping[str, Any], fresh: Any) -> Any:
        if fresh is not None and _name(type(fresh)) == node["class"]:
            made = fresh
        else:
            made = object.__new__(self._classes[node["class"]])
        if type(made).__name__ in self._skip:
            return made
        self._made[node["number"]] = made
        attributes = vars(made)
        skipped = {name: part for name, part in attributes.items() if name in self._skip}
        self._fill(attributes, node["value"])
        attributes.update(skipped)
        if isinstance(made, dict):
            self._fill(made, node["items"])
        return made


def _at(values: list[Any], index: int) -> Any:
    return values[index] if index < len(values) else None


def _array(value: Any) -> np.ndarray[Any, Any]:
    if type(value) is not np.ndarray or value.dtype.kind not in "biuf":
        raise TypeError(f"an array of numbers is expected, this is {type(value).__name__}")
    return value
