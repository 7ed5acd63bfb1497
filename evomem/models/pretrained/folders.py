"""Model: from a name (alias, local folder, hub id) to a folder with configuration, safetensors and tokenizer."""

from __future__ import annotations

import json
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from evomem.errors import ModelError
from evomem.files.reading import is_there, read_text, user_path
from evomem.models.aliases import Shipped, aliases
from evomem.models.pretrained.files import INDEX, WEIGHTS
from evomem.models.pretrained.gguf import dequantised_folder

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
ADAPTER = "adapter_config.json"
TEXT_BYTES = 64 << 20
"""Bytes of a model's configuration or of the index of its weights, at most."""
SECONDS = 5.0
"""How long to wait for the hub before calling it unreachable."""


def resolve(name: str, *, verify: bool = False) -> Path:
    """Return the folder that holds the model ``name``: an alias, a local folder, or a hub id.

    A hub id is looked for in the local hub cache first, and on the network only when it is not there.

    Raises
    ------
    ModelError
        Nothing has that name, or its folder is incomplete; the message says what was tried and what to do.
    """
    if name in aliases:
        alias = aliases[name]
        return shipped_folder(alias) if isinstance(alias, Shipped) else dequantised_folder(alias, verify=verify)
    path = user_path(name)
    if is_there(path):
        missing = missing_files(path)
        if missing:
            raise ModelError(f"model folder {path}: {missing}")
        return path.resolve()
    if not HUB_ID.fullmatch(name):
        raise ModelError(f"model {name!r}: no such folder, and not a hub id (owner/name) either. {_known(name)}")
    return _from_hub(name)


def model_type(name: str) -> str:
    """Return the architecture that a model's ``config.json`` names, without loading the model.

    "" where there is none at hand to read: a hub id, a model that has to be unpacked first, a damaged file.
    """
    alias = aliases.get(name)
    folder = alias.source() if isinstance(alias, Shipped) else None if alias is not None else user_path(name)
    try:
        return str(_object(folder / "config.json").get("model_type", "")) if folder is not None else ""
    except (ModelError, ValueError, OSError):
        return ""


def shipped_folder(alias: Shipped) -> Path:
    """Return the folder of a model that comes with evomem; raise `ModelError` when it is not there."""
    folder = alias.source()
    if folder is None:
        raise ModelError(f"model {alias.name!r}: this installation of evomem lacks its folder. Run: {alias.install}")
    return folder


def missing_files(folder: Path) -> str | None:
    """Return what a model folder lacks, for a message, or None when `evomem.models.load` can read it."""
    if not folder.is_dir():
        return "is a file; give the folder that holds config.json and the safetensors files"
    config = folder / "config.json"
    if not config.is_file():
        return "no config.json. Save the model there with save_pretrained"
    try:
        if "model_type" not in _object(config):
            return "config.json has no field model_type: it is not the configuration of a transformers model"
    except (ModelError, ValueError) as error:
        return f"config.json is not readable JSON ({error})"
    if (folder / ADAPTER).is_file():
        return (
            f"{ADAPTER}: it holds an adapter for another model. Merge the two (peft: merge_and_unload), and save the "
            "whole with save_pretrained in a folder of its own"
        )
    shards = {path.name for path in folder.glob(WEIGHTS) if path.is_file()}
    index = folder / INDEX
    if index.is_file():
        try:
            named = _object(index).get("weight_map")
        except (ModelError, ValueError) as error:
            return f"{INDEX} is not readable ({error})"
        if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
            return f"{INDEX}: weight_map: a mapping from names of weights to names of files is expected"
        lacking = sorted(set(named.values()) - shards)
        if lacking:
            return f"weights named in {INDEX} are missing: {', '.join(lacking[:20])}"
    if not shards:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        pickled = f" ({', '.join(pickles)} is pickled, which evomem does not read)" if pickles else ""
        return f"no weights: expected model.safetensors{pickled}. Save the model there with save_pretrained"
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return f"no tokenizer: expected one of {', '.join(TOKENIZERS)}. Save it there with save_pretrained"
    return None


def _object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file; raise `ModelError` or `ValueError` if it holds none."""
    try:
        content = json.loads(read_text(path, TEXT_BYTES, ModelError))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"an object is expected, this is {type(content).__name__}")
    return content


def _from_hub(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        local = Path(snapshot_download(name, local_files_only=True))
        if missing_files(local) is None:
            return local
    except (LocalEntryNotFoundError, ValueError):
        pass
    tried = f"model {name!r}: not an alias, no such folder, not in the local hub cache"
    try:
        # One question with a deadline, so that a machine without network hears so in seconds.
        HfApi().model_info(name, timeout=SECONDS)
        local = Path(snapshot_download(name, allow_patterns=PATTERNS, etag_timeout=SECONDS))
    except GatedRepoError as error:
        raise ModelError(
            f"{tried}; the hub asks for a licence first. Accept it there and run: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{tried}; the hub has no such model, or it is private. {_known(name)}") from error
    except Exception as error:  # the hub client lets its transport's own exceptions through; their classes change
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{tried}, and the hub cannot be reached ({reason}). Give a local folder, fetch the model on a machine "
            f"with network (hf download {name}), or use an alias. {_known(name)}"
        ) from error
    missing = missing_files(local)
    if missing:
        raise ModelError(f"model {name!r} on the hub: {missing}")
    return local


def _known(name: str) -> str:
    close = get_close_matches(name, aliases, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Aliases: {', '.join(sorted(aliases))}."
