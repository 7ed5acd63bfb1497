"""Model: a frozen causal language model, its tokenizer, and the identity of its weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from evomem.devices import chosen_device, devices_of, kind_of
from evomem.errors import ConfigError, ModelError
from evomem.models.aliases import Shipped, aliases
from evomem.models.exact import check_numbers, check_report, check_sizes, check_types, nothing_random, weight_shapes
from evomem.models.pretrained.files import WEIGHTS, folder_digest
from evomem.models.pretrained.folders import resolve
from evomem.models.pretrained.gguf import cached_folders, damage, loader_report, quiet

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

OWN_ARCHITECTURES = {
    "evomem_decision_transformer": "evomem.models.architectures.decision_transformer",
    "evomem_mosaic": "evomem.models.architectures.mosaic",
    "evomem_pair_memory": "evomem.models.architectures.pair_memory",
    "evomem_memory_matrix": "evomem.models.architectures.memory_matrix",
    "evomem_titans": "evomem.models.architectures.titans",
    "evomem_fam": "evomem.models.architectures.fam",
}
"""Model types that transformers does not know, and the module of ours that makes them known."""


@dataclass(frozen=True)
class LoadedModel:
    """A frozen model, ready to be read with.

    Attributes
    ----------
    name : the name that it was loaded by (alias, folder or hub id).
    model : in eval mode, without gradients.
    tokenizer : pads on the left, and has a padding token.
    digest : hex SHA-256 of the weights' identity (`evomem.models.pretrained.files.folder_digest`); equal on every
        machine that has the same files, and independent of ``dtype``.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str

    @property
    def dtype(self) -> str:
        """Type of the weights: ``float32``, …; of quantised ones, the type that they are computed in."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def devices(self) -> list[torch.device]:
        """The devices that the weights lie on."""
        return devices_of(self.model)

    @property
    def device_type(self) -> str:
        """The type of the devices that it computes on: ``cpu``, ``cuda``, … (`evomem.devices.kind_of`)."""
        return kind_of(self.devices)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """How the weights are quantised, as the model's configuration says it; None: they are not."""
        config: Any = getattr(self.model.config, "quantization_config", None)
        return None if config is None else dict(config if isinstance(config, Mapping) else config.to_dict())


