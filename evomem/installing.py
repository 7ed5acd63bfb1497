"""Base: what evomem is called where packages are installed, and which packages an undertaking needs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec

from evomem.errors import MissingPackagesError

DISTRIBUTION = "evomem-toolkit"
"""Name of evomem's distribution. The one that is called ``evomem`` on the package index is another project's."""

NAMESAKE = "evomem"
"""Distribution of another project whose import name is ours too."""

EXTRAS: Mapping[str, str] = {
    "accelerate": "models",
    "cma": "search",
    "cmaes": "cmaes",
    "evotorch": "search",
    "gguf": "models",
    "gymnasium": "tasks",
    "matplotlib": "search",
    "ray": "search",
    "scipy": "search",
    "tensorboard": "track",
    "threadpoolctl": "search",
    "wandb": "track",
    "wonderwords": "tasks",
}
"""The extra that brings a package that the plain install does not have."""


def pip_install(*extras: str) -> str:
    """Return the command that adds extras to an installed evomem; ``search`` includes all others."""
    wanted = ["search"] if "search" in extras else sorted(set(extras))
    return f"pip install '{DISTRIBUTION}[{','.join(wanted)}]'" if wanted else f"pip install {DISTRIBUTION}"


def require(packages: Iterable[tuple[str, str]], install: Mapping[str, str] | None = None) -> None:
    """Check that packages are installed, all of them before anything else is done.

    Parameters
    ----------
    packages : pairs (name of a package, what it is for).
    install : the command that brings a package which is in none of `EXTRAS`.

    Raises
    ------
    MissingPackagesError : names every package that is missing, what each is for, and the commands that bring them.
    """
    purposes: dict[str, list[str]] = {}
    for package, purpose in packages:
        purposes.setdefault(package, []).append(purpose)
    missing = {package: dict.fromkeys(uses) for package, uses in purposes.items() if not installed(package)}
    if missing:
        what = ", ".join(f"{package} ({', '.join(uses)})" for package, uses in sorted(missing.items()))
        extras = [EXTRAS[package] for package in missing if package in EXTRAS]
        commands = [pip_install(*extras)] if extras else []
        commands += [command for package, command in (install or {}).items() if package in missing]
        raise MissingPackagesError(f"not installed: {what}. Run: {'; and: '.join(commands)}")


def installed(package: str) -> bool:
    """Tell whether a package can be imported; it is not imported."""
    try:
        return find_spec(package) is not None
    except ValueError:  # a module without a spec stands in its place
        return True


def find_namesake() -> Distribution | None:
    """Return the distribution of the other project called ``evomem`` if it is installed in this environment."""
    try:
        namesake = distribution(NAMESAKE)
    except PackageNotFoundError:
        return None
    ours = any(point.value == "evomem.cli.app:main" for point in namesake.entry_points)  # under the name it had before
    return None if ours else namesake


def warn_of_namesake() -> None:
    """Warn if the other project called ``evomem`` is installed too: its files and ours overwrite each other."""
    other = find_namesake()
    if other is not None:
        warnings.warn(
            f"another project's package {NAMESAKE} {other.version} is installed in {other.locate_file('')}. It has the "
            f"import name of {DISTRIBUTION}, and the files of the two overwrite each other. Run: pip uninstall "
            f"{NAMESAKE}; then install {DISTRIBUTION} again",
            stacklevel=3,
        )
