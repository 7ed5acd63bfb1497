"""Model: whether what was loaded is exactly the model of its folder: every weight from its files, once, and a number.

`transformers` fills weights that a folder lacks with random numbers and ignores weights that the model does not have,
each with a line in a log. Two processes would then hold two models under one digest. Here both are errors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomem.errors import ModelError
from evomem.models.pretrained.files import INDEX, SINGLE

_HEADER = 100 << 20
"""Bytes of a safetensors header, at most; the format's own limit."""
_SHOWN = 8
"""Groups of names that a message lists."""
_BUFFERS = re.compile(r"(^|\.)(inv_freq|masked_bias|position_ids|causal_mask)$")
_MASKS = re.compile(r"(^|\.)(attn|attention|crossattention)\.bias$")
"""Names of tensors that older versions of a model saved and that it makes anew: no weights."""

_COUNTS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"}
_WIDTHS = {
    "vocab_size", "hidden_size", "intermediate_size", "n_embd", "n_inner", "d_model", "d_ff", "ffn_dim", "n_positions",
    "num_attention_heads", "num_key_value_heads", "n_head", "head_dim", "moe_intermediate_size", "num_experts",
    "num_local_experts", "state_codes", "return_codes", "max_ep_len", "act_dim", "state_dim",
}  # fmt: skip
"""Fields of configurations that say how many layers there are, and how large tables of weights are."""
_ENTRIES, _INTEGER = 4096, 2**53

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types, as safetensors names them, that weights without a quantisation are stored in."""

Shapes = dict[str, tuple[int, ...]]


# ---- files ---------------------------------------------------------------------------------------------------------


def weight_shapes(folder: Path) -> Shapes:
    """Return names and shapes of the tensors in the files that `transformers` reads from a model folder.

    Raises
    ------
    ModelError : a name is there twice, the index contradicts its files, or there are two sets of weights.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise ModelError(
            f"model folder {folder}: holds two sets of weights, {SINGLE} and the files of {INDEX}; remove one of them"
        )
    if not index.is_file():
        return _header(single) if single.is_file() else {}
    claimed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    shapes: Shapes = {}
    holder: dict[str, str] = {}
    for file in sorted(set(claimed.values())):
        for name, shape in _header(folder / file).items():
            if name in holder:
                raise ModelError(f"model folder {folder}: {name} is in two files, {holder[name]} and {file}")
            shapes[name], holder[name] = shape, file
    for name, file in claimed.items():
        if holder.get(name) != file:
            place = f"is in {holder[name]}" if name in holder else "is in none of its files"
            raise ModelError(f"model folder {folder}: {name}: {INDEX} says that it is in {file}, it {place}")
    return shapes


def _header(path: Path) -> Shapes:
    """Return names and shapes of a safetensors file, without its numbers."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _HEADER:
            raise ModelError(f"{path}: is no safetensors file: a header of {length:,} bytes")
        content, size = file.read(length), path.stat().st_size
    try:
        entries = json.loads(content, object_pairs_hook=_no_name_twice)
        entries.pop("__metadata__", None)
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: its header is damaged ({str(error)[:200]})") from None
    if size != end:
        raise ModelError(f"{path}: has {size:,} bytes, its header tells of {end:,}; fetch the file again")
    return shapes


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return mapping


def check_types(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `ModelError` if weights are stored as whole numbers, flags or 8-bit floats without a quantisation.

    `transformers` would convert them to the model's type, whatever they stand for.
    """
    if "quantization_config" in config:
        return
    index = folder / INDEX
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {SINGLE}
    for path in sorted(folder / file for file in files if (folder / file).is_file()):
        for name, kind in _types(path).items():
            if name.endswith(".weight") and kind not in _FLOATS:
                raise ModelError(
                    f"{path}: {name} is stored as {kind}, and config.json says nothing of a quantisation; weights are "
                    f"{', '.join(sorted(_FLOATS))}. Save the model again with save_pretrained"
                )


