"""Plug-in: a manager as a folder of four files, written whole or not at all, and read with suspicion.

::

    config.json        schema_version, manager kind, options with all defaults, observations, schedule, budget
    model.safetensors  the manager's tensors, buffers included, and nothing else
    provenance.json    where it comes from: model and its hash, search space, driver, seed, what was spent, scores
    README.md          the model card
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from evomem.errors import ConfigError, EvomemError, PluginError
from evomem.managers import MemoryManager, managers
from evomem.plugins.card import render_card
from evomem.plugins.hub import download
from evomem.strict_json import to_json

SCHEMA_VERSION = 1
CONFIG, TENSORS, PROVENANCE, CARD = FILES = ("config.json", "model.safetensors", "provenance.json", "README.md")
_FIELDS = ("schema_version", "manager", "options", "observes", "schedule", "budget")


@dataclass(frozen=True)
class Plugin:
    """A manager and where it comes from.

    Attributes
    ----------
    manager : ready to attach.
    provenance : contents of ``provenance.json``.
    """

    manager: MemoryManager
    provenance: dict[str, Any]


def save(manager: MemoryManager, folder: str | Path, provenance: Mapping[str, Any], *, card: str | None = None) -> None:
    """Write a manager as a plug-in.

    The folder appears whole: it is written beside its place, flushed to disk, and renamed. A plug-in that is there
    already is replaced.

    Parameters
    ----------
    folder : its parents are made.
    provenance : JSON-serialisable; see `evomem.runs.final.provenance` for what a search gives.
    card : text of ``README.md``; by default the model card is made from the provenance.

    Raises
    ------
    PluginError : a tensor has NaN or infinite values; the folder holds something that is no plug-in; the disk is full.
    """
    folder = Path(folder)
    config = _describe(manager)
    tensors = {name: value.detach().cpu().contiguous() for name, value in manager.state_dict().items()}
    for name, value in tensors.items():
        _check_finite(value, f"{folder}: cannot be saved", name)
    contents = {
        CONFIG: _pretty(config),
        TENSORS: safetensors.torch.save(tensors, {"format": "pt"}),
        PROVENANCE: _pretty(provenance),
        CARD: (card if card is not None else render_card(folder.name, config, provenance)).encode(),
    }
    if folder.exists() and not _replaceable(folder):
        raise PluginError(f"{folder}: exists and is no plug-in; choose another folder")
    try:
        _write_folder(folder, contents)
    except OSError as error:
        raise PluginError(f"{folder}: cannot be written: {error.strerror or error}") from error


def load(folder_or_repo: str | Path) -> MemoryManager:
    """Return the manager of a plug-in folder, or of a repository on the hub (``owner/name``).

    Only ``config.json`` and ``model.safetensors`` are read; nothing in them is executed.

    Raises
    ------
    PluginError : there is none, or it is damaged, incomplete or of an unknown version; names file and field.
    """
    folder = _located(folder_or_repo)
    config = _read_config(folder / CONFIG)
    manager = _build(folder / CONFIG, config)
    _load_tensors(manager, folder / TENSORS)
    return manager.requires_grad_(False)


def read(folder_or_repo: str | Path) -> Plugin:
    """Return the manager and its provenance; see `load`."""
    folder = _located(folder_or_repo)
    return Plugin(load(folder), _read_object(folder / PROVENANCE))


def is_plugin(folder: str | Path) -> bool:
    """Whether a folder looks like a plug-in: its ``config.json`` has a schema version."""
    with suppress(EvomemError):
        return "schema_version" in _read_object(Path(folder) / CONFIG)
    return False


# ---- writing -------------------------------------------------------------------------------------------------------


def _describe(manager: MemoryManager) -> dict[str, Any]:
    described = manager.describe()
    return {
        "schema_version": SCHEMA_VERSION,
        "manager": described["name"],
        "options": described["options"],
        "observes": sorted(manager.observes),
        "schedule": {"every": manager.schedule.every},
        "budget": manager.options.budget,
    }


def _pretty(value: Mapping[str, Any]) -> bytes:
    """Readable strict JSON; numbers that are not finite become strings."""
    return (json.dumps(json.loads(to_json(dict(value))), indent=1, ensure_ascii=False) + "\n").encode()


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and (is_plugin(folder) or not any(folder.iterdir()))


def _write_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    replaced = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    try:
        partial.mkdir()
        for name, content in contents.items():
            with (partial / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _sync(partial)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        _sync(folder.parent)
    except OSError:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed process has left; a plug-in that it had moved away comes back."""
    for path in sorted(folder.parent.glob(f".{folder.name}.*-*")):
        kind, _, pid = path.name.removeprefix(f".{folder.name}.").rpartition("-")
        if kind not in ("partial", "replaced") or not pid.isdigit() or _alive(int(pid)):
            continue
        if kind == "replaced" and not folder.exists():
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return pid != os.getpid()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- reading -------------------------------------------------------------------------------------------------------


