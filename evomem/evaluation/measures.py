"""Evaluation: measures by name. A measure gives evaluations some of their named values.

The evaluator finds measures here and imports none of them; the module of an objective registers what it needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from evomem.errors import ConfigError
from evomem.evaluation.measurement import Evaluation, Measurement
from evomem.managers.base import MemoryManager
from evomem.managers.stochastic import StochasticManager
from evomem.registry import Registry
from evomem.tasks.base import Sample, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from evomem.evaluation.evaluator import Evaluator


@dataclass(frozen=True)
class Draws:
    """How random decisions are drawn, for measures of a stochastic policy; all managers of a call are that policy.

    Attributes
    ----------
    seeds : one a manager.
    behaviour : the policy that draws, if it is another one.
    reference : a policy whose distance is measured on the way.
    """

    seeds: Sequence[int] = ()
    behaviour: StochasticManager | None = None
    reference: StochasticManager | None = None

    def for_model(self, model: PreTrainedModel) -> Draws:
        """Return the same with policies as they are on a model, see `MemoryManager.for_model`."""
        behaviour, reference = (p and p.for_model(model) for p in (self.behaviour, self.reference))
        return replace(self, behaviour=behaviour, reference=reference)


class Measure(ABC):
    """Measures quantities of managers on one sample; a pure function of what it is given.

    Subclasses implement `evaluations` and are registered under the name of every quantity that they measure.
    """

    option_types: ClassVar[Mapping[str, Mapping[str, type]]] = {}
    """Per quantity that has options, their types by name."""

    @abstractmethod
    def evaluations(
        self,
        evaluator: Evaluator,
        managers: Sequence[MemoryManager],
        sample: Sample,
        task: Task,
        measurement: Measurement,
        draws: Draws,
    ) -> list[Evaluation]:
        """Return one evaluation a manager, in order, with the values of the quantities asked for.

        Parameters
        ----------
        measurement : the quantities of this measure among those that are asked for, with their options.
        draws : for random decisions.
        """


measures: Registry[type[Measure]] = Registry("measure", "evomem.measures")
"""Registry of measures, by the names of the quantities that they measure."""

register_measure = measures.register


def run_measures(
    evaluator: Evaluator,
    managers: Sequence[MemoryManager],
    sample: Sample,
    task: Task,
    measurement: Measurement,
    draws: Draws,
) -> list[Evaluation]:
    """Return evaluations with all values that a measurement asks for.

    Every measure runs once, for all of its quantities together. Slots and bytes are those of the first
    measure; tokens and seconds add up.

    Raises
    ------
    ConfigError : nothing is asked for, a quantity has not these options, or two measures give the same value.
    UnknownNameError : a quantity is not registered.
    """
    by_measure: dict[type[Measure], Measurement] = {}
    for quantity in measurement.quantities:
        measure = measures.get(quantity.name)
        _check_options(measure, quantity.name, dict(quantity.options))
        part = by_measure.get(measure, Measurement(observes=measurement.observes))
        by_measure[measure] = part.also(Measurement((quantity,)))
    if not by_measure:
        raise ConfigError("measurement: names no quantity; there is nothing to measure")
    parts = [
        measure().evaluations(evaluator, managers, sample, task, part, draws) for measure, part in by_measure.items()
    ]  # fmt: skip
    return parts[0] if len(parts) == 1 else [_joined(of_one) for of_one in zip(*parts, strict=True)]


def _check_options(measure: type[Measure], name: str, options: Mapping[str, object]) -> None:
    known = measure.option_types.get(name, {})
    for option, value in options.items():
        if option not in known:
            raise ConfigError(
                f"measure {name!r}: has no option {option!r}; it has {', '.join(known) if known else 'none'}"
            )
        if type(value) is not known[option]:
            raise ConfigError(f"measure {name!r}: {option} is {value!r}; give a {known[option].__name__}")


def _joined(parts: Sequence[Evaluation]) -> Evaluation:
    """Return the evaluation of one candidate by several measures."""
    values = dict(parts[0].values)
    for part in parts[1:]:
        twice = sorted(values.keys() & part.values.keys())
        if twice:
            raise ConfigError(f"measurement: two measures give {twice[0]!r}; ask for one of them")
        values |= part.values
    steps = [part.steps for part in parts if part.steps is not None]
    if len(steps) > 1:
        raise ConfigError("measurement: two measures give gradients; ask for those of one of them")
    return replace(
        parts[0],
        values=values,
        tokens=sum(part.tokens for part in parts),
        seconds=sum(part.seconds for part in parts),
        steps=steps[0] if steps else None,
    )
