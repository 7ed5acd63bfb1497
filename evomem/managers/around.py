"""Manager: what a manager around another one hands on to it, and which ones it cannot be put around."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evomem.errors import ConfigError
from evomem.managers.allocation import ModelAllocation
from evomem.managers.base import MemoryManager
from evomem.managers.build import build
from evomem.managers.decision import Judgement, Rule
from evomem.memory.view import Decision, LayerView


def describe_inner(inner: Any, around: str, reserved: Sequence[str]) -> dict[str, Any]:
    """Return the full description of a manager inside another one, so that a saved experiment needs no defaults.

    Parameters
    ----------
    inner : its name or spec, or a description.
    around : name of the manager around it, for messages.
    reserved : options that only the manager around may be given.

    Raises
    ------
    ValueError : it is no spec, or gives a reserved option; a validator of options says so as a `ConfigError`.
    """
    if not isinstance(inner, str | Mapping):
        raise ValueError('give the inner manager as a name or spec, e.g. "snapkv(window=64)"')
    manager = build(inner)
    for option in reserved:
        # Compared with the default, because a description names every option.
        if getattr(manager.options, option) != type(manager.options).model_fields[option].default:
            raise ValueError(f"{option} belongs to {around}, not to the manager inside it")
    return manager.describe()


@dataclass(frozen=True)
class RewritingRule(Rule):
    """A `Rule` that also says what slots hold from then on."""

    def decide(self, judgement: Judgement, view: LayerView) -> Decision:
        """Return the decision about one layer, and what its slots hold from now on."""
        return self.written(super().decide(judgement, view), judgement, view)

    def decide_all(
        self, judgements: Sequence[Judgement], views: Sequence[LayerView], limits: Sequence[Tensor] | None = None
    ) -> list[Decision]:
        """Return the decisions about all layers, and what their slots hold from now on."""
        made = super().decide_all(judgements, views, limits)
        if not isinstance(self.allocation, ModelAllocation):  # then each is of `decide`, which has written already
            return made
        return [self.written(*parts) for parts in zip(made, judgements, views, strict=True)]

    @abstractmethod
    def written(self, decision: Decision, judgement: Judgement, view: LayerView) -> Decision:
        """Return a decision with what slots hold from now on."""


class ManagerAround(MemoryManager):
    """A manager that decides by what the one inside it says about the slots; a subclass says what it does with that.

    Attributes
    ----------
    inner : the manager inside, set by `build_inner`.
    """

    inner: MemoryManager

    def build_inner(self, description: Mapping[str, Any], **options: Any) -> MemoryManager:
        """Build the manager inside, and return it.

        Raises
        ------
        ConfigError : what it does with its decisions would be left out without a word.
        """
        self.inner = build(description, **options)
        if type(self.inner.rule) is not Rule:
            raise ConfigError(
                f"manager {self.name!r}: inner: {self.inner.name!r} does more with its decisions than to keep slots, "
                f"which {self.name} would leave out; put it around {self.name}, or give its scorer alone"
            )
        return self.inner

    def require_no_statistics(self) -> None:
        """Refuse a manager inside that needs statistics; raises `ConfigError`."""
        if self.inner.uses_statistics:
            raise ConfigError(
                f"manager {self.name!r}: inner: {self.inner.name!r} needs statistics of contexts, which are not "
                "measured inside another manager; give a scorer without them (kv_policy: scale=head)"
            )

    @property
    def observes(self) -> frozenset[str]:
        """What the inner manager observes."""
        return self.inner.observes

    def shares(self) -> Tensor | None:
        """Return the inner manager's log-shares."""
        return self.inner.shares()

    def judge(self, view: LayerView) -> Judgement:
        """Return what the inner manager says."""
        return self.inner.judge(view)

    def score(self, view: LayerView) -> Tensor:
        """Return the inner manager's scores: (batch, kv_heads, slots)."""
        return self.inner.score(view)

    def admit(self, view: LayerView) -> Tensor | None:
        """Return what the inner manager says."""
        return self.inner.admit(view)

    def decay(self, view: LayerView) -> Tensor | None:
        """Return what the inner manager says."""
        return self.inner.decay(view)

    @property
    def forgets(self) -> bool:
        """Whether the inner manager does."""
        return self.inner.forgets

    @property
    def rewrites(self) -> bool:
        """Whether slots that stay hold other values after a decision, in which tokens that came later have a part."""
        return isinstance(self.rule, RewritingRule)
