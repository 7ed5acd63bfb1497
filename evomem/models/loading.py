"""Model: a frozen causal language model, its tokenizer, and the identity of its weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from evomem.errors import ModelError
from evomem.models.aliases import Shipped, aliases
from evomem.models.dequantised import cached_folders, damage, loader_report, quiet
from evomem.models.exact import check_numbers, check_report, nothing_random, weight_shapes
from evomem.models.files import WEIGHTS, folder_digest
from evomem.models.folders import resolve

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

OWN = {"evomem_decision_transformer": "evomem.models.decision"}
"""Model types that transformers does not know, and the module of ours that makes them known."""


@dataclass(frozen=True)
class LoadedModel:
    """A frozen model, ready to be read with.

    Attributes
    ----------
    name : the name that it was loaded by (alias, folder or hub id).
    model : in eval mode, without gradients.
    tokenizer : pads on the left, and has a padding token.
    digest : hex SHA-256 of the weights' identity (`evomem.models.files.folder_digest`); equal on every machine that
        has the same files, and independent of ``dtype``.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str


def load(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    attn: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    verify: bool = False,
) -> LoadedModel:
    """Load a causal language model and freeze it.

    Parameters
    ----------
    name : an alias (`evomem.models.available`), a local folder (config.json, safetensors, tokenizer), or a hub id.
    dtype : of the weights.
    device : where to put it; the first GPU when there is one, else the CPU.
    attn : transformers' attention implementation ("sdpa", "eager", ...); its own choice when None.
    device_map : spreads a model that is too big for one device over several, as accelerate does ("auto", "balanced",
        or a mapping from modules to devices); then ``device`` must be None.
    verify : for an alias, compare every checksum of its cached files even when they look untouched.

    Raises
    ------
    ModelError
        The model is not there, incomplete, damaged, or not a causal language model; its files lack a weight, or hold
        one that the model has no place for; a weight is NaN or infinite.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if device_map is not None and device is not None:
        raise ModelError(f"model {name!r}: give either a device or a device_map, not both")
    folder = resolve(name, verify=verify)
    target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    # `name` chose the folder; from here on nothing may touch the network, run code from the folder, or ask to.
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    options: dict[str, Any] = {} if attn is None else {"attn_implementation": attn}
    if device_map is not None:
        options["device_map"] = device_map if isinstance(device_map, str) else dict(device_map)
    where = f"model {name!r} in {folder}"
    shapes = weight_shapes(folder)
    report: list[str] = []
    try:
        own = OWN.get(json.loads((folder / "config.json").read_text())["model_type"])
        if own is not None:
            import_module(own)
        with quiet(), loader_report() as report:
            config = AutoConfig.from_pretrained(folder, **safe)
            with nothing_random(where, accelerators=device_map is not None):
                read: Any = AutoModelForCausalLM.from_pretrained
                model, found = read(
                    folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True,
                    ignore_mismatched_sizes=True, **safe, **options,
                )  # fmt: skip
                check_report(where, model, found, shapes)
            tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
    except ModelError:
        raise
    except Exception as error:  # transformers, safetensors and tokenizers each raise their own classes
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:3]) or type(error).__name__
        raise ModelError("\n".join([f"{where}: {reason}", *report])) from error
    for line in report:
        if "LOAD REPORT" not in line:  # what that tells has passed `check_report`
            log.warning("%s: %s", where, line)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{where}: its tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if device_map is None:
        model.to(target)
    check_numbers(where, model, sorted(folder.glob(WEIGHTS)))
    align(model)
    model.eval().requires_grad_(False)
    return LoadedModel(name, model, tokenizer, folder_digest(folder))


ALIGNMENT = 64
"""Bytes: where PyTorch and Ray place numbers in memory."""


def align(model: torch.nn.Module) -> None:
    """Move weights that lie at odd addresses of a mapped file to even ones.

    Vectorised sums go in another order at other addresses. So that a process with the mapped file and a worker with
    shared memory compute the same bits, both must have their weights aligned.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


@dataclass(frozen=True)
class ModelInfo:
    """One line of ``evomem models``.

    Attributes
    ----------
    name : the alias.
    about : what it is.
    state : ``ready`` (a folder to load from), ``installed`` (dequantised at its first use) or ``missing``.
    where : the folder that comes with evomem, or the cached one, or else the GGUF file; None when missing.
    bytes : what ``where`` takes on disk; 0 when missing.
    install : the command that brings a missing one.
    """

    name: str
    about: str
    state: Literal["ready", "installed", "missing"]
    where: Path | None
    bytes: int
    install: str


def available() -> list[ModelInfo]:
    """Return every alias with its state, without loading or dequantising anything."""
    found = []
    for alias in aliases.values():
        source = alias.source()
        if isinstance(alias, Shipped):
            folder = source
        else:
            folder = next((path for path in cached_folders(alias) if damage(path) is None), None)
        if folder is not None:
            size = sum(path.stat().st_size for path in folder.iterdir())
            found.append(ModelInfo(alias.name, alias.about, "ready", folder, size, alias.install))
        elif source is not None:
            size = source.stat().st_size
            found.append(ModelInfo(alias.name, alias.about, "installed", source, size, alias.install))
        else:
            found.append(ModelInfo(alias.name, alias.about, "missing", None, 0, alias.install))
    return found
