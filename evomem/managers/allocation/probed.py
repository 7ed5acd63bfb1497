"""Manager: what an allocation that looks at what heads do has in common: probes of one model, and never another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from evomem.errors import ConfigError
from evomem.managers.allocation.base import Allocation
from evomem.managers.allocation.curve_record import MeasuredAllocation, has_records, warn_of_others
from evomem.managers.allocation.probes import PROBES, HeadProbes, fingerprint, head_probes
from evomem.memory.view import LayerView
from evomem.modes import outside_inference_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Module = TypeVar("Module", bound=nn.Module)


class ProbedAllocation(Allocation):
    """Base of allocations that look at what every KV head does (`evomem.managers.allocation.probes`).

    Put it before the kind: ``class Razor(ProbedAllocation, LayerAllocation)``. `head_values` gives the probes.

    They are measured on a model and kept as buffers, with the model's fingerprint; a plug-in has them too. On any other
    model, `for_model` gives a twin with that model's own. Caches (`attach`, `new_cache`) and evaluations ask for it, so
    nobody else has to. Where no model is known (another engine's views) the kept ones are used.

    Attributes
    ----------
    probes : (heads of all layers, probes) fp32, see `HeadProbes`; no rows before anything is measured.
    layer_heads : (layers,) int64, KV heads of every layer of the model that was measured.
    measured_on : (32,) uint8, its fingerprint; zeros before anything is measured.
    """

    MEASURED: ClassVar[tuple[str, ...]] = ("probes", "layer_heads", "measured_on")
    """Its buffers."""
    SIZED: ClassVar[tuple[str, ...]] = ("probes", "layer_heads")
    """Those whose first axis is as long as the model has heads, or layers."""

    probes: Tensor
    layer_heads: Tensor
    measured_on: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("probes", torch.zeros(0, len(PROBES), dtype=torch.float32))
        self.register_buffer("layer_heads", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("measured_on", torch.zeros(32, dtype=torch.uint8))
        self._heads: tuple[int, ...] = ()

    def head_values(self, heads: Sequence[int], device: torch.device) -> Tensor:
        """Return the probes (heads of all layers, probes) fp32 on a device.

        Parameters
        ----------
        heads : KV heads of every layer of the views that are decided about.

        Raises
        ------
        ConfigError : nothing was measured yet, or on a model of another size.
        """
        if not self._heads:
            raise ConfigError(
                f"allocation {self.name!r}: nothing is known yet about what the model's heads do; attach the manager "
                "to the model, or take manager.for_model(model), which measures it"
            )
        if tuple(heads) != self._heads:
            raise ConfigError(
                f"allocation {self.name!r}: it knows what the heads of a model do that has {_shape(self._heads)}, and "
                f"these views are of one that has {_shape(heads)}; take manager.for_model(model)"
            )
        return self.probes.float().to(device)

    def probe(self, name: str, views: Sequence[LayerView]) -> Tensor:
        """Return one probe of the model that the views are of: (heads of all layers,) fp32, on the first view's device.

        Raises `ConfigError` as `head_values` does. ``name`` is one of `PROBES`.
        """
        heads = [view.slots.shape[1] for view in views]
        return self.head_values(heads, views[0].slots.device)[:, PROBES.index(name)]

    @property
    def model_fingerprint(self) -> str | None:
        """Hex fingerprint of the model whose probes are kept; None: none are."""
        return bytes(self.measured_on.tolist()).hex() if self._heads else None

    def keep_probes(self, measured: HeadProbes) -> None:
        """Keep a model's probes in place of those kept before."""
        self._buffers.update(_buffers_of(measured, self.probes.device))
        self._heads = measured.heads

    def with_probes(self, measured: HeadProbes) -> Self:
        """Return a twin that keeps a model's probes and shares everything else, parameters too."""
        twin = self.__new__(type(self))
        twin.__dict__ = {**self.__dict__, "_buffers": dict(self._buffers)}
        twin.keep_probes(measured)
        return twin

    def check_probes(self) -> None:
        """Raise `ConfigError` if what a file gave as probes contradicts itself."""
        heads, rows = self._heads, self.probes.shape[0]
        if any(count < 1 for count in heads) or sum(heads) != rows:
            raise ConfigError(f"allocation {self.name!r}: probes: {rows} rows for {_shape(heads)}")
        if bool(((self.probes < 0) | (self.probes > 1)).any()):
            raise ConfigError(f"allocation {self.name!r}: probes: some lie outside of [0, 1]")
        if bool(self.measured_on.any()) != bool(heads):
            raise ConfigError(f"allocation {self.name!r}: measured_on: names no model, or probes are missing")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        """Take buffers as long as the state has them."""
        for name in self.SIZED:
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.shape[1:] == getattr(self, name).shape[1:]:
                with outside_inference_mode():
                    self._buffers[name] = getattr(self, name).new_zeros(given.shape)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._heads = tuple(self.layer_heads.tolist())


MEASURED = (*ProbedAllocation.MEASURED, *MeasuredAllocation.RECORD)
"""Buffers that no search and no option gives."""


def on_model(modules: Sequence[Module], model: PreTrainedModel) -> list[Module]:
    """Return modules as they are on a model: themselves, or twins whose allocations have that model's probes.

    Curves that were measured under another scorer or on another model are warned of (`warn_of_others`).

    Raises
    ------
    UnsupportedModelError, ModelError : the probes of the model cannot be measured, see `head_probes`.
    """
    probed, recorded = any(map(_probed, modules)), any(map(has_records, modules))
    if not probed and not recorded:
        return list(modules)
    key = fingerprint(model)
    if recorded:
        warn_of_others(modules, key)
    ready = []
    for module in modules:
        strangers = [part for part in _probed(module) if part.model_fingerprint != key]
        ready.append(_twin(module, head_probes(model, key), key) if strangers else module)
    return ready


def observes_heads(module: nn.Module) -> bool:
    """Whether an allocation of a module looks at what a model's attention heads do (`ProbedAllocation`)."""
    return bool(_probed(module))


def keep_probes(module: nn.Module, model: PreTrainedModel) -> None:
    """Let all allocations of a module keep the probes of a model."""
    for part in _probed(module):
        part.keep_probes(head_probes(model))


def measured_buffers(module: nn.Module, names: Sequence[str] = MEASURED) -> frozenset[str]:
    """Return what of a module's state says what a model's heads do, or what was measured with which, by name.

    names : of `MEASURED`; ``ProbedAllocation.SIZED`` are those whose first axis options say nothing about.
    """
    return frozenset(
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        for name in names
        if (isinstance(part, ProbedAllocation) and name in part.MEASURED)
        or (isinstance(part, MeasuredAllocation) and name in part.RECORD)
    )


def check_probes(module: nn.Module) -> None:
    """Raise `ConfigError` if the probes that a file gave an allocation contradict themselves."""
    for part in _probed(module):
        part.check_probes()


def probes_measured(module: nn.Module) -> bool:
    """Whether all allocations of a module that need a model's probes keep those of one."""
    return all(part.model_fingerprint is not None for part in _probed(module))


def _probed(module: nn.Module) -> list[ProbedAllocation]:
    return [part for part in module.modules() if isinstance(part, ProbedAllocation)]


def _twin(module: Any, measured: HeadProbes, key: str) -> Any:
    """Return the module, or a twin where a part of it keeps another model's probes; all else is shared."""
    if isinstance(module, ProbedAllocation) and module.model_fingerprint != key:
        module = module.with_probes(measured)
    children = {n: None if c is None else _twin(c, measured, key) for n, c in module._modules.items()}
    if all(children[name] is child for name, child in module._modules.items()):
        return module
    twin = module.__new__(type(module))
    twin.__dict__ = {**module.__dict__, "_modules": children}
    return twin


def _buffers_of(measured: HeadProbes, device: torch.device) -> dict[str, Tensor]:
    with outside_inference_mode():
        return {
            "probes": measured.values.to(device, copy=True),
            "layer_heads": torch.tensor(measured.heads, dtype=torch.int64, device=device),
            "measured_on": torch.tensor(list(bytes.fromhex(measured.fingerprint)), dtype=torch.uint8, device=device),
        }


def _shape(heads: Sequence[int]) -> str:
    several = sorted(set(heads))
    return f"{len(heads)} layers of {' or '.join(map(str, several)) or 'no'} KV heads"
