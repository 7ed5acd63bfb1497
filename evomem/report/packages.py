"""Report: which packages an undertaking needs beyond the plain install; all of them are asked for before it begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from evomem.installing import require
from evomem.models.aliases import Alias, aliases
from evomem.models.pretrained.gguf import NEEDS, cached_folders, damage
from evomem.runs.config import ExperimentConfig
from evomem.runs.pools import counted
from evomem.workers.units import WorkerOptions

Wanted = tuple[str, str]
"""A package, and what it is for."""


def require_for(
    models: Iterable[str] = (),
    tasks: Iterable[str] = (),
    *,
    drivers: Iterable[str] = (),
    intervals: bool = True,
    plots: bool = False,
    workers: bool = False,
    trackers: str = "",
) -> None:
    """Check, before anything is loaded or measured, that everything is installed which a command will need.

    Parameters
    ----------
    models : aliases, folders or hub ids.
    tasks : specs, for example ``multikey_1:length=500``.
    drivers : by name.
    intervals, plots, workers : whether differences get intervals, pictures are drawn, Ray is used.
    trackers : names, separated by commas.

    Raises
    ------
    MissingPackagesError : names all packages that are missing, what each is for, and the commands that bring them.
    UnknownNameError : there is no such task or driver.
    """
    wanted: list[Wanted] = [("scipy", "intervals")] if intervals else []
    wanted += [("matplotlib", "plots")] if plots else []
    wanted += [("ray", "workers")] if workers else []
    wanted += _of_tasks(tasks) + _of_drivers(drivers)
    named = {part.strip().partition(":")[0] for part in trackers.split(",")}
    wanted += [(name, f"--track {name}") for name in ("tensorboard", "wandb") if name in named]
    packed = [alias for name in models if isinstance(alias := aliases.get(name), Alias) and not _is_unpacked(alias)]
    wanted += [(package, f"model {alias.name}") for alias in packed for package in (alias.module, *NEEDS)]
    require(wanted, {alias.module: alias.install for alias in packed})


def require_for_search(config: ExperimentConfig, workers: WorkerOptions, trackers: str = "") -> None:
    """Check that everything is installed which a search and its report need; see `require_for`."""
    plan = config.plan()
    require_for(
        [model.name for model in config.all_models],
        [task.spec for stage in plan for task in stage.tasks],
        drivers=dict.fromkeys(stage.driver.name for stage in plan),
        plots=True,
        workers=workers.address is not None or counted(workers, config.threads).count != 0,
        trackers=trackers,
    )


def _is_unpacked(alias: Alias) -> bool:
    """Tell whether the cache holds the alias's weights in a form that needs no package."""
    return any(damage(folder) is None for folder in cached_folders(alias))


def _of_tasks(specs: Iterable[str]) -> list[Wanted]:
    from evomem.tasks import parse, tasks

    names = dict.fromkeys(parse(spec)[0] for spec in specs)
    return [(package, f"task {name}") for name in names for package in _packages(tasks.get(name))]


def _of_drivers(names: Iterable[str]) -> list[Wanted]:
    from evomem.drivers import drivers

    return [(package, f"driver {name}") for name in names for package in _packages(drivers.get(name))]


def _packages(kind: type) -> Sequence[str]:
    packages: Sequence[str] = getattr(kind, "packages", ())
    return packages
