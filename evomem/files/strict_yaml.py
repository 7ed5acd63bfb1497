"""Files: YAML that a person writes, read strictly: plain values, no key twice, and bounds on all that can grow.

A few hundred bytes of YAML may stand for gigabytes: an alias repeats what it names, and aliases may name aliases. What
a text stands for is counted before anything is made of it. Dates, sets and binaries, which have no place in a
configuration, stay text or are refused; so a configuration is what JSON can say.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from evomem.files.strict_json import DIGITS, shown

NODES, DEPTH = 50_000, 64
"""Values that a text may stand for, aliases counted as often as they are used, and levels of nesting."""


class YamlError(ValueError):
    """A text that is no YAML, or not of the kind that is read; the message says where."""


class _Loader(yaml.SafeLoader):
    """Plain values only; a key given twice is an error (YAML itself silently keeps the last); 1e-3 is a number."""

    _nodes = _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the next node; one too many, or too deep, is not even read to its end."""
        self._nodes, self._depth = self._nodes + 1, self._depth + 1
        if self._nodes > NODES:
            raise YamlError(f"more than {NODES:,} values; give long lists as a file of their own")
        if self._depth > DEPTH:
            raise YamlError(f"nested more than {DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def parse(text: str) -> Any:
    """Return what a YAML text says: mappings with text as keys, lists, text, numbers, true, false, null.

    Raises
    ------
    YamlError : it is no YAML, says too much, or says what JSON cannot.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise YamlError(_one_line(error)) from None
    except yaml.YAMLError as error:  # a character that no YAML has
        raise YamlError(shown(str(error), 200)) from None
    except RecursionError:
        raise YamlError(f"nested more than {DEPTH} levels deep") from None


def _one_line(error: yaml.MarkedYAMLError) -> str:
    """Return where a fault is and what it is, without the lines of the text that PyYAML shows with it."""
    mark, problem = error.problem_mark or error.context_mark, error.problem or error.context or "cannot be read"
    if problem.startswith("but ") and error.context:
        problem = f"{error.context}, {problem}"
    position = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return position + shown(" ".join(problem.split()), 200)


def _check_size(root: yaml.Node) -> None:
    """Raise `YamlError` if a document is too deep, refers to itself, or stands for too many values.

    Without recursion: a stack of nodes, each with the children that are still to be counted. What a node stands for is
    remembered, so that an alias costs nothing to count.
    """
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()
    stack: list[tuple[yaml.Node, list[yaml.Node]]] = []

    def enter(node: yaml.Node) -> None:
        if id(node) in open_nodes:
            raise YamlError(f"an alias refers to what it is part of{_place(node)}")
        if len(stack) >= DEPTH:
            raise YamlError(f"nested more than {DEPTH} levels deep{_place(node)}")
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        else:
            children = list(node.value) if isinstance(node, yaml.SequenceNode) else []
        open_nodes.add(id(node))
        sizes[id(node)] = 1
        stack.append((node, children))

    enter(root)
    while stack:
        node, children = stack[-1]
        if children:
            child = children.pop()
            if id(child) in sizes and id(child) not in open_nodes:
                sizes[id(node)] += sizes[id(child)]
            else:
                enter(child)
                continue
        else:
            stack.pop()
            open_nodes.discard(id(node))
            if stack:
                sizes[id(stack[-1][0])] += sizes[id(node)]
        if stack and sizes[id(stack[-1][0])] > NODES:
            raise YamlError(f"stands for more than {NODES:,} values{_place(stack[-1][0])}")


def _place(node: yaml.Node) -> str:
    return f", line {node.start_mark.line + 1}"


def _refuse(node: yaml.Node, text: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Hashable, Any] = {}
    for name, value in node.value:
        key = loader.construct_object(name, deep=True)
        if not isinstance(key, str | int | float | bool | None):
            raise _refuse(name, "a key is a text or a number")
        if key in mapping:
            raise _refuse(node, f"key {shown(key)!r} is given twice")
        mapping[key] = loader.construct_object(value, deep=True)
    return mapping


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return [loader.construct_object(part, deep=True) for part in node.value]


def _text(loader: _Loader, node: yaml.ScalarNode) -> Any:
    # YAML 1.1 reads "1e-3" as text because it has no dot; nobody who writes it means text.
    text = str(node.value)
    if node.style is None and "e" in text.lower() and text.isascii():
        try:
            return float(text)
        except ValueError:
            pass
    if "\0" in text or not _encodable(text):
        raise _refuse(node, f"{shown(text)}: holds a NUL or half a character, which no text has")
    return text


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _number(kind: str) -> Any:
    construct = getattr(yaml.SafeLoader, f"construct_yaml_{kind}")

    def number(loader: _Loader, node: yaml.ScalarNode) -> Any:
        if len(str(node.value)) > DIGITS:
            raise _refuse(node, f"a number of {len(str(node.value)):,} characters; at most {DIGITS}")
        try:
            return construct(loader, node)
        except (ValueError, OverflowError, LookupError):
            raise _refuse(node, f"{shown(node.value)} is no number") from None

    return number


def _unknown(loader: _Loader, node: yaml.Node) -> Any:
    raise _refuse(node, f"{shown(node.tag.removeprefix('tag:yaml.org,2002:'))}: a value of this kind has no place here")


def _flag(loader: _Loader, node: yaml.ScalarNode) -> bool:
    try:
        return bool(yaml.SafeLoader.construct_yaml_bool(loader, node))
    except KeyError:
        raise _refuse(node, f"{shown(node.value)} is neither true nor false") from None


def _of(kind: type[yaml.Node], construct: Any) -> Any:
    """Return a constructor that refuses nodes of another kind: a tag may stand before anything."""

    def checked(loader: _Loader, node: yaml.Node) -> Any:
        return construct(loader, node) if isinstance(node, kind) else _unknown(loader, node)

    return checked


_TAG = "tag:yaml.org,2002:"
_Loader.yaml_constructors = {
    None: _unknown,
    f"{_TAG}map": _of(yaml.MappingNode, _mapping),
    f"{_TAG}seq": _of(yaml.SequenceNode, _sequence),
    f"{_TAG}str": _of(yaml.ScalarNode, _text),
    f"{_TAG}int": _of(yaml.ScalarNode, _number("int")),
    f"{_TAG}float": _of(yaml.ScalarNode, _number("float")),
    f"{_TAG}bool": _of(yaml.ScalarNode, _flag),
    f"{_TAG}null": _of(yaml.ScalarNode, lambda loader, node: None),
}
# A date is a text here: 2024-05-01 as the name of a run is what its author means.
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in (f"{_TAG}timestamp", f"{_TAG}merge")]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
