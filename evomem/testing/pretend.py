"""Testing: pretend accelerators, so that code which would fail on a GPU fails on a machine without one.

>>> with PretendDevices(2) as devices:                                             # doctest: +SKIP
...     model.to("pretend:0")
...     with manager.attach(model) as cache: ...
...     devices.log.copies, devices.log.syncs

A tensor on ``pretend:0`` or ``pretend:1`` holds ordinary numbers in the processor's memory and computes with PyTorch's
own kernels, so results equal the processor's to the bit. What it does not hide is where it lies: whatever mixes devices
raises, by CUDA's rules. Kernel launches, waits for the device, and copies are counted; each device may have a size, and
runs out of memory as a GPU does.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from evomem.testing.device_rules import ANYWHERE, RESHAPING, WAITING, Operation, aten, check_one_device
from evomem.testing.pretend_backend import Backend, Hooks

NAME = "pretend"
"""Type of the devices: ``torch.device("pretend:0")``."""

_aliased: Callable[..., Any] = return_and_correct_aliasing
_MANY = (list, tuple)


@dataclass
class Log:
    """What was done on pretend devices.

    Attributes
    ----------
    launches : kernels by device and operation.
    syncs : operations that the processor waited for, in order: ``item`` and ``tolist`` among them.
    copies : (from, to, bytes) of every transfer between devices, in order.
    """

    launches: Counter[tuple[str, str]] = field(default_factory=Counter)
    syncs: list[str] = field(default_factory=list)
    copies: list[tuple[str, str, int]] = field(default_factory=list)

    def clear(self) -> None:
        """Forget what was done so far."""
        self.launches.clear()
        self.syncs.clear()
        self.copies.clear()


class PretendTensor(Tensor):
    """A tensor that says that it lies on a pretend device; ``numbers`` are its values, on the processor."""

    numbers: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, numbers: Tensor, device: torch.device) -> PretendTensor:
        """Return the tensor that calls its numbers its own on ``device``."""
        make: Any = Tensor._make_wrapper_subclass
        wrapper: PretendTensor = make(
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype,
            device=device,
        )  # fmt: skip
        wrapper.numbers = numbers
        return wrapper

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return NotImplemented if _has_other_tensors(types) else _run(func, args, dict(kwargs or {}), _active)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy = _on_device(self.numbers.detach().clone(), self.device, _active).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{self.numbers!r} on {self.device}"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def tolist(self) -> Any:
        """Return the numbers; the processor waits."""
        _note_sync("tolist")
        return self.numbers.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Raise `TypeError`: a device's memory is no array."""
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def data_ptr(self) -> int:
        """Return where the numbers lie."""
        return self.numbers.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the numbers' storage."""
        return self.numbers.untyped_storage()