def _located(folder_or_repo: str | Path) -> Path:
    folder = Path(folder_or_repo).expanduser()
    if folder.exists():
        if not folder.is_dir():
            raise PluginError(f"{folder}: is a file; give the plug-in's folder")
        return folder
    return download(str(folder_or_repo), FILES)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda text: _not_json(path, text))
    except FileNotFoundError:
        raise PluginError(f"{path}: is missing; a plug-in folder holds {', '.join(FILES)}") from None
    except OSError as error:
        raise PluginError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, PluginError):
            raise
        raise PluginError(f"{path}: is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise PluginError(f"{path}: an object is expected, this is {type(data).__name__}")
    return data


def _not_json(path: Path, text: str) -> NoReturn:
    raise PluginError(f"{path}: holds {text}, which is no JSON number")


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_object(path)
    if "schema_version" not in config:
        raise PluginError(f"{path}: schema_version: is missing; this is not the configuration of a plug-in")
    version = config["schema_version"]
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise PluginError(
            f"{path}: schema_version: {version!r} is unknown; this evomem reads version {SCHEMA_VERSION}. "
            "Update evomem, or save the plug-in again"
        )
    for name in _FIELDS:
        if name not in config:
            raise PluginError(f"{path}: {name}: is missing")
    for name in config:
        if name not in _FIELDS:
            raise PluginError(f"{path}: {name}: is an unknown field; known are {', '.join(_FIELDS)}")
    for name, kind in (("manager", str), ("options", dict), ("observes", list), ("schedule", dict)):
        if not isinstance(config[name], kind):
            raise PluginError(f"{path}: {name}: {config[name]!r} is not a {kind.__name__}")
    return config


def _build(path: Path, config: Mapping[str, Any]) -> MemoryManager:
    """Return the manager that the configuration describes, with its initial tensors."""
    name, options = config["manager"], config["options"]
    try:
        kind = managers.get(name)
    except ConfigError as error:
        raise PluginError(
            f"{path}: manager: {error} A manager of another package needs that package installed"
        ) from None
    for option in options:
        if option not in kind.Options.model_fields:
            known = ", ".join(sorted(kind.Options.model_fields))
            raise PluginError(f"{path}: options.{option}: manager {name!r} has no such option; it has: {known}")
    try:
        kind.Options.model_validate(options)
        with torch.random.fork_rng(devices=[]):
            manager: MemoryManager = kind(**options)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(map(str, ("options", *fault["loc"])))
        raise PluginError(f"{path}: {field}: {fault['msg']} (got {fault['input']!r})") from None
    except ConfigError as error:
        raise PluginError(f"{path}: options: {error}") from None
    # Three fields repeat what the options say, for readers that have no evomem; they must not contradict it.
    found = _describe(manager)
    for field in ("budget", "schedule", "observes"):
        if config[field] != found[field]:
            raise PluginError(
                f"{path}: {field}: {config[field]!r} contradicts the options, which give {found[field]!r}"
            )
    return manager


def _load_tensors(manager: MemoryManager, path: Path) -> None:
    if not path.is_file():
        raise PluginError(f"{path}: is missing; a plug-in folder holds {', '.join(FILES)}")
    try:
        found = safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise PluginError(f"{path}: is damaged: {error}") from None
    expected = manager.state_dict()
    for name, tensor in expected.items():
        if name not in found:
            raise PluginError(f"{path}: {name}: is missing")
        if found[name].shape != tensor.shape:
            raise PluginError(
                f"{path}: {name}: has shape {tuple(found[name].shape)}, {tuple(tensor.shape)} is expected"
            )
        if found[name].dtype != tensor.dtype:
            raise PluginError(f"{path}: {name}: has type {found[name].dtype}, {tensor.dtype} is expected")
        _check_finite(found[name], str(path), name)
    for name in found:
        if name not in expected:
            raise PluginError(f"{path}: {name}: is not a tensor of manager {manager.name!r}")
    manager.load_state_dict(found)


def _check_finite(tensor: Tensor, where: str, name: str) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise PluginError(f"{where}: {name}: {count} of {tensor.numel()} values are NaN or infinite")
