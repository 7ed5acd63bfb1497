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
    """A value taken apart; taken apart again, it stays as it is."""


def snapshot(value: Any, skip: Iterable[str] = ()) -> Any:
    """Return a value taken apart: a tree of plain values, arrays, and mappings that say what they stand for.

    Parameters
    ----------
    skip : attributes of objects, and classes by name, that are left out.
    """
    collecting = gc.isenabled()
    gc.disable()  # it would look through all that is alive again and again, and finds nothing in here
    try:
        return _Taken(frozenset(skip)).apart(value)
    finally:
        if collecting:
            gc.enable()


class _Taken:
    """One walk; what is met twice is one in the copy too."""

    def __init__(self, skip: frozenset[str]) -> None:
        self._skip = skip
        self._met: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no number is given to another object

    def apart(self, value: Any) -> Any:
        if type(value) in _PLAIN:
            return value
        if type(value) is Tree:
            return Tree({"is": "tree", "number": -1, "value": value})
        if id(value) in self._met:
            return Tree({"is": "again", "number": self._met[id(value)]})
        self._met[id(value)] = number = len(self._met)
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
            return {"is": "generator", "value": self.apart(value.bit_generator.state)}
        if isinstance(value, np.random.RandomState):
            return {"is": "random state", "value": self.apart(value.get_state(legacy=False))}
        if isinstance(value, torch.Generator):
            return {"is": "torch generator", "value": value.get_state().numpy().copy()}
        if type(value).__name__ in _SEQUENCES and type(value) in (list, tuple, set, deque):
            return {"is": type(value).__name__, "value": [self.apart(part) for part in value]}
        if type(value) in _DICTIONARIES:
            return {"is": "dict", "value": self._pairs(value)}
        if _described(type(value)) and type(value).__name__ not in self._skip:
            return self._object(value)
        return {"is": "kept", "class": _name(type(value))}

    def _object(self, value: Any) -> dict[str, Any]:
        attributes = {name: part for name, part in vars(value).items() if name not in self._skip}
        found = {"is": "object", "class": _name(type(value)), "value": self._pairs(attributes)}
        return {**found, "items": self._pairs(value)} if isinstance(value, dict) else found

    def _pairs(self, values: Mapping[Any, Any]) -> list[Any]:
        return [[self.apart(key), self.apart(part)] for key, part in values.items()]


def _described(kind: type) -> bool:
    root = kind.__module__
    ours = any(root == name or root.startswith(f"{name}.") for name in _MODULES)
    return (ours or dataclasses.is_dataclass(kind)) and not issubclass(kind, type) and hasattr(kind, "__dict__")


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def overlay(fresh: Any, tree: Any, kinds: Iterable[type] = (), skip: Iterable[str] = ()) -> Any:
    """Return what `snapshot` took apart, put together again; objects of ``fresh`` are used where they fit.

    Parameters
    ----------
    fresh : a value of the same structure, which is changed in place; None where there is none.
    kinds : classes of objects that may be made although ``fresh`` has none; nothing of theirs is called.
    skip : as for `snapshot`: attributes and classes that stay as they are.

    Raises
    ------
    RunError : the tree is none, or holds what neither ``fresh`` nor ``kinds`` has.
    """
    try:
        return _Together({_name(kind): kind for kind in kinds}, frozenset(skip)).whole(tree, fresh)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise RunError(f"the state of a search cannot be read: {type(error).__name__}: {error}") from None


def lost(tree: Any) -> list[str]:
    """Return the classes of the objects that `snapshot` could not take apart; functions and modules need not be."""
    if isinstance(tree, list):
        return sorted({kind for part in tree for kind in lost(part)})
    if not isinstance(tree, dict):
        return []
    if tree.get("is") == "kept":
        return [] if tree["class"] in _CODE else [tree["class"]]
    return sorted({kind for part in tree.values() for kind in lost(part)})


_NOTHING = object()
"""Stands for a function that the new searcher has not got yet, and will make itself."""


