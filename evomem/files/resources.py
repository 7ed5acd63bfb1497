"""Files: the YAML files and model folders that come with evomem, found in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from evomem.errors import ConfigError, UnknownNameError
from evomem.files.reading import is_file, is_folder, user_path

KINDS = {"search_spaces": "search space", "experiments": "experiment"}
"""Folder of each kind, and what one of its files is called in messages."""

SUFFIXES = (".yaml", ".yml")


def resource_path(kind: str, name: str) -> Path:
    """Return the YAML file called ``name``.

    Parameters
    ----------
    kind : ``search_spaces`` or ``experiments``.
    name : the path of a file of the user's own, or the name of one that comes with evomem, with or without ``.yaml``
        and with or without its folder: ``demo``, ``demo.yaml`` and ``experiments/demo.yaml`` are the same. A user's
        file wins.

    Raises
    ------
    UnknownNameError
        (a `ConfigError`) There is no such file; the message lists the names that exist.
    """
    label = KINDS.get(kind)
    if label is None:
        raise UnknownNameError("resource folder", kind, list(KINDS))
    path = user_path(name)
    if is_file(path):
        return path
    if is_folder(path):
        raise ConfigError(f"{label} {name!r} is a folder; give a YAML file in it")
    known = list_resources(kind)
    short = name.removeprefix(f"{kind}/")
    for suffix in SUFFIXES:
        short = short.removesuffix(suffix)
    if short in known:
        folder = resource_folder(kind)
        for suffix in SUFFIXES:
            path = folder / (short + suffix)
            if path.is_file():
                return path
    raise UnknownNameError(label, name, known)


def list_resources(kind: str) -> list[str]:
    """Return the names of the YAML files of a kind that come with evomem, sorted, without ``.yaml``."""
    if kind not in KINDS:
        raise UnknownNameError("resource folder", kind, list(KINDS))
    folder = resource_folder(kind)
    paths = (path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    return sorted({path.relative_to(folder).with_suffix("").as_posix() for path in paths})


def resource_folder(kind: str) -> Path:
    """Return the folder of a kind: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    shipped = package / "_resources" / kind  # a wheel has it inside the package
    return shipped if shipped.is_dir() else package.parent / kind  # a checkout has it beside the package
