"""Manager: what an allocation's curves were measured with, a scorer and a model; and a warning beside any other.

The record lies beside the curves as buffers, so that it goes wherever they go. Nothing is compared when a manager
decides: only when it is bound to a model (`on_model` of `evomem.managers.allocation.probed`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from evomem.managers.allocation.base import Allocation
from evomem.modes import outside_inference_mode

if TYPE_CHECKING:
    from evomem.managers.base import MemoryManager

logger = logging.getLogger("evomem")

NOT_OF_SCORES = frozenset({"budget", "every", "allocation"})
"""Options of every manager that change neither scores nor protected ends."""
_ALLOCATION = "allocation."
"""What names of an allocation's tensors begin with."""
_UNKNOWN = bytes(32)


@dataclass(frozen=True)
class ScorerDigest:
    """Hex SHA-256 of what ranks slots: a manager without its allocation, budget and schedule.

    Attributes
    ----------
    kind : of the manager's registry name.
    options : of the options that are not at their defaults, without `NOT_OF_SCORES`.
    numbers : of parameters and buffers, without the allocation's, as fp64. Neither the device nor a type that holds the
        same numbers changes it.
    """

    kind: str
    options: str
    numbers: str

    @classmethod
    def of(cls, manager: MemoryManager) -> ScorerDigest:
        """Return the digest of a manager that learns no shares of the budget itself (its option ``allocation: 8``)."""
        options = manager.options.model_dump(mode="json", exclude_defaults=True)
        said = {name: value for name, value in options.items() if name not in NOT_OF_SCORES}
        numbers = hashlib.sha256()
        state: Mapping[str, Tensor] = manager.state_dict()
        for name, tensor in sorted(state.items()):
            if not name.startswith(_ALLOCATION):
                content = tensor.detach().cpu().double().contiguous() + 0.0  # -0.0 ranks as 0.0 does
                numbers.update(f"{name} {tuple(tensor.shape)} ".encode() + content.numpy().tobytes())
        return cls(_sha256(manager.name), _sha256(json.dumps(said, sort_keys=True)), numbers.hexdigest())

    def differences(self, other: ScorerDigest) -> list[str]:
        """Return in words what differs; of another kind of manager nothing else is said."""
        if self.kind != other.kind:
            return ["another kind of manager"]
        return [f"other {part.name}" for part in fields(self) if getattr(self, part.name) != getattr(other, part.name)]


@dataclass(frozen=True)
class CurveRecord:
    """What curves were measured with.

    Attributes
    ----------
    scorer : that ranked the slots; None: unknown.
    model : hex fingerprint of the model (`evomem.managers.allocation.probes.fingerprint`); None: unknown.
    """

    scorer: ScorerDigest | None = None
    model: str | None = None


class MeasuredAllocation(Allocation):
    """Base of allocations whose curves are measured under one scorer and on one model (`CurveRecord`).

    Put it before the kind: ``class LUKV(MeasuredAllocation, ModelAllocation)``. Used under another scorer or on another
    model, it warns once, by the logger ``evomem``.

    Attributes
    ----------
    measured_under : (3, 32) uint8, digests of the scorer's kind, options and numbers; zeros: unknown.
    measured_on : (32,) uint8, the model's fingerprint; zeros: unknown.
    has_curves : whether anything was measured yet; a fact of the host, so that no decision waits for a device.
    """

    RECORD: ClassVar[tuple[str, ...]] = ("measured_under", "measured_on")
    """Its buffers. Files of before have none."""

    measured_under: Tensor
    measured_on: Tensor
    has_curves: bool

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("measured_under", torch.zeros(len(fields(ScorerDigest)), 32, dtype=torch.uint8))
        self.register_buffer("measured_on", torch.zeros(32, dtype=torch.uint8))
        self.has_curves = False

    @property
    def record(self) -> CurveRecord:
        """What the curves were measured with."""
        scorer, model = self.measured_under.cpu().numpy().tobytes(), self.measured_on.cpu().numpy().tobytes()
        parts = [scorer[at : at + 32].hex() for at in range(0, len(scorer), 32)]
        return CurveRecord(ScorerDigest(*parts) if any(scorer) else None, model.hex() if any(model) else None)

    def set_record(self, record: CurveRecord) -> None:
        """Keep what the curves were measured with."""
        parts = (None,) * len(fields(ScorerDigest)) if record.scorer is None else astuple(record.scorer)
        with torch.no_grad():
            self.measured_under.copy_(torch.stack([_bytes(part) for part in parts]))
            self.measured_on.copy_(_bytes(record.model))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        """Take a state of before, which has no record: nothing is known then, whatever was kept."""
        if any(name.startswith(prefix) for name in state_dict):  # else the curves stay, and their record
            for name, value in unknown_record(self, prefix).items():
                state_dict.setdefault(name, value)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def unknown_record(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Return the records that files of before do not have, by name in a module's state: zeros, on the processor."""
    with outside_inference_mode():
        return {
            f"{prefix}{path}.{name}" if path else f"{prefix}{name}": torch.zeros(
                getattr(part, name).shape, dtype=torch.uint8, device="cpu"
            )
            for path, part in module.named_modules()
            if isinstance(part, MeasuredAllocation)
            for name in part.RECORD
        }


def has_records(module: nn.Module) -> bool:
    """Whether there are curves in a module that a record belongs to."""
    return any(isinstance(part, MeasuredAllocation) and part.has_curves for part in module.modules())


def warn_of_others(modules: Sequence[nn.Module], model: str) -> None:
    """Warn, once each, of curves that were measured under another scorer, or on another model than this fingerprint's.

    Other budgets and other options of an allocation make no difference.
    """
    for module in modules:
        for manager, allocation in _measured(module):
            record = allocation.record
            text = _sentence(manager, allocation.name, record, ScorerDigest.of(manager), model)
            if text and (record, text) not in _warned:
                _warned.add((record, text))
                logger.warning(text)


_warned: set[tuple[CurveRecord, str]] = set()
"""What this process has warned of."""


def _measured(module: nn.Module) -> Iterator[tuple[Any, MeasuredAllocation]]:
    """Return managers whose allocation has curves, and these allocations."""
    for part in module.modules():
        allocation = getattr(part, "allocation", None)
        if isinstance(allocation, MeasuredAllocation) and allocation.has_curves:
            yield part, allocation


def _sentence(manager: Any, allocation: str, record: CurveRecord, scorer: ScorerDigest, model: str) -> str:
    """Return what differs and what to do; "" if nothing does."""
    faults = []
    if record.scorer is None and record.model is None:
        faults.append("do not say under which scorer and on which model they were measured")
    elif record.scorer is None:
        faults.append("do not say under which scorer they were measured")
    elif record.model is None:
        faults.append("do not say on which model they were measured")
    if record.scorer is not None and (differences := record.scorer.differences(scorer)):
        faults.append(f"were measured under another scorer ({', '.join(differences)})")
    if record.model is not None and record.model != model:
        faults.append("were measured on another model (other weights, another type of weights, or configuration)")
    if not faults:
        return ""
    return (
        f"manager {manager.name!r}: allocation {allocation!r}: its curves {' and '.join(faults)}; what heads get may "
        "suit neither this ranking nor this model: measure the curves again, with `evomem allocate` for this manager "
        "and this model"
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _bytes(digest: str | None) -> Tensor:
    return torch.tensor(list(_UNKNOWN if digest is None else bytes.fromhex(digest)), dtype=torch.uint8)
