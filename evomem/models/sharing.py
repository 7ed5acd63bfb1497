"""Model: a loaded model taken apart into arrays that processes can share, and put together again around them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from evomem.devices import chosen_device, kind_of
from evomem.errors import ConfigError, ModelError
from evomem.memory.kv.parallel import degree
from evomem.models.loading import LoadedModel, align

# NumPy has no bfloat16: such tensors travel as their bits.
_BITS = {torch.bfloat16: torch.int16}


def to_array(tensor: Tensor) -> tuple[NDArray[Any], str]:
    """Return a tensor's numbers, and its type's name, which the array alone would not tell."""
    bits = _BITS.get(tensor.dtype)
    plain = tensor.detach().cpu().contiguous()
    return (plain if bits is None else plain.view(bits)).numpy(), str(tensor.dtype).removeprefix("torch.")


def to_tensor(array: NDArray[Any], dtype: str) -> Tensor:
    """Undo `to_array` without copying; where the array is read-only the tensor must never be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        tensor = torch.from_numpy(array)
    target: torch.dtype = getattr(torch, dtype)
    return tensor.view(target) if target in _BITS else tensor


def why_not_shareable(loaded: LoadedModel) -> str:
    """Return why a model cannot be taken apart and put together around the same weights; nothing if it can.

    Such a model is loaded by every worker itself.
    """
    model: Any = loaded.model
    if degree(model) > 1:
        return "it is split over processes (tensor parallel)"
    away = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
    if away is not None:
        return f"{away} is not in memory (offloaded by its device_map)"
    if len(loaded.devices) > 1:
        return "it is spread over several devices (device_map)"
    if loaded.quantization is not None or getattr(model, "hf_quantizer", None) is not None:
        return "it is quantised"
    for name, tensor in model.named_parameters():
        if not tensor.is_floating_point() or type(tensor) not in (torch.nn.Parameter, Tensor):
            # A plain module of the same name would take packed numbers for weights.
            kind = type(tensor).__name__
            return f"{name} is no ordinary weight ({kind} of {str(tensor.dtype).removeprefix('torch.')})"
    return ""


def dismantle(loaded: LoadedModel) -> dict[str, Any]:
    """Return the parts of a model: arrays by name, and everything else small.

    Weights that are tied are one array, so that they stay one in memory.

    Raises
    ------
    ModelError : the parts would not make the same model again (`why_not_shareable`).
    """
    model = loaded.model
    reason = why_not_shareable(loaded)
    if reason:
        raise ModelError(
            f"model {loaded.name!r}: {reason}, so its weights cannot be shared between workers; every worker must load "
            "it itself"
        )
    arrays: dict[int, tuple[NDArray[Any], str]] = {}
    names: dict[str, int] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        number = id(tensor)
        if number not in arrays:
            arrays[number] = to_array(tensor)
        names[name] = number
    return {
        "name": loaded.name,
        "digest": loaded.digest,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": kind_of(loaded.devices),
        "attention": model.config._attn_implementation,
        "config": copy.deepcopy(model.config),
        "generation_config": copy.deepcopy(model.generation_config),
        "tokenizer": loaded.tokenizer,
        "arrays": arrays,
        "names": names,
    }


def assemble(parts: Mapping[str, Any], device: torch.device | str | None = None) -> LoadedModel:
    """Return the model of `dismantle`'s parts, its weights being the very arrays, on the CPU, or copies on a GPU.

    The module is made without memory (on torch's meta device) and given the arrays: a few milliseconds and
    megabytes, whatever the model's size.

    Parameters
    ----------
    device : where to; None: the kind of device that the model was taken apart on, so that numbers are the same.

    Raises
    ------
    ModelError : this process has no such device; a part is missing, or is none of this model.
    """
    from transformers import AutoModelForCausalLM  # seconds to import

    dtype = getattr(torch, parts["dtype"])
    with torch.device("meta"):
        make: Any = AutoModelForCausalLM.from_config
        model = make(copy.deepcopy(parts["config"]), dtype=dtype, attn_implementation=parts["attention"])
    tensors = {number: to_tensor(array, name) for number, (array, name) in parts["arrays"].items()}
    try:
        target = chosen_device(device if device is not None else parts["device"])
    except ConfigError as error:
        raise ModelError(
            f"model {parts['name']!r}: the search runs on {parts['device']}, and this worker has none ({error}). Give "
            "every worker a GPU (--gpus-per-worker 1), or search on the processor (--device cpu)"
        ) from None
    if target.type != "cpu":
        tensors = {number: tensor.to(target) for number, tensor in tensors.items()}
    parameters: dict[int, torch.nn.Parameter] = {}
    for name, number in parts["names"].items():
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        parameter, array = module._parameters.get(last), tensors[number]
        if parameter is not None and (parameter.shape != array.shape or not array.is_floating_point()):
            raise ModelError(
                f"model {parts['name']!r}: {name} is {array.dtype} {tuple(array.shape)} among the shared parts, and "
                f"{parameter.dtype} {tuple(parameter.shape)} in the model of its configuration"
            )
        if last in module._parameters:
            if number not in parameters:
                parameters[number] = torch.nn.Parameter(tensors[number], requires_grad=False)
            module._parameters[last] = parameters[number]
        else:
            module._buffers[last] = tensors[number]
    missing = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if missing:
        raise ModelError(f"model {parts['name']!r}: {', '.join(missing[:3])} is not among the shared parts")
    align(model)
    model.generation_config = copy.deepcopy(parts["generation_config"])
    return LoadedModel(parts["name"], model.eval(), parts["tokenizer"], parts["digest"])