def _types(path: Path) -> dict[str, str]:
    """Return the types of a safetensors file's tensors by name; its header has been checked."""
    with path.open("rb") as file:
        entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: str(entry["dtype"]) for name, entry in entries.items() if name != "__metadata__"}


def check_sizes(folder: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """Raise `ModelError` if a configuration asks for much more than its files hold, before a model is made of it.

    A million layers, or a vocabulary of a billion, would fill the memory before anything is compared. Layers are
    counted; every other whole number, times the width, must not be far beyond the numbers in the files.
    """
    stored = sum(math.prod(shape) for shape in shapes.values())
    layers = _layers_of(shapes)
    width = max((shape[-1] for shape in shapes.values() if shape), default=1)
    quantised = "quantization_config" in config
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{path}.{key}".lstrip("."), part) for key, part in value.items()]
        elif isinstance(value, list):
            waiting += [(path, part) for part in value if isinstance(part, dict)]
            if len(value) > _ENTRIES:
                raise ModelError(f"model folder {folder}: config.json: {path}: a list of {len(value):,} entries")
        elif isinstance(value, int) and not isinstance(value, bool):
            name = path.rpartition(".")[2]
            counts = name in _COUNTS and layers and value > 2 * layers + 8
            if abs(value) > _INTEGER or (name in _COUNTS and value > _ENTRIES) or counts:
                has = f"; its files hold {layers}" if counts else ""
                raise ModelError(f"model folder {folder}: config.json: {path}: {value!r} is too large{has}")
            # Positions are no weights with rotary embeddings, and a table of them is small beside a model.
            if name in _WIDTHS and not quantised and value * width > 8 * stored + 2**24:
                raise ModelError(
                    f"model folder {folder}: config.json: {path}: {value:,} is more than its files can hold "
                    f"({stored:,} numbers)"
                )


# ---- what was loaded -----------------------------------------------------------------------------------------------


@contextmanager
def nothing_random(where: str, *, accelerators: bool = False) -> Iterator[None]:
    """Raise `ModelError` if random numbers are drawn inside the ``with`` block: nothing of a saved model is random."""

    def states() -> list[Tensor]:
        cuda = accelerators and torch.cuda.is_available()
        return [torch.random.get_rng_state(), *(torch.cuda.get_rng_state_all() if cuda else ())]

    before = states()
    yield
    if not all(map(torch.equal, before, states())):
        raise ModelError(
            f"{where}: numbers were drawn at random while it was loaded, so two processes would not hold the same "
            "model; save it again with save_pretrained"
        )


def check_report(where: str, model: Any, report: Mapping[str, Any], shapes: Shapes) -> None:
    """Raise `ModelError` unless every weight of a model came from its files, and everything in them is one.

    Tied weights are in the files once. Masks and rotary frequencies that older versions saved are no weights.

    Parameters
    ----------
    report : what `from_pretrained` gives with ``output_loading_info``.
    shapes : of the tensors in the files (`weight_shapes`).
    """
    lines = []
    missing, kept = sorted(report["missing_keys"]), model.state_dict()
    unexpected = sorted(name for name in report["unexpected_keys"] if not _is_buffer(name, shapes))
    if missing:
        lines.append(f"missing in the files, would be random: {_listed(missing)}")
    if unexpected:
        lines.append(f"in the files, the model has no place for it: {_listed(unexpected)}")
    for name, stored, expected in sorted(report["mismatched_keys"]):
        lines.append(f"of another shape: {name} is {tuple(stored)} in the files and {tuple(expected)} in the model")
    prefix = f"{model.base_model_prefix}."
    twice = [name for name in shapes if prefix + name in shapes and not {name, prefix + name} <= kept.keys()]
    if twice:
        lines.append(f"in the files twice, with and without {prefix!r}: {_listed(twice)}")
    lines += [str(message) for message in report.get("error_msgs", ())]
    if not lines:
        return
    shown = lines[:_SHOWN] + ([f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])
    raise ModelError(
        f"{where}: its files are not exactly the {type(model).__name__} of its config.json"
        + "".join(f"\n  {line}" for line in shown)
        + f"\n{_layers(model, shapes)}Save the model again with save_pretrained, or put the right config.json there."
    )


def _is_buffer(name: str, shapes: Shapes) -> bool:
    """Whether a tensor that a model has no place for is one that it makes itself."""
    if _BUFFERS.search(name):
        return True
    # The names in the report may have lost or gained the base model's prefix.
    shape = next((shape for key, shape in shapes.items() if key.endswith(name) or name.endswith(key)), ())
    return bool(_MASKS.search(name)) and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]


