"""CLI: the commands ``list`` and ``models``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel
from rich.table import Table
from rich.text import Text

from evomem.cli.options import Listing
from evomem.errors import ConfigError
from evomem.files.resources import list_resources, resource_path
from evomem.registry import Registry
from evomem.terminal import wide_console

Entries = dict[str, str]

PAGES = {Listing.allocations: "docs/allocations.md", Listing.drivers: "docs/drivers.md"}
"""Pages that say which of a section's entries to take when."""


def entries(section: Listing) -> Entries:
    """Return what a section lists: names, and what they are."""
    match section:
        case Listing.managers:
            from evomem.managers import managers
            from evomem.managers.options import ManagerOptions

            return _with_options(managers, ManagerOptions)
        case Listing.allocations:
            return _allocations()
        case Listing.tasks:
            from evomem.tasks import tasks

            return _with_options(tasks)
        case Listing.drivers:
            from evomem.drivers import drivers

            return _registered(drivers)
        case Listing.objectives:
            from evomem.evaluation.objectives import objectives

            return _registered(objectives)
        case Listing.spaces:
            return _files("search_spaces")
        case Listing.experiments:
            return _files("experiments")
        case Listing.observations:
            return _observations()


def _allocations() -> Entries:
    """Return allocations by name, with their options: how layers and heads share a manager's budget."""
    from evomem.managers.allocation import ProbedAllocation, allocations

    listed = _with_options(allocations)
    for name in listed:
        try:
            probed = issubclass(allocations.get(name), ProbedAllocation)
        except ConfigError:
            continue
        if probed:
            listed[name] += " What the heads do is measured once per model, by itself."
    return listed


def _observations() -> Entries:
    """Return what a cache records, and the features of slots that `feature_scorer` makes of it."""
    from evomem.managers.features import FEATURES
    from evomem.memory.observations import known_specs, observations

    summaries = _registered(observations)
    listed = {}
    for spec in known_specs():
        kind = observations.get(spec.partition(":")[0])
        listed[spec] = f"recorded by the cache: {summaries[kind.name]}"
        if kind.needs:
            listed[spec] += f" Needs {' and '.join(sorted(kind.needs))}."
    for name, feature in FEATURES.items():
        recorded = feature.needs.partition(":")[0]
        needs = feature.needs.format(observations.get(recorded).takes) if recorded else ""
        if name in listed:
            listed[name] += " Also a feature of a slot."
        else:
            listed[name] = "feature of a slot" + (f", from {needs}" if needs else "")
    return listed


def show(what: Listing | None, *, as_json: bool = False) -> None:
    """Print one section, or all."""
    listed = {section.value: entries(section) for section in Listing if what in (None, section)}
    if as_json:
        print(json.dumps(listed if what is None else listed[what], indent=1, ensure_ascii=False))
        return
    console = wide_console()
    for title, lines in listed.items():
        table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
        table.add_column(no_wrap=True, style="green")
        table.add_column()
        for name, text in lines.items():
            table.add_row(Text(name), Text(text))
        console.print(table)
        if page := PAGES.get(Listing(title)):
            console.print(Text(f"{page} says which to take when", style="dim"))


def show_models(*, as_json: bool = False) -> None:
    """Print the models that have an alias."""
    from evomem.models import available, cache_root

    models = available()
    if as_json:
        plain: list[dict[str, Any]] = [{**asdict(model), "where": model.where and str(model.where)} for model in models]
        print(json.dumps(plain, indent=1))
        return
    table = Table(title="models", title_justify="left", title_style="bold", box=None, header_style="dim")
    for heading in ("name", "state", "MB", "what", "where"):
        table.add_column(heading, justify="right" if heading == "MB" else "left", overflow="fold")
    for model in models:
        where = str(model.where) if model.where is not None else f"get it with: {model.install}"
        size = f"{model.bytes / 1e6:,.0f}" if model.bytes else ""
        table.add_row(*map(Text, (model.name, model.state, size, model.about, where)))
    console = wide_console()
    console.print(table)
    console.print(Text(f"cache: {cache_root()}; any local folder or hub id of a causal language model works too"))


def _registered(registry: Registry[Any]) -> Entries:
    """Return what is registered; what another package offers and breaks is listed with the reason."""
    listed = {}
    for name in registry.names():
        try:
            lines = (registry.get(name).__doc__ or "").strip().splitlines()
            listed[name] = lines[0] if lines else ""
        except ConfigError as error:
            listed[name] = f"cannot be used: {error}"
    return listed


def _with_options(registry: Registry[Any], shared: type[BaseModel] | None = None) -> Entries:
    """Return what is registered with its options, but for those of ``shared``, which all have."""
    listed = _registered(registry)
    for name in listed:
        try:
            fields = registry.get(name).Options.model_fields
        except ConfigError:
            continue
        common = {} if shared is None else shared.model_fields
        # Managers of other packages need not describe their options.
        options = [
            f"{key}: {field.description}" if field.description else key
            for key, field in fields.items()
            if key not in common
        ]
        if options:
            listed[name] += " Options: " + "; ".join(options)
    return listed


def _files(kind: str) -> Entries:
    """Return the YAML files of a kind that come with evomem, with the comments that they begin with."""
    return {name: _comment(kind, name) for name in list_resources(kind)}


def _comment(kind: str, name: str) -> str:
    """The comment that a YAML file begins with; indented lines, which are commands, stay lines of their own."""
    paragraphs: list[str] = []
    flowing = False
    for line in resource_path(kind, name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").removeprefix(" ")
        indented = text.startswith(" ")
        if flowing and not indented:
            paragraphs[-1] += f" {text}"
        else:
            paragraphs.append(text)
        flowing = not indented
    return "\n".join(paragraphs)
