"""Search space: what of a manager may vary in a search; a vector of real numbers for every variant, and back.

A search space is a YAML file of `search_spaces/`::

    manager: {name: feature_scorer, options: {budget: 64}}
    weights: all                      # or none, or [{match: "hidden.*", scale: 0.5}, ...]
    options:                          # options of the manager that vary too
      recent: {kind: integer, low: 0, high: 16}
      allocation.beta: {kind: log, low: 1, high: 50}   # of the allocation that the manager is given
    start: {heuristic: keydiff}       # or zeros, initial, {vector: FILE or [..]}, {plugin: FOLDER}, {parameters: ..}
    sigma: 0.3

Every vector of finite numbers decodes: a weight is ``scale * x``, and bounds are handled smoothly
(`evomem.search_space.option_ranges`). Weights come first in the vector, in the order in which the manager registered
them, then the options in the order of the file.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor

from evomem.bounds import LARGE, SMALL
from evomem.errors import ConfigError
from evomem.files.reading import is_file, user_path
from evomem.managers.base import MemoryManager, managers
from evomem.search_space.option_paths import changed_options, flattened, option_value, require_disjoint
from evomem.search_space.option_ranges import Categorical, Option, Variable
from evomem.search_space.plugin_start import allocation_hint, take_numbers
from evomem.search_space.start import Start, add_noise, fill, start_from_heuristic
from evomem.search_space.vector_file import read_vector
from evomem.validation import Settings, merge, read_yaml, validate

Array = NDArray[np.float64]


class Weights(Settings):
    """Parameters whose names match a pattern (shell style) vary with this scale; the first pattern that fits counts."""

    match: str = "*"
    scale: float = Field(default=1.0, ge=SMALL, le=LARGE, allow_inf_nan=False)


class ManagerConfig(Settings):
    """A manager by name, and its fixed options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class SpaceConfig(Settings):
    """What may vary, and from where the search starts (see the module's docstring)."""

    manager: ManagerConfig
    weights: Literal["all", "none"] | list[Weights] = "all"
    options: dict[str, Option] = Field(default_factory=dict)
    start: Literal["initial", "zeros"] | Start = "initial"
    sigma: float = Field(default=0.3, ge=SMALL, le=LARGE, allow_inf_nan=False)

    @field_validator("options", mode="before")
    @classmethod
    def _paths(cls, options: Any) -> Any:
        return flattened(options) if isinstance(options, Mapping) else options


def load_space(name: str, changes: Mapping[str, Any] | None = None) -> SpaceConfig:
    """Return the search space of a file or of a name in `search_spaces/`, with ``changes`` merged over it.

    ``start`` is replaced as a whole, because its fields exclude each other.
    """
    from evomem.files.resources import resource_path

    path = user_path(name)
    if not is_file(path):
        path = resource_path("search_spaces", name)
    changes = changes or {}
    values = merge(read_yaml(path), changes)
    if "start" in changes:
        values["start"] = changes["start"]
    return validate(SpaceConfig, values, str(path))


