"""Base: the one way in which managers, tasks, drivers, objectives and others get a name: a decorator."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from evomem.errors import ConfigError, UnknownNameError

T = TypeVar("T", bound=type)


def offered(group: str) -> tuple[EntryPoint, ...]:
    """Return what the installed packages offer under an entry-point group.

    Reading the records of all packages takes tens of milliseconds, so it is done again only when a folder that Python
    imports from has changed, as it does when a package is installed or removed.
    """
    return _offered(group, tuple((folder, _changed(folder)) for folder in sys.path))


@lru_cache(maxsize=16)
def _offered(group: str, folders: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


def _changed(folder: str) -> int:
    """Return when something was last put into a folder or taken out of it, in nanoseconds; 0 if there is none."""
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


class Registry(Generic[T]):
    """Classes by name.

    Parameters
    ----------
    kind : what is registered, for messages ("manager", "task", "driver").
    group : entry-point group in which other packages may offer classes (loaded when a name is not found here).
    """

    def __init__(self, kind: str, group: str | None = None) -> None:
        self.kind = kind
        self.group = group
        self._classes: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a class decorator that files the class under ``name``."""

        def file(cls: T) -> T:
            known = self._classes.get(name)
            if known is not None and known is not cls:
                raise ConfigError(
                    f"{self.kind} {name!r} is already registered by {known.__module__}.{known.__qualname__}; "
                    "choose another name"
                )
            if missing := sorted(getattr(cls, "__abstractmethods__", ())):
                raise ConfigError(
                    f"{self.kind} {name!r}: {cls.__module__}.{cls.__qualname__} has no {', '.join(missing)}; "
                    f"every {self.kind} needs {'it' if len(missing) == 1 else 'them'}"
                )
            self._classes[name] = cls
            return cls

        return file

    def get(self, name: str) -> T:
        """Return the class called ``name``.

        Raises
        ------
        UnknownNameError : nobody knows the name; lists the known ones.
        ConfigError : another package offers it, but it cannot be imported, or registers no such class.
        """
        if name not in self._classes and self.group is not None:
            for point in offered(self.group):
                if point.name == name:
                    self._load(point)
        if name not in self._classes:
            raise UnknownNameError(self.kind, name, self.names())
        return self._classes[name]

    def _load(self, point: EntryPoint) -> None:
        """Import what another package offers; its decorator registers it."""
        package = point.dist.name if point.dist is not None else "another package"
        try:
            offered_class = point.load()
        except Exception as error:  # whatever that package does when it is imported
            raise ConfigError(
                f"{self.kind} {point.name!r} of {package} cannot be imported from {point.value!r}: "
                f"{type(error).__name__}: {error}. Update or uninstall {package}"
            ) from error
        if self._classes.get(point.name) is not offered_class:
            raise ConfigError(
                f"{self.kind} {point.name!r} of {package}: {point.value!r} is no {self.kind} registered as "
                f"{point.name!r}; its class needs the decorator @register({point.name!r})"
            )

    def names(self) -> list[str]:
        """Return every name that `get` accepts, sorted."""
        names = set(self._classes)
        if self.group is not None:
            names.update(point.name for point in offered(self.group))
        return sorted(names)

    def __contains__(self, name: object) -> bool:
        return name in self._classes or name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