def _layers(model: Any, shapes: Shapes) -> str:
    """Say how many layers the configuration and the files have, where that may be the fault."""
    configured, stored = getattr(model.config, "num_hidden_layers", None), _layers_of(shapes)
    if not isinstance(configured, int) or not stored or stored == configured:
        return ""
    return f"The configuration says {configured} layers, the files hold layers up to number {stored - 1}, from 0. "


def _layers_of(shapes: Shapes) -> int:
    """Return how many layers the names of weights count; 0 where they count none."""
    matches = (re.search(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d{1,6})\.", name) for name in shapes)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def check_numbers(where: str, model: torch.nn.Module, files: Iterable[Path] = ()) -> None:
    """Raise `ModelError` if a weight is NaN or infinite, or a buffer that is saved is NaN.

    A sum over a tensor is a finite number only if all of its numbers are, and is read once.

    Parameters
    ----------
    files : of the weights; they are read for what the model does not hold in memory.
    """
    weights = dict(model.named_parameters())
    saved = {name: value for name, value in model.state_dict().items() if name not in weights}
    sums: dict[torch.device, list[tuple[str, Tensor, Tensor]]] = {}
    elsewhere = False
    for name, tensor in {**weights, **saved}.items():
        elsewhere |= tensor.is_meta
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_floating_point()
        if plain and not tensor.is_meta and tensor.numel():
            sums.setdefault(tensor.device, []).append((name, tensor, _sum(tensor)))
    for entries in sums.values():
        finite = torch.stack([total for *_, total in entries]).isfinite().tolist()  # one wait for each device
        for (name, tensor, _), good in zip(entries, finite, strict=True):
            if not good:
                _check_one(where, name, tensor, infinite=name in weights)
    if elsewhere:
        _check_files(where, files)


def _sum(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.float().sum() if tensor.dtype.itemsize < 2 else tensor.sum(dtype=torch.float32)


def _check_one(where: str, name: str, tensor: Tensor, *, infinite: bool) -> None:
    """Count what is wrong; a sum may also overflow."""
    values = tensor.detach().float() if tensor.dtype.itemsize < 4 else tensor.detach()
    count = int((~values.isfinite() if infinite else values.isnan()).sum())
    if count:
        raise ModelError(
            f"{where}: {name}: {count:,} of {values.numel():,} numbers are NaN{' or infinite' if infinite else ''}, as "
            f"{str(tensor.dtype).removeprefix('torch.')}; the files are damaged, or the numbers are too large for this "
            "type (try dtype float32)"
        )


def _check_files(where: str, files: Iterable[Path]) -> None:
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (it is no mapping)
                tensor = stored.get_tensor(name)
                if tensor.is_floating_point() and not _sum(tensor).isfinite():
                    _check_one(where, name, tensor, infinite=not _BUFFERS.search(name))


def _listed(names: Iterable[str]) -> str:
    """Return names for a message, those that differ in numbers together: ``layers.{0, 1, 2}.mlp.weight``."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "*", name, count=1), []).append(name)
    shown = []
    for pattern, members in groups.items():
        numbers = [number[0] for member in members if (number := re.search(r"\d+", member))]
        many = ", ".join(numbers[:4]) + (f", … {numbers[-1]}" if len(numbers) > 4 else "")
        shown.append(members[0] if len(members) == 1 else pattern.replace("*", f"{{{many}}}", 1))
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return f"{sum(map(len, groups.values()))} tensors: {', '.join(shown[:_SHOWN])}{more}"
