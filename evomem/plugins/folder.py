"""Plug-in: a manager as a folder of four files, written whole or not at all, and read with suspicion.

How suspicious, and the limits: `evomem.plugins.untrusted`.

::

    config.json        schema_version, manager kind, options with defaults, allocation, observations, schedule, budget
    model.safetensors  the manager's tensors, buffers included, and nothing else
    provenance.json    where it comes from: model and its hash, search space, driver, seed, what was spent, scores
    README.md          the model card
    assets/*.png       the card's pictures, if there are any
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from evomem.errors import ConfigError, EvomemError, PluginError
from evomem.files.reading import is_folder, is_there, user_path
from evomem.files.strict_json import shown, to_json
from evomem.managers import MemoryManager, managers
from evomem.managers.allocation.curve_record import unknown_record
from evomem.managers.allocation.probed import ProbedAllocation, measured_buffers, probes_measured
from evomem.modes import outside_inference_mode
from evomem.plugins.card import render_card
from evomem.plugins.hub import download
from evomem.plugins.replacing import current, located, strangers, write_folder
from evomem.plugins.schema import IMPLIED, describe_manager, parse_config
from evomem.plugins.tensors import check_tensors, set_tensors, to_bytes
from evomem.plugins.untrusted import (
    CARD,
    CONFIG,
    FILES,
    LIMITS,
    PICTURES,
    PROVENANCE,
    TENSORS,
    checked_picture,
    parse_object,
    parse_tensors,
    read_object,
    read_pictures,
    read_tensors,
)
from evomem.validation import faults


@dataclass(frozen=True)
class Plugin:
    """A manager and where it comes from.

    Attributes
    ----------
    manager : ready to attach.
    provenance : contents of ``provenance.json``.
    pictures : of the card, by file name.
    """

    manager: MemoryManager
    provenance: Mapping[str, Any]
    pictures: Mapping[str, bytes]


def save(
    manager: MemoryManager,
    folder: str | Path,
    provenance: Mapping[str, Any] | None = None,
    *,
    card: str | None = None,
    pictures: Mapping[str, bytes] | None = None,
) -> None:
    """Write a manager as a plug-in.

    A new folder appears whole: it is written beside its place, flushed to disk, and renamed. Of a plug-in that is there
    the files named above are replaced, and nothing else is touched: what begins with a dot (``.git``) stays. A reader
    sees the old plug-in or the new one, also after a kill at any moment.

    Parameters
    ----------
    folder : its parents are made.
    provenance : JSON-serialisable; see `evomem.runs.winner.provenance` for what a search gives. None: the manager's
        own, which it has if it was loaded.
    card : text of ``README.md``; by default the model card is made from the provenance.
    pictures : PNG files by name, which the card shows; None: the manager's own.

    Raises
    ------
    PluginError : a tensor has NaN or infinite values, or is of a kind that the file format does not have; something
        could not be loaded again, to the bit (too large, other shapes than the options give, or a constructor that
        needs real tensors); the folder holds something that is no plug-in, or a file that is none of a plug-in's;
        the disk is full.
    """
    folder = located(folder)
    provenance = manager.provenance if provenance is None else provenance
    pictures = manager.pictures if pictures is None else pictures
    config = describe_manager(manager)
    if card is None:
        measured = probes_measured(manager)
        card = render_card(folder.name, config, provenance, sorted(pictures), measured=measured)
    contents = {
        CONFIG: _pretty(config),
        TENSORS: to_bytes(manager, f"{folder}: cannot be saved"),
        PROVENANCE: _pretty(provenance),
        CARD: card.encode(),
    }
    for name, content in contents.items():
        if len(content) > LIMITS[name]:
            raise PluginError(f"{folder}: {name}: would have {len(content):,} bytes; at most {LIMITS[name]:,} are read")
    try:  # what is written here can be read there
        parsed = parse_config(folder / CONFIG, parse_object(folder / CONFIG, contents[CONFIG]))
        to_manager(
            folder / CONFIG, parsed, folder / TENSORS, lambda: parse_tensors(folder / TENSORS, contents[TENSORS])
        )
        parse_object(folder / PROVENANCE, contents[PROVENANCE])
    except PluginError as error:
        raise PluginError(f"{folder}: cannot be saved, because it could not be loaded again: {error}") from None
    for name, content in pictures.items():
        contents[f"{PICTURES}/{name}"] = checked_picture(folder, name, content)
    check_replaceable(folder)
    try:
        write_folder(folder, contents)
    except OSError as error:
        raise PluginError(f"{folder}: cannot be written: {error.strerror or error}") from error


def load(folder_or_repo: str | Path, **hub: Any) -> MemoryManager:
    """Return the manager of a plug-in folder, or of a repository on the hub (``owner/name``).

    Nothing of the files is executed. The manager keeps its provenance and the card's pictures, to be saved with it
    again; a plug-in without these loads too.

    Parameters
    ----------
    **hub : revision, token, cache_dir, force_download, local_files_only; see `evomem.plugins.hub.download`.

    Raises
    ------
    PluginError : there is none, or it is damaged, incomplete, too large or of an unknown version; names file and field.
    """
    folder = _located(folder_or_repo, hub)
    config = parse_config(folder / CONFIG, read_object(folder / CONFIG))
    manager = to_manager(folder / CONFIG, config, folder / TENSORS, lambda: read_tensors(folder / TENSORS))
    if (folder / PROVENANCE).exists():
        manager.provenance = read_object(folder / PROVENANCE)
    manager.pictures = read_pictures(folder)
    return manager.requires_grad_(False)


def read(folder_or_repo: str | Path, **hub: Any) -> Plugin:
    """Return the manager, its provenance, which must be there, and its pictures; see `load`."""
    folder = _located(folder_or_repo, hub)
    manager = load(folder)
    return Plugin(manager, read_object(folder / PROVENANCE), manager.pictures)


def is_plugin(folder: str | Path) -> bool:
    """Whether a folder looks like a plug-in: its ``config.json`` has a schema version."""
    with suppress(EvomemError):
        return "schema_version" in read_object(current(Path(folder)) / CONFIG)
    return False


# ---- writing -------------------------------------------------------------------------------------------------------


def _pretty(value: Mapping[str, Any]) -> bytes:
    """Readable strict JSON; numbers that are not finite become strings."""
    return (json.dumps(json.loads(to_json(dict(value))), indent=1, ensure_ascii=False) + "\n").encode()


def check_replaceable(folder: Path) -> None:
    """Raise `PluginError` unless a plug-in may be written into a folder: it is new, empty, or a plug-in and no more."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise PluginError(f"{folder}: is no folder; choose another place")
    others = strangers(folder)
    if not is_plugin(folder) and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise PluginError(f"{folder}: exists and is no plug-in; choose another folder")
    if others:
        raise PluginError(
            f"{folder}: holds {shown(others[0])}, which is none of a plug-in's files ({', '.join(FILES)}, "
            f"{PICTURES}/*.png); move it away, or choose another folder"
        )


