"""The mean of several plug-ins' numbers as a plug-in: what searches agree on stays, and what chance gave each goes out.

    python -m experiments.mean_of_plugins runs/slots-1/winner/plugin runs/slots-2/winner/plugin --out mean

The plug-ins must be of one kind, with the same options (but for the budget) and the same names and shapes of numbers.
Numbers are those that a search moves (parameters); all else, the budget too, is that of the first. It is worth it where
a search leaves directions open that matter elsewhere: numbers found on one model, for models that no search sees
(docs/results/slots_smollm2.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import evomem
from evomem.errors import ConfigError, EvomemError
from evomem.managers import MemoryManager
from evomem.plugins.schema import describe_manager


def mean_of(managers: Sequence[MemoryManager], names: Sequence[str]) -> MemoryManager:
    """Return the first manager with the mean of all managers' parameters.

    Raises
    ------
    ConfigError : fewer than two; one twice; no parameters; other kinds, options, or parameters than the first's.
    """
    if len(managers) < 2:
        raise ConfigError("a mean needs at least two plug-ins")
    places = [Path(name).resolve() for name in names]
    if twice := [name for place, name in enumerate(names) if places[place] in places[:place]]:
        raise ConfigError(f"{twice[0]}: is named twice, so it would count twice; name every plug-in once")
    first, numbers = managers[0], dict(managers[0].named_parameters())
    if not numbers:
        raise ConfigError(f"{names[0]}: has no numbers that a search moves, so there is nothing to take the mean of")
    for manager, name in zip(managers[1:], names[1:], strict=True):
        theirs = dict(manager.named_parameters())
        if _kind(manager) != _kind(first):
            raise ConfigError(f"{name}: is of another kind or has other options than {names[0]}")
        if {key: value.shape for key, value in theirs.items()} != {key: value.shape for key, value in numbers.items()}:
            raise ConfigError(f"{name}: has numbers of other names or shapes than {names[0]}")
    with torch.no_grad():
        for key, number in numbers.items():
            # In double precision, so that the order of the plug-ins does not matter.
            every = [dict(manager.named_parameters())[key].double() for manager in managers]
            number.copy_(torch.stack(every).mean(0))
    return first


def _kind(manager: MemoryManager) -> object:
    """Return what a plug-in says of its manager, without the budget: kind and options."""
    described = describe_manager(manager)
    options = {key: value for key, value in described.get("options", {}).items() if key != "budget"}
    return {**described, "options": options, "budget": None}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the mean of the plug-ins named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plugins", nargs="+", help="folders of plug-ins, two or more")
    parser.add_argument("--out", required=True, type=Path, help="folder of the plug-in to write")
    given = parser.parse_args(arguments)
    try:
        managers = [evomem.load(plugin) for plugin in given.plugins]
        sources = [
            {
                "plugin": plugin,
                "experiment": manager.provenance.get("experiment"),
                "seed": manager.provenance.get("seed"),
            }
            for plugin, manager in zip(given.plugins, managers, strict=True)
        ]
        # Scores of the first are not those of the mean, so nothing else of its provenance is taken along.
        evomem.save(
            mean_of(managers, given.plugins), given.out, {"experiment": given.out.name, "mean_of": sources}, pictures={}
        )
    except EvomemError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{given.out}: the mean of {len(managers)} plug-ins")


if __name__ == "__main__":
    main()
