"""Testing: pretend devices as a backend of PyTorch, which asks it for memory, counts and names as it asks CUDA's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from evomem.testing.pretend import PretendDevices

    Active = Callable[[], PretendDevices | None]


class Backend:
    """The module ``torch.pretend``: what ``torch.cuda`` is for CUDA.

    Parameters
    ----------
    active : returns the devices that exist now, or None.
    """

    def __init__(self, active: Active) -> None:
        self._active = active

    def is_initialized(self) -> bool:
        """Tell that nothing has to be initialised."""
        return True

    def is_available(self) -> bool:
        """Tell whether there are pretend devices now."""
        return self._active() is not None

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Do nothing: numbers come from the processor's generator."""

    def current_device(self) -> int:
        """Return 0: there is no current device to choose."""
        return 0

    def device_count(self) -> int:
        """Return how many pretend devices there are now."""
        devices = self._active()
        return 0 if devices is None else devices.count

    def get_device_name(self, device: Any = 0) -> str:
        """Return the name of every device."""
        return "Pretend"

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Return the types of automatic mixed precision."""
        return [torch.float16, torch.bfloat16]

    def synchronize(self, device: Any = 0) -> None:
        """Wait for a device, which the log notes."""
        devices = self._active()
        if devices is not None:
            devices.log.syncs.append("synchronize")

    def empty_cache(self) -> None:
        """Do nothing: freed memory is free at once."""

    def mem_get_info(self, device: Any = 0) -> tuple[int, int]:
        """Return free and total memory in bytes."""
        devices = self._active()
        if devices is None or devices.capacity is None:
            return 1 << 40, 1 << 40
        return devices.capacity - devices.allocated(device), devices.capacity

    def memory_allocated(self, device: Any = 0) -> int:
        """Return the bytes of all tensors on a device."""
        devices = self._active()
        return 0 if devices is None else devices.allocated(device)

    memory_reserved = memory_allocated

    def max_memory_allocated(self, device: Any = 0) -> int:
        """Return the largest number of bytes that were on a device at once."""
        devices = self._active()
        return 0 if devices is None else devices.peak(device)

    def reset_peak_memory_stats(self, device: Any = 0) -> None:
        """Measure the peak anew from here."""
        devices = self._active()
        if devices is not None:
            devices.reset_peak(device)


class Hooks(torch._C._acc.PrivateUse1Hooks):
    """What PyTorch asks of a backend that lives outside of it; ``active`` as in `Backend`."""

    def __init__(self, active: Active) -> None:
        super().__init__()
        self._active = active

    def is_available(self) -> bool:
        """Tell whether there are pretend devices now."""
        return self._active() is not None

    def has_primary_context(self, device: int) -> bool:
        """Tell that every device is ready."""
        return True

    def is_built(self) -> bool:
        """Tell that PyTorch has the backend."""
        return True