class _Together:
    def __init__(self, kinds: Mapping[str, type], skip: frozenset[str]) -> None:
        self._kinds = kinds
        self._skip = skip
        self._made: dict[int, Any] = {}

    def whole(self, node: Any, fresh: Any = None) -> Any:
        if type(node) in _PLAIN:
            return node
        if node["is"] == "again":
            return self._made[node["number"]]
        made = self._build(node, fresh)
        self._made[node["number"]] = made
        return made

    def _build(self, node: Mapping[str, Any], fresh: Any) -> Any:
        what, value = node["is"], node.get("value")
        if what == "tree":
            return value
        if what == "array":
            return np.array(_array(value).T, order="F") if node["turned"] else _array(value).copy()
        if what == "scalar":
            return _array(value)[()]
        if what == "tensor":
            tensor = torch.from_numpy(_array(value).copy())
            tensor = tensor.T if node["turned"] else tensor
            return tensor.requires_grad_(True) if node["gradient"] else tensor
        if what == "range":
            start, stop, step = node["value"]
            return range(start, stop, step)
        if what == "bytes":
            return _array(value).tobytes()
        if what == "generator":
            generator = fresh if isinstance(fresh, np.random.Generator) else np.random.default_rng(0)
            generator.bit_generator.state = self.whole(value)
            return generator
        if what == "random state":
            state = fresh if isinstance(fresh, np.random.RandomState) else np.random.RandomState(0)
            state.set_state(self.whole(value))
            return state
        if what == "torch generator":
            source = fresh if isinstance(fresh, torch.Generator) else torch.Generator()
            source.set_state(torch.from_numpy(_array(value).copy()))
            return source
        if what in _SEQUENCES:
            return self._sequence(what, node, fresh)
        if what == "dict":
            return self._dictionary(node, fresh)
        if what == "object":
            return self._object(node, fresh)
        if what == "kept" and fresh is not None:
            return fresh
        if what == "kept" and node["class"] in ("builtins.function", "builtins.method"):
            return _NOTHING
        raise ValueError(f"{what!r} {node.get('class', '')} has no place here")

    def _sequence(self, what: str, node: Mapping[str, Any], fresh: Any) -> Any:
        old = list(fresh) if isinstance(fresh, list | tuple | deque) else []
        if what == "list":  # it may hold what holds it
            made: list[Any] = fresh if type(fresh) is list else []
            self._made[node["number"]] = made
            made[:] = [self.whole(part, _at(old, place)) for place, part in enumerate(node["value"])]
            return made
        return _SEQUENCES[what]([self.whole(part, _at(old, place)) for place, part in enumerate(node["value"])])

    def _dictionary(self, node: Mapping[str, Any], fresh: Any) -> Any:
        made: dict[Any, Any] = fresh if type(fresh) in _DICTIONARIES else {}
        self._made[node["number"]] = made
        self._fill(made, node["value"])
        return made

    def _fill(self, made: dict[Any, Any], pairs: list[Any]) -> None:
        before = dict(made)
        made.clear()
        for key, part in pairs:
            name = self.whole(key)
            made[name] = self.whole(part, before.get(name) if type(name) in (str, int) else None)
            if made[name] is _NOTHING:
                del made[name]

    def _object(self, node: Mapping[str, Any], fresh: Any) -> Any:
        if fresh is not None and _name(type(fresh)) == node["class"]:
            made = fresh
        else:
            made = object.__new__(self._kinds[node["class"]])
        if type(made).__name__ in self._skip:
            return made
        self._made[node["number"]] = made
        attributes = vars(made)
        left = {name: part for name, part in attributes.items() if name in self._skip}
        self._fill(attributes, node["value"])
        attributes.update(left)
        if isinstance(made, dict):
            self._fill(made, node["items"])
        return made


def _at(values: list[Any], place: int) -> Any:
    return values[place] if place < len(values) else None


def _array(value: Any) -> np.ndarray[Any, Any]:
    if type(value) is not np.ndarray or value.dtype.kind not in "biuf":
        raise TypeError(f"an array of numbers is expected, this is {type(value).__name__}")
    return value