# ---- reading -------------------------------------------------------------------------------------------------------


def _located(folder_or_repo: str | Path, hub: Mapping[str, Any]) -> Path:
    folder = user_path(folder_or_repo)
    if is_there(folder):
        if not is_folder(folder):
            raise PluginError(f"{folder}: is a file; give the plug-in's folder")
        return current(folder)
    return download(str(folder_or_repo), LIMITS, **hub)


def to_manager(
    path: Path, config: Mapping[str, Any], tensors_path: Path, read: Callable[[], dict[str, Tensor]]
) -> MemoryManager:
    """Return the manager that a configuration describes, with the tensors that ``read`` returns, on the processor.

    ``read`` is called once the configuration has been found right.

    Raises
    ------
    PluginError : the configuration contradicts itself, or the tensors are not those that it asks for.
    """
    expected, measured, later = _expected(path, config)
    tensors = {**later, **read()}
    check_tensors(tensors_path, config["manager"], tensors, expected, measured)
    # Only now is anything of the size that the options ask for: it is the size of the file.
    with outside_inference_mode(), torch.device("cpu"):
        manager = _build(path, config)
        set_tensors(manager, tensors, tensors_path)
    return manager


def _expected(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], frozenset[str], dict[str, Tensor]]:
    """Return the tensors that the configuration asks for, without memory behind them, having checked it all.

    Also the names of those that were measured on a model, whose first axis it leaves open; and those that stand for
    what files of before do not have.
    """
    with torch.device("meta"):
        manager = _build(path, config)
    described = describe_manager(manager)
    for field in IMPLIED:
        if field in config and config[field] != described[field]:
            raise PluginError(
                f"{path}: {field}: {shown(config[field])} contradicts the options, which give {shown(described[field])}"
            )
    return manager.state_dict(), measured_buffers(manager, ProbedAllocation.SIZED), unknown_record(manager)


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
            raise PluginError(f"{path}: options.{shown(option)}: manager {name!r} has no such option; it has: {known}")
    try:
        kind.Options.model_validate(options)
        with torch.random.fork_rng(devices=[]):
            manager: MemoryManager = kind(**options)
    except ValidationError as error:
        raise PluginError(f"{path}: {shown(f'options.{faults(error, kind.Options)[0]}', 600)}") from None
    except ConfigError as error:
        raise PluginError(f"{path}: options: {shown(str(error), 400)}") from None
    except Exception as error:  # a constructor's own: sizes beyond all integers, code of other packages
        said = shown(f"{type(error).__name__}: {error}", 200)
        raise PluginError(
            f"{path}: options: manager {name!r} cannot be built from them: {said}. (A constructor must also work "
            "inside `with torch.device('meta')`: sizes are checked before there is memory behind them.)"
        ) from None
    return manager
