"""Plug-in: the model card, from what is known about the manager."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

_TEMPLATE = "card.md.jinja"


def render_card(name: str, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """Return the model card as Markdown.

    Parameters
    ----------
    name : title of the card.
    config : contents of ``config.json``.
    provenance : contents of ``provenance.json``; what it does not hold is left out of the card. ``comparison`` holds
        rows as `evomem.evaluation.compare` makes them, ``sentences`` what they say.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not a page
    )
    environment.filters.update(number=_number, interval=_interval, kib=_kib)
    # JSON is the form in which the two arrive from disk; a card from memory must not differ.
    model = provenance.get("model")
    return environment.get_template(_TEMPLATE).render(
        name=provenance.get("experiment") or name,
        config=config,
        model=model.get("name") if isinstance(model, Mapping) else model,
        provenance=provenance,
        scores=provenance.get("scores") or {},
        tasks=provenance.get("tasks") or [],
        rows=provenance.get("comparison") or [],
        sentences=provenance.get("sentences") or [],
        spent=provenance.get("spent") or {},
    )


def _number(value: Any, digits: int = 3) -> str:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    return f"{value:.{digits}f}"


def _interval(value: Any) -> str:
    return f"[{_number(value[0])}, {_number(value[1])}]" if value else "-"


def _kib(value: Any) -> str:
    return f"{value / 1024:,.0f}" if isinstance(value, int | float) and math.isfinite(value) else "-"
