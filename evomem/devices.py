"""Base: the devices that tensors lie on: which there are, how much memory they have, and what happens when it ends."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from evomem.errors import ConfigError, OutOfMemoryError

if TYPE_CHECKING:
    from torch import nn

CPU = torch.device("cpu")


def stacked(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Return what every layer gave as one tensor with a new axis ``dim``, on the first layer's device.

    A model that is too big for one device has layers on several. On one device nothing is copied and nobody waits.
    """
    device = parts[0].device
    return torch.stack([part.to(device) for part in parts], dim)


# ---- which there are -----------------------------------------------------------------------------------------------


def chosen_device(name: torch.device | str | None) -> torch.device:
    """Return the device of a name such as ``cpu``, ``cuda`` or ``cuda:1``; None: the first GPU if there is one.

    Raises
    ------
    ConfigError : it is no device, or PyTorch sees none of that name on this machine.
    """
    if name is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {str(name)!r}: is none; write cpu, cuda, cuda:1, …") from None
    if device.type == "cpu":
        return CPU
    module, count = _module(device), 0
    with suppress(Exception):
        count = int(module.device_count()) if module.is_available() else 0
    if (device.index or 0) >= count:
        there = f"it sees {count} of that kind" if count else "it sees none of that kind"
        raise ConfigError(f"device {str(device)!r}: PyTorch has no such device on this machine ({there}); write cpu")
    if device.index is not None:
        return device
    return torch.device(device.type, int(getattr(module, "current_device", lambda: 0)()))


def devices_of(module: nn.Module) -> list[torch.device]:
    """Return the devices that a model's weights lie on, sorted by name; those that are not in memory do not count."""
    devices = {parameter.device for parameter in module.parameters()}
    return sorted((device for device in devices if device.type != "meta"), key=str) or [CPU]


def kind_of(devices: Iterable[torch.device]) -> str:
    """Return the type of the devices that a model computes on, e.g. ``cuda``: of an accelerator, if one is among them.

    Numbers of two kinds differ in their last digits, and those of two devices of a kind need not.
    """
    kinds = sorted({device.type for device in devices} - {"cpu"})
    return "+".join(kinds) or "cpu"


def named(devices: Iterable[torch.device]) -> str:
    """Return the devices for a record: ``cpu``, or ``cuda:0 (NVIDIA H200), cuda:1 (NVIDIA H200)``."""
    return ", ".join(_named(device) for device in devices)


def _named(device: torch.device) -> str:
    with suppress(Exception):
        return f"{device} ({_module(device).get_device_name(device)})"
    return str(device)


def _module(device: torch.device) -> Any:
    """Return what PyTorch offers for a kind of device, as ``torch.cuda`` is for CUDA."""
    return getattr(torch, device.type, None)


# ---- memory --------------------------------------------------------------------------------------------------------


def free_bytes(device: torch.device) -> int | None:
    """Return how many bytes could be allocated on a device now; None where PyTorch cannot say."""
    if device.type == "cpu":
        return _free_host()
    module = _module(device)
    try:
        free = int(module.mem_get_info(device)[0])
        # What the allocator has from the driver and does not use is free, too.
        return free + int(module.memory_reserved(device)) - int(module.memory_allocated(device))
    except Exception:
        return None


def allocated_bytes(device: torch.device) -> tuple[int, int] | None:
    """Return the bytes in use on an accelerator, and their peak since `reset_peak`; None where PyTorch cannot say."""
    module = _module(device)
    try:
        return int(module.memory_allocated(device)), int(module.max_memory_allocated(device))
    except Exception:
        return None


def reset_peak(device: torch.device) -> None:
    """Measure the peak of `allocated_bytes` anew from here."""
    with suppress(Exception):
        _module(device).reset_peak_memory_stats(device)


def let_go(error: BaseException) -> None:
    """Free what a failed computation holds: its tensors live as long as the frames of the error's traceback."""
    one: BaseException | None = error
    while one is not None:
        traceback.clear_frames(one.__traceback__)
        one = one.__cause__ or one.__context__
    gc.collect()
    with suppress(Exception):
        kind = torch.accelerator.current_accelerator()
        if kind is not None:
            _module(kind).empty_cache()


def _free_host() -> int | None:
    """Return the machine's available memory, within the limit of the control group that this process is in."""
    limits = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with suppress(OSError, ValueError):  # version 2; "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        limits.append(max(0, limit))
    if not limits:
        with suppress(OSError, ValueError, AttributeError):
            limits.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits) if limits else None


_DEVICE = ("out of memory", "OutOfMemoryError", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
_HOST = ("DefaultCPUAllocator", "Cannot allocate memory", "not enough memory")


def memory_that_ended(error: BaseException) -> Literal["device", "host"] | None:
    """Tell whose memory an error says has ended: the device's or the machine's own; None: it is about something else.

    An error from a worker may have lost its type on the way and is told by its text.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return "device"
    if isinstance(error, MemoryError):
        return "host"
    if isinstance(error, RuntimeError):
        text = str(error)
        if any(words in text for words in _HOST):
            return "host"
        if any(words in text for words in _DEVICE):
            return "device"
    return None


CURES = {
    "device": "Take shorter contexts, smaller budgets, a smaller type (model.dtype) or quantised weights, several "
    "devices (model.device_map), fewer workers on a GPU, or a smaller store_bytes: contexts that were read lie on the "
    "device too.",
    "host": "Take shorter contexts, smaller budgets, fewer workers, a smaller store_bytes, or a machine with more "
    "memory.",
}
"""What to do when the memory of a device, or the machine's own, has ended."""


def out_of_memory(error: BaseException, what: str) -> OutOfMemoryError | None:
    """Return the error for users if one says that memory has ended, else None.

    What the failed computation held is let go of, so that a smaller one finds room.
    """
    memory = memory_that_ended(error)
    if memory is None:
        return None
    name = "a device has" if memory == "device" else "this machine has"
    text = str(error).strip().splitlines()
    message = f"{what}: {name} no memory left ({text[0] if text else type(error).__name__})."
    let_go(error)
    return OutOfMemoryError(message, memory)
