"""Base: errors that are meant for users: what was wrong, where, and what to do."""

from __future__ import annotations


class EvomemError(Exception):
    """Base of every error that evomem raises on purpose."""


class ConfigError(EvomemError, ValueError):
    """A configuration (YAML file, command-line setting, manager option) is not valid."""


class UnknownNameError(ConfigError):
    """A name that no registry knows; the message lists the names that exist."""

    def __init__(self, kind: str, name: str, known: list[str]) -> None:
        import difflib

        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        names = ", ".join(sorted(known, key=lambda one: ("/" in one, one)))  # those in folders last
        super().__init__(f"unknown {kind} {name!r}.{hint} Known: {names}.")


class MissingPackagesError(ConfigError):
    """Packages that the plain install does not have are needed; the message names all of them and one command."""


class ModelError(EvomemError):
    """A model cannot be found, loaded, or managed."""


class UnsupportedModelError(ModelError):
    """A model whose attention cannot be managed by the slot cache."""


class CacheError(EvomemError, RuntimeError):
    """The slot cache was used in a way that would give wrong results."""


class TaskError(EvomemError, ValueError):
    """A task cannot be built or would measure nothing (for example: at chance with the full cache)."""


class PluginError(EvomemError, ValueError):
    """A plug-in folder is damaged, incomplete, or of an unknown version; the message names file and field."""


class RunError(EvomemError, RuntimeError):
    """A run folder is in use, damaged, or belongs to another configuration."""


class FitnessError(EvomemError, RuntimeError):
    """The search cannot go on with the fitness values that it got."""


class PlanError(ConfigError):
    """A plan needs more memory, disk or time than there is; said before it begins."""


class EvaluationError(EvomemError, RuntimeError):
    """A measurement gave no number (NaN or infinite), where one was asked for."""


class OutOfMemoryError(EvomemError, RuntimeError):
    """Memory has ended: of a device, or of the machine itself.

    Attributes
    ----------
    memory : ``device`` or ``host``.
    """

    def __init__(self, message: str, memory: str) -> None:
        super().__init__(message)
        self.memory = memory


class WorkerError(EvomemError, RuntimeError):
    """Workers cannot be started, or cannot go on; what is finished is kept."""