class PretendDevices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Pretend devices exist inside the ``with`` block; only one such block may be open.

    Parameters
    ----------
    count : how many: ``pretend:0``, ``pretend:1``, …
    capacity : bytes of memory of each; None: no limit. What exceeds it raises ``torch.OutOfMemoryError``.

    Attributes
    ----------
    log : what was done.
    """

    def __init__(self, count: int = 2, capacity: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        _register()
        self.count, self.capacity = count, capacity
        self.log = Log()
        self.storages: dict[int, list[Any]] = {}  # storage -> [device, bytes, tensors that share it]
        self._allocated: Counter[int] = Counter()
        self._peak: Counter[int] = Counter()

    def __enter__(self) -> Self:
        global _active
        if _active is not None:
            raise RuntimeError("pretend devices are there already; leave that block first")
        # On a second device the engine would want a thread that PyTorch has only for devices that it knows.
        self._single = torch.autograd.set_multithreading_enabled(False)
        self._single.__enter__()
        _active = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _active
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        _active = None
        self._single.__exit__(kind, error, trace)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return NotImplemented if _has_other_tensors(types) else _run(func, args, dict(kwargs or {}), self)

    # ---- memory ---------------------------------------------------------------------------------------------------

    def allocated(self, device: Any = 0) -> int:
        """Return the bytes of all tensors on a device."""
        return self._allocated[_index(device)]

    def peak(self, device: Any = 0) -> int:
        """Return the largest number of bytes that were on a device at once."""
        return self._peak[_index(device)]

    def reset_peak(self, device: Any = 0) -> None:
        """Measure the peak anew from here."""
        self._peak[_index(device)] = self._allocated[_index(device)]

    def adopt(self, tensor: PretendTensor) -> None:
        """Count a tensor's memory as long as it lives; raise ``torch.OutOfMemoryError`` if there is not so much."""
        storage = tensor.numbers.untyped_storage()
        key, size, index = storage._cdata, storage.nbytes(), tensor.device.index
        entry = self.storages.get(key)
        if entry is None:
            if self.capacity is not None and self._allocated[index] + size > self.capacity:
                raise torch.OutOfMemoryError(
                    f"{NAME}:{index} out of memory. Tried to allocate {size:,} bytes; {self._allocated[index]:,} of "
                    f"{self.capacity:,} are in use"
                )
            entry = self.storages[key] = [index, size, 0]
            self._allocated[index] += size
            self._peak[index] = max(self._peak[index], self._allocated[index])
        entry[2] += 1
        weakref.finalize(tensor, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        entry = self.storages[key]
        entry[2] -= 1
        if not entry[2]:
            self._allocated[entry[0]] -= entry[1]
            del self.storages[key]


_active: PretendDevices | None = None
_library: Any = None


def _devices() -> PretendDevices | None:
    """Return the devices of the open block, or None."""
    return _active


def _note_sync(name: str) -> None:
    if _active is not None:
        _active.log.syncs.append(name)


def _index(device: Any) -> int:
    index = device if isinstance(device, int) else torch.device(device).index
    return index or 0


def _has_other_tensors(types: Iterable[type]) -> bool:
    """Tell whether another kind of tensor takes part, which comes first: it says itself what it consists of."""
    plain = torch._C._disabled_torch_dispatch_impl  # what `torch.nn.Parameter` has
    return any(not issubclass(kind, PretendTensor) and kind.__torch_dispatch__ is not plain for kind in types)  # type: ignore[attr-defined]


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any], devices: PretendDevices | None) -> Any:
    """Carry out an operation with the numbers that tensors hold; say where the result lies."""
    tensors = list(_tensors(args, kwargs))
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted)
    ours = [tensor.device for tensor in tensors if isinstance(tensor, PretendTensor)]
    if not ours and (wanted is None or wanted.type != NAME):
        return func(*args, **kwargs)
    target = wanted if wanted is not None else ours[0]
    if target.type == NAME:
        target = torch.device(NAME, _index(target))
        if devices is None or target.index >= devices.count:
            raise RuntimeError(f"{target}: there is no such device")
    packet, operation = func.overloadpacket, Operation.of(func)
    if packet not in ANYWHERE:
        check_one_device(func, operation, args, tensors)
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != target.type:
        raise RuntimeError(f"Expected a '{target.type}' device type for generator but found '{generator.device.type}'")
    plain_args, plain_kwargs = [_bare(value) for value in args], {name: _bare(kwargs[name]) for name in kwargs}
    if wanted is not None and wanted.type == NAME:
        plain_kwargs["device"] = torch.device("cpu")
    if packet in (aten._to_copy, aten.copy_) and devices is not None:
        _note_copy(devices, packet, args, target)
    out = func(*plain_args, **plain_kwargs)
    if devices is not None:
        _note(devices, operation, packet, target)
    if packet is aten.copy_:
        target = args[0].device
    if target.type != NAME:
        return _aliased(func, args, kwargs, out) if operation.writes else out
    if operation.writes and packet not in RESHAPING and isinstance(out, Tensor) and out is plain_args[0]:
        return args[0]
    known = {id(value.numbers): value for value in tensors if isinstance(value, PretendTensor)}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else _on_device(value, target, devices)

    wrapped = wrap(out) if isinstance(out, Tensor) else type(out)(map(wrap, out)) if isinstance(out, _MANY) else out
    views = operation.views and not torch.is_inference_mode_enabled()  # there, nobody asks whose view a tensor is
    return _aliased(func, args, kwargs, wrapped) if operation.writes or views else wrapped


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments of an operation, those in lists too."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, _MANY):
            yield from (part for part in value if isinstance(part, Tensor))


