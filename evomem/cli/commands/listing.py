"""CLI: the commands ``list`` and ``models``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from evomem.errors import ConfigError
from evomem.files.resources import list_resources, resource_path
from evomem.registry import Registry
from evomem.terminal import wide_console

Entries = dict[str, str]


def managers() -> Entries:
    """Managers by name."""
    from evomem.managers import managers as registry

    return _registered(registry)


def allocations() -> Entries:
    """Allocations by name, with their options: how layers and heads share a manager's budget."""
    from evomem.managers.allocation import allocations as registry

    found = _registered(registry)
    for name in found:
        try:
            fields = registry.get(name).Options.model_fields
        except ConfigError:
            continue
        if fields:
            found[name] += " Options: " + "; ".join(f"{key}: {field.description}" for key, field in fields.items())
    return found


def tasks() -> Entries:
    """Tasks by name."""
    from evomem.tasks import tasks as registry

    return _registered(registry)


def drivers() -> Entries:
    """Drivers by name."""
    from evomem.drivers import drivers as registry

    return _registered(registry)


def objectives() -> Entries:
    """Objectives by name."""
    from evomem.evaluation.objectives import objectives as registry

    return _registered(registry)


def observations() -> Entries:
    """What a cache records, and the features of slots that `feature_scorer` makes of it."""
    from evomem.managers.features import FEATURES as features
    from evomem.memory.observations import known_specs
    from evomem.memory.observations import observations as registry

    summaries = _registered(registry)
    found = {spec: f"recorded by the cache: {summaries[spec.partition(':')[0]]}" for spec in known_specs()}
    for name, feature in features.items():
        needs = feature.needs.format("W")
        found[name] = "feature of a slot" + (f", from {needs}" if needs else "")
    return found


def spaces() -> Entries:
    """Search spaces that come with evomem."""
    return {name: _comment("search_spaces", name) for name in list_resources("search_spaces")}


def experiments() -> Entries:
    """Experiments that come with evomem."""
    return {name: _comment("experiments", name) for name in list_resources("experiments")}


_SECTIONS: dict[str, Callable[[], Entries]] = {
    "managers": managers,
    "allocations": allocations,
    "tasks": tasks,
    "drivers": drivers,
    "objectives": objectives,
    "spaces": spaces,
    "experiments": experiments,
    "observations": observations,
}


def show(what: str | None, *, as_json: bool = False) -> None:
    """Print one section, or all."""
    found = {name: section() for name, section in _SECTIONS.items() if what in (None, name)}
    if as_json:
        print(json.dumps(found if what is None else found[what], indent=1, ensure_ascii=False))
        return
    console = wide_console()
    for name, entries in found.items():
        table = Table(title=name, title_justify="left", title_style="bold", box=None, show_header=False)
        table.add_column(no_wrap=True, style="green")
        table.add_column()
        for key, text in entries.items():
            table.add_row(Text(key), Text(text))
        console.print(table)


def show_models(*, as_json: bool = False) -> None:
    """Print the models that have an alias."""
    from evomem.models import available, cache_root

    found = available()
    if as_json:
        plain: list[dict[str, Any]] = [{**asdict(model), "where": model.where and str(model.where)} for model in found]
        print(json.dumps(plain, indent=1))
        return
    table = Table(title="models", title_justify="left", title_style="bold", box=None, header_style="dim")
    for heading in ("name", "state", "MB", "what", "where"):
        table.add_column(heading, justify="right" if heading == "MB" else "left", overflow="fold")
    for model in found:
        where = str(model.where) if model.where is not None else f"get it with: {model.install}"
        size = f"{model.bytes / 1e6:,.0f}" if model.bytes else ""
        table.add_row(*map(Text, (model.name, model.state, size, model.about, where)))
    console = wide_console()
    console.print(table)
    console.print(Text(f"cache: {cache_root()}; any local folder or hub id of a causal language model works too"))


def _registered(registry: Registry[Any]) -> Entries:
    """Return what is registered; what another package offers and breaks is listed with the reason."""
    found = {}
    for name in registry.names():
        try:
            lines = (registry.get(name).__doc__ or "").strip().splitlines()
            found[name] = lines[0] if lines else ""
        except ConfigError as error:
            found[name] = f"cannot be used: {error}"
    return found


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