class SearchSpace:
    """Vectors of ``dim`` real numbers, each a manager.

    Parameters
    ----------
    config : what varies.
    state : tensors of the manager that the search starts from (its ``state_dict``), for a run that is resumed; by
        default they come from ``config.start``.

    Attributes
    ----------
    dim : length of a vector.
    template : the manager that the search starts from; it gives everything that does not vary, buffers included.
    start : (dim,) the vector of `template` (for options, of their start values).
    sigma : the search's first step size, in units of the vector.
    """

    def __init__(self, config: SpaceConfig, state: Mapping[str, Tensor] | None = None) -> None:
        self.config = config
        self.sigma = config.sigma
        self.template = build_manager(config.manager)
        self._options = dict(config.options)
        require_disjoint(self._options)
        for path in self._options:
            option_value(self.template, path)
        self._weights = self._varying_weights()
        self._numbers = sum(parameter.numel() for parameter in self._parameters(self.template).values())
        self.dim = self._numbers + sum(option.width for option in self._options.values())
        if self.dim == 0:
            raise ConfigError(
                f"search space: manager {config.manager.name!r} has nothing that varies; name weights or options"
            )
        start = None
        if state is None:
            start = self._set_start()
        else:
            self.template.load_state_dict(dict(state))
        if start is None:
            starts = {name: self._option_start(name, option) for name, option in self._options.items()}
            start = self._encode(self.template, starts)
        self.start: Array = start

    # ---- what varies ----------------------------------------------------------------------------------------------

    def _varying_weights(self) -> dict[str, float]:
        """Return the scale of every parameter that varies, by name, in registration order."""
        names = [name for name, _ in self.template.named_parameters()]
        if self.config.weights == "none":
            return {}
        patterns = [Weights()] if self.config.weights == "all" else self.config.weights
        for pattern in patterns:
            if self.config.weights != "all" and not fnmatch.filter(names, pattern.match):
                raise ConfigError(
                    f"search space: weights: no parameter of {self.config.manager.name!r} matches {pattern.match!r}; "
                    f"it has: {', '.join(names) or 'none'}"
                )
        scales: dict[str, float] = {}
        for name in names:
            for pattern in patterns:
                if fnmatch.fnmatchcase(name, pattern.match):
                    scales[name] = pattern.scale
                    break
        return scales

    def _parameters(self, manager: MemoryManager) -> dict[str, Tensor]:
        return {name: value for name, value in manager.named_parameters() if name in self._weights}

    def blocks(self) -> list[NDArray[np.int64]]:
        """Return, per (layer, kv head) in row-major order, the indices of the coordinates that act on that head only.

        Empty when the manager has no such parameters (`MemoryManager.head_parameters`) or they do not vary.
        """
        parts: dict[int, list[NDArray[np.int64]]] = {}
        offset = 0
        for name, parameter in self._parameters(self.template).items():
            if name in type(self.template).head_parameters:
                count = parameter.shape[0] * parameter.shape[1]
                width = parameter.numel() // count
                for number in range(count):
                    begin = offset + number * width
                    parts.setdefault(number, []).append(np.arange(begin, begin + width))
            offset += parameter.numel()
        return [np.concatenate(parts[number]) for number in sorted(parts)]

    def coordinates(self, patterns: Sequence[str]) -> NDArray[np.int64]:
        """Return the places, ascending, of the weights and options whose names match one of the patterns (shell style).

        Raises
        ------
        ConfigError : a pattern matches nothing that varies.
        """
        widths = {name: parameter.numel() for name, parameter in self._parameters(self.template).items()}
        widths |= {name: option.width for name, option in self._options.items()}
        for pattern in patterns:
            if not fnmatch.filter(widths, pattern):
                raise ConfigError(
                    f"search space: nothing that varies matches {pattern!r}; there are: {', '.join(widths)}"
                )
        parts, begin = [], 0
        for name, width in widths.items():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                parts.append(np.arange(begin, begin + width))
            begin += width
        return np.concatenate(parts)

    def variables(self) -> list[Variable]:
        """Return what the options' coordinates stand for; every other coordinate is a weight, an unbounded number."""
        variables, offset = [], self._numbers
        for option in self._options.values():
            variables.append(Variable(offset, option.width, option.bounds, option.codes()))
            offset += option.width
        return variables

    # ---- vector and manager ---------------------------------------------------------------------------------------

    def decode(self, vector: Array) -> MemoryManager:
        """Return the manager of a vector (dim,); every real vector has one.

        Raises
        ------
        ConfigError : the vector has another length.
        """
        vector = self._checked(vector)
        values, offset = {}, self._numbers
        for name, option in self._options.items():
            values[name] = option.decode(vector[offset : offset + option.width])
            offset += option.width
        changes = changed_options(self.template, values)
        manager = self.template.with_options(**changes) if changes else copy.deepcopy(self.template)
        offset = 0
        with torch.no_grad():
            for name, parameter in self._parameters(manager).items():
                part = vector[offset : offset + parameter.numel()] * self._weights[name]
                parameter.copy_(torch.from_numpy(part).view(parameter.shape))
                offset += parameter.numel()
        return manager.requires_grad_(False)

    def encode(self, manager: MemoryManager) -> Array:
        """Return the vector (dim,) of a manager of this space's kind: ``decode(encode(m))`` equals m in what varies.

        Raises
        ------
        ConfigError : another kind of manager, other shapes, or an option outside its bounds.
        """
        if type(manager) is not type(self.template):
            raise ConfigError(
                f"search space: is of {type(self.template).__name__}, this manager is a {type(manager).__name__}"
            )
        expected, given = self._parameters(self.template), self._parameters(manager)
        if missing := [name for name in expected if name not in given]:
            hint = allocation_hint(missing[0], self.template)
            raise ConfigError(f"search space: weights {missing[0]} vary, and this manager has none{hint}")
        for name, parameter in given.items():
            if parameter.shape != expected[name].shape:
                raise ConfigError(
                    f"search space: weights {name} are {tuple(parameter.shape)} in this manager and "
                    f"{tuple(expected[name].shape)} in the space"
                )
        return self._encode(manager, {name: option_value(manager, name) for name in self._options})

    def gradient(self, by_parameter: Array) -> Array:
        """Return the gradient in a vector (dim,) from that in all parameters, in the order of registration.

        Options have none: their coordinates get 0.
        """
        gradient, offset, at = np.zeros(self.dim), 0, 0
        for name, parameter in self.template.named_parameters():
            part = by_parameter[at : at + parameter.numel()]
            at += parameter.numel()
            if name in self._weights:
                gradient[offset : offset + len(part)] = part * self._weights[name]
                offset += len(part)
        return gradient

    def _encode(self, manager: MemoryManager, values: Mapping[str, Any]) -> Array:
        weights = [
            parameter.detach().double().cpu().numpy().ravel() / self._weights[name]
            for name, parameter in self._parameters(manager).items()
        ]
        options = [self._encode_option(name, option, values[name]) for name, option in self._options.items()]
        return np.concatenate([np.zeros(0), *weights, *options])

    def _encode_option(self, name: str, option: Option, value: Any) -> Array:
        if isinstance(option, Categorical) and value not in option.choices:
            # A manager keeps some options in another form than a person writes: an allocation's whole description.
            options = (self._kept(name, choice) for choice in option.choices)
            value = next((one for one, kept in zip(option.choices, options, strict=True) if kept == value), value)
        try:
            return option.encode(value)
        except ValueError as error:
            raise ConfigError(f"search space: options.{name}: {error}") from None

    def _kept(self, path: str, value: Any) -> Any:
        """Return an option's value in the form in which a manager keeps it."""
        return option_value(self.template.with_options(**changed_options(self.template, {path: value})), path)

    def _checked(self, vector: Array) -> Array:
        vector = np.asarray(vector, dtype=np.float64)
        if vector.shape != (self.dim,):
            raise ConfigError(
                f"search space: a vector of {self.dim} numbers is expected, this has shape {vector.shape}"
            )
        if not np.isfinite(vector).all():
            number = int(np.flatnonzero(~np.isfinite(vector))[0])
            raise ConfigError(f"search space: number {number} of the vector is {vector[number]}; all must be finite")
        return vector

    # ---- start ----------------------------------------------------------------------------------------------------

    def _option_start(self, name: str, option: Option) -> Any:
        if option.start is not None:
            return option.start
        value = option_value(self.template, name)
        return option.default() if value is None else value

    def _set_start(self) -> Array | None:
        """Give the template the weights that ``start`` names; return the start vector if that was given itself."""
        start = self.config.start
        if start == "zeros":
            fill(self._parameters(self.template), {})
        elif isinstance(start, Start):
            if start.heuristic is not None:
                self.template = start_from_heuristic(self.template, start.heuristic)
            elif start.plugin is not None:
                self._start_from_plugin(Path(start.plugin))
            elif start.parameters is not None:
                fill(self._parameters(self.template), start.parameters)
            elif start.vector is not None:
                vector = self._checked(read_vector(start.vector))
                self.template = self.decode(vector)
                if not start.noise:
                    return vector
            if start.noise:
                add_noise(self._parameters(self.template), start.noise)
                return self.encode(self.template) if start.vector is not None else None
        return None

    def _start_from_plugin(self, folder: Path) -> None:
        from evomem.plugins import load

        manager = load(folder)
        vector = self.encode(manager)  # refuses another kind or shape with a message
        take_numbers(self.template, manager, folder, self._options)
        if self._options:
            self.template = self.decode(vector)


def build_manager(config: ManagerConfig) -> MemoryManager:
    """Return a new manager; random initial weights are the same every time, and the global generator is left alone."""
    import evomem.managers  # noqa: F401  (registers the managers)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        manager: MemoryManager = managers.get(config.name)(**config.options)
    return manager.requires_grad_(False)
