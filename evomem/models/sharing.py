"""Model: a loaded model taken apart into arrays that processes can share, and put together again around them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from evomem.errors import ModelError
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
    wanted: torch.dtype = getattr(torch, dtype)
    return tensor.view(wanted) if wanted in _BITS else tensor


def dismantle(loaded: LoadedModel) -> dict[str, Any]:
    """Return the parts of a model: arrays by name, and everything else small.

    Weights that are tied are one array, so that they stay one in memory.
    """
    model = loaded.model
    arrays: dict[int, tuple[NDArray[Any], str]] = {}
    names: dict[str, int] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if tensor.device.type == "meta":
            raise ModelError(
                f"model {loaded.name!r}: {name} is not in memory (offloaded by its device map), so it cannot be shared "
                "between workers; let every worker load the model: set model.device_map"
            )
        number = id(tensor)
        if number not in arrays:
            arrays[number] = to_array(tensor)
        names[name] = number
    return {
        "name": loaded.name,
        "digest": loaded.digest,
        "dtype": str(model.dtype).removeprefix("torch."),
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
    """
    from transformers import AutoModelForCausalLM  # seconds to import

    dtype = getattr(torch, parts["dtype"])
    with torch.device("meta"):
        make: Any = AutoModelForCausalLM.from_config
        model = make(copy.deepcopy(parts["config"]), dtype=dtype, attn_implementation=parts["attention"])
    tensors = {number: to_tensor(array, name) for number, (array, name) in parts["arrays"].items()}
    target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if target.type != "cpu":
        tensors = {number: tensor.to(target) for number, tensor in tensors.items()}
    parameters: dict[int, torch.nn.Parameter] = {}
    for name, number in parts["names"].items():
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
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