def _bare(value: Any) -> Any:
    if isinstance(value, _MANY):
        return [_bare(part) for part in value]
    return value.numbers if isinstance(value, PretendTensor) else value


def _on_device(numbers: Tensor, device: torch.device, devices: PretendDevices | None) -> PretendTensor:
    if numbers.is_inference() == torch.is_inference_mode_enabled():
        tensor = PretendTensor(numbers, device)
    else:  # a view of an ordinary tensor is one too, wherever it is made
        with torch.inference_mode(numbers.is_inference()):
            tensor = PretendTensor(numbers, device)
    if devices is not None:
        devices.adopt(tensor)
    return tensor


def _note_copy(devices: PretendDevices, packet: Any, args: Sequence[Any], target: torch.device) -> None:
    source, goal = (args[1].device, args[0].device) if packet is aten.copy_ else (args[0].device, target)
    if source != goal:
        moved = args[1] if packet is aten.copy_ else args[0]
        devices.log.copies.append((str(source), str(goal), moved.numel() * moved.element_size()))


def _note(devices: PretendDevices, operation: Operation, packet: Any, target: torch.device) -> None:
    if packet in WAITING:
        devices.log.syncs.append(packet.__name__)
    if target.type == NAME and not operation.views:
        devices.log.launches[str(target), packet.__name__] += 1


# ---- making the devices known to PyTorch, once a process ------------------------------------------------------------


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention in one kernel, the processor's own; where a gradient is wanted, in its parts."""
    given = [tensor for tensor in (query, key, value, attn_mask) if tensor is not None]
    options = {"scale": scale, "enable_gqa": enable_gqa}
    graded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    if not graded and all(isinstance(tensor, PretendTensor) for tensor in given):
        attend = aten.scaled_dot_product_attention.default
        out: Tensor = _run(attend, (query, key, value, attn_mask, dropout_p, is_causal), options, _active)
        return out
    parts: Callable[..., Any] = aten._scaled_dot_product_attention_math
    result: Tensor = parts(query, key, value, attn_mask, dropout_p, is_causal, **options)[0]
    return result


def _empty(
    size: Sequence[int], stride: Sequence[int], *, dtype: torch.dtype | None = None, layout: Any = None,
    device: Any = None, pin_memory: bool | None = None,
) -> Tensor:  # fmt: skip
    """Memory on a device, for ``torch.tensor(numbers, device=...)``, which asks no dispatch mode."""
    return _on_device(torch.empty_strided(size, stride, dtype=dtype), torch.device(NAME, _index(device)), _active)


def _copy_from(source: Tensor, goal: Tensor, non_blocking: bool = False) -> Tensor:
    """The same function's copy of its numbers into that memory."""
    _bare(goal).copy_(_bare(source))
    if _active is not None:
        _active.log.copies.append((str(source.device), str(goal.device), source.numel() * source.element_size()))
    return goal


def _register() -> None:
    global _library
    if _library is not None:
        return
    make: Any = backend_registration._setup_privateuseone_for_python_backend
    make(NAME, Backend(_devices), Hooks(_devices))
    library: Any = torch.library.Library
    _library = library("aten", "IMPL")
    _library.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    _library.impl("empty_strided", _empty, "PrivateUse1")
    _library.impl("_copy_from", _copy_from, "PrivateUse1")


@contextmanager
def silent() -> Iterator[None]:
    """Let what is done inside the block not be logged."""
    if _active is None:
        yield
        return
    before, _active.log = _active.log, Log()
    try:
        yield
    finally:
        _active.log = before