def load(
    name: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    quantization: Mapping[str, Any] | None = None,
    verify: bool = False,
) -> LoadedModel:
    """Load a causal language model and freeze it.

    Parameters
    ----------
    name : an alias (`evomem.models.available`), a local folder (config.json, safetensors, tokenizer), or a hub id.
    dtype : of the weights, as a type or its name; ``auto``: that of the checkpoint. None: float32 on the processor,
        where small models are studied, and ``auto`` on an accelerator.
    device : where to put it (``cpu``, ``cuda``, ``cuda:1``, …); None: the first GPU when there is one, else the CPU.
        With accelerate installed the weights are read straight to where they belong.
    attn : transformers' attention implementation ("sdpa", "eager", ...); its own choice when None.
    device_map : spreads a model that is too big for one device over several, as accelerate does ("auto", "balanced",
        or a mapping from modules to devices); then ``device`` must be None.
    quantization : transformers' ``quantization_config`` as plain values, e.g. ``{"load_in_8bit": True}``; None: as the
        folder's config.json says. Its library must be installed.
    verify : for an alias, compare every checksum of its cached files even when they look untouched.

    Raises
    ------
    ModelError
        The model is not there, incomplete, damaged, or not a causal language model; its files lack a weight, or hold
        one that the model has no place for; a weight is NaN or infinite.
    ConfigError : the device does not exist, or the type has no such name.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if device_map is not None and device is not None:
        raise ModelError(f"model {name!r}: give either a device or a device_map, not both")
    folder = resolve(name, verify=verify)
    target = chosen_device(device)
    kind = dtype_of(dtype, _accelerated(target, device_map))
    # `name` chose the folder; from here on nothing may touch the network, run code from the folder, or ask to.
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    options: dict[str, Any] = {} if attn is None else {"attn_implementation": attn}
    if device_map is not None:
        options["device_map"] = device_map if isinstance(device_map, str) else dict(device_map)
    elif quantization is not None or (target.type != "cpu" and find_spec("accelerate") is not None):
        options["device_map"] = {"": str(target)}
    if quantization is not None:
        options["quantization_config"] = dict(quantization)
    where = f"model {name!r} in {folder}"
    shapes = weight_shapes(folder)
    configuration = json.loads((folder / "config.json").read_text())
    check_sizes(folder, configuration, shapes)
    check_types(folder, configuration)
    report: list[str] = []
    try:
        module = OWN_ARCHITECTURES.get(configuration["model_type"])
        if module is not None:
            import_module(module)
        with quiet(), loader_report() as report:
            config = AutoConfig.from_pretrained(folder, **safe)
            with nothing_random(where, accelerators="device_map" in options):
                read: Any = AutoModelForCausalLM.from_pretrained
                model, report_of_weights = read(
                    folder, config=config, dtype=kind, use_safetensors=True, output_loading_info=True,
                    ignore_mismatched_sizes=True, **safe, **options,
                )  # fmt: skip
                check_report(where, model, report_of_weights, shapes)
            tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
    except ModelError:
        raise
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{where}: does not fit into the memory of {target}: {error}. Take a smaller type (--dtype bfloat16), "
            "spread it over several devices (device_map), or quantise it"
        ) from error
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
    if "device_map" not in options and devices_of(model) != [target]:
        model.to(target)
    check_numbers(where, model, sorted(folder.glob(WEIGHTS)))
    align(model)
    model.eval().requires_grad_(False)
    return LoadedModel(name, model, tokenizer, folder_digest(folder))


def dtype_of(name: torch.dtype | str | None, accelerated: bool = False) -> torch.dtype | Literal["auto"]:
    """Return the type of weights that a name stands for; None: ``auto`` on an accelerator, float32 on the processor.

    Raises
    ------
    ConfigError : no floating-point type of PyTorch has that name.
    """
    if name is None:
        return "auto" if accelerated else torch.float32
    if name == "auto":
        return "auto"
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype {str(name)!r}: is none for weights; write float32, bfloat16, float16, or auto")
    return dtype


def _accelerated(target: torch.device, device_map: str | Mapping[str, Any] | None) -> bool:
    """Whether weights will lie on an accelerator."""
    if isinstance(device_map, Mapping):
        return any(str(place) not in ("cpu", "disk") for place in device_map.values())
    return target.type != "cpu"


@contextmanager
def exactly(where: str) -> Iterator[None]:
    """Raise `ModelError` if weights are filled in while somebody else loads a model inside the ``with`` block.

    For loaders that are not ours, such as another project's: what `transformers` reports is looked at, and passed on.
    """
    with loader_report() as report:
        yield
    for line in report:
        if "LOAD REPORT" in line and ("MISSING" in line or "MISMATCH" in line):
            raise ModelError(f"{where}: its files are not exactly the model; the rest would be random:\n{line}")
        log.warning("%s: %s", where, line)


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
    models = []
    for alias in aliases.values():
        source = alias.source()
        if isinstance(alias, Shipped):
            folder = source
        else:
            folder = next((path for path in cached_folders(alias) if damage(path) is None), None)
        if folder is not None:
            size = sum(path.stat().st_size for path in folder.iterdir())
            models.append(ModelInfo(alias.name, alias.about, "ready", folder, size, alias.install))
        elif source is not None:
            size = source.stat().st_size
            models.append(ModelInfo(alias.name, alias.about, "installed", source, size, alias.install))
        else:
            models.append(ModelInfo(alias.name, alias.about, "missing", None, 0, alias.install))
    return models
