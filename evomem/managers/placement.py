"""Manager: parameters and buffers follow the view, to whatever device its layer lies on.

A plug-in is loaded on the processor and a model runs on a GPU, or on several. Nobody has to move anything: whenever a
manager is asked about a view, the methods of the contract run on a *twin* of it whose tensors lie on the view's device.
The manager itself is not changed. Copies are made once per device and kept until a number of the original changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
Method = TypeVar("Method", bound=Callable[..., Any])

_Copies = dict[str, tuple[Tensor, Tensor]]
"""By name: the numbers that were copied, and the copy on the device."""

_copies: WeakKeyDictionary[nn.Module, dict[torch.device, _Copies]] = WeakKeyDictionary()


def on_device(module: Module, device: torch.device) -> Module:
    """Return a module whose parameters and buffers lie on ``device``: itself if they do, else its twin.

    The twin shares everything else with the original, which stays as it is. Where gradients are recorded, those of the
    twin's parameters reach the original's.
    """
    if _lies_on(module, device):
        return module
    return _twin(module, device, _copies.setdefault(module, {}).setdefault(device, {}), "", {})


def follows_view(method: Method) -> Method:
    """Let a method ``(self, view, ...)`` run on the twin of ``self`` on the view's device."""
    if getattr(method, "follows_view", False):
        return method

    @wraps(method)
    def placed(self: Any, view: Any, *arguments: Any, **options: Any) -> Any:
        return method(on_device(self, view.slots.device), view, *arguments, **options)

    placed.follows_view = True  # type: ignore[attr-defined]
    return placed  # type: ignore[return-value]


def _lies_on(module: nn.Module, device: torch.device) -> bool:
    """Tell whether all tensors lie on the device; every decision asks several times, so it must cost little."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.device != device:
            return False
    for tensor in module._buffers.values():
        if tensor is not None and tensor.device != device:
            return False
    return all(child is None or _lies_on(child, device) for child in module._modules.values())


def _twin(module: Module, device: torch.device, copies: _Copies, prefix: str, made: dict[int, nn.Module]) -> Module:
    if id(module) in made:
        return made[id(module)]  # type: ignore[return-value]
    twin: Module = module.__new__(type(module))
    made[id(module)] = twin
    attributes = dict(module.__dict__)
    for group in ("_parameters", "_buffers"):
        tensors = attributes[group].items()
        attributes[group] = {n: None if t is None else _moved(t, device, copies, prefix + n) for n, t in tensors}
    children = module._modules.items()
    attributes["_modules"] = {
        n: None if child is None else _twin(child, device, copies, f"{prefix}{n}.", made) for n, child in children
    }
    for name, value in attributes.items():
        if isinstance(value, Tensor):  # kept as a plain attribute, which `Module.to` would leave behind
            attributes[name] = _moved(value, device, copies, f"{prefix}{name}")
    twin.__dict__ = attributes
    return twin


def _moved(tensor: Tensor, device: torch.device, copies: _Copies, name: str) -> Tensor:
    """Return a tensor on the device: the kept copy, as long as the numbers have not changed."""
    graded = tensor.requires_grad and torch.is_grad_enabled()
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    # Numbers on another accelerator are not compared, for which the processor would have to wait; they are copied anew.
    if tensor.device == device or graded or wrapped or tensor.device.type != "cpu":
        return tensor.to(device)
    before, copy = copies.get(name, (None, None))
    if before is None or copy is None or not _equal(before, tensor):
        with torch.inference_mode(False):  # a copy that is made while nothing is recorded serves later gradients too
            before = tensor.detach().clone()
            copy = before.to(device)
        copies[name] = before, copy
    return copy


def _equal(before: Tensor, now: Tensor) -> bool:
    return before.dtype == now.dtype and before.shape == now.shape and torch.equal(before, now)
