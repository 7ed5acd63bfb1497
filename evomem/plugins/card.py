"""Plug-in: the model card, from what is known about the manager.

What a provenance says is put into the card as text: never executed, and kept from breaking a table or the head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from evomem.errors import PluginError
from evomem.plugins.hub import REPOSITORY

_TEMPLATE = "card.md.jinja"
_CAPTIONS = {
    "comparison": "Log-likelihood against the measured size of the cache; bars are 95 % intervals",
    "fitness": "Fitness by generation",
    "front": "The front: score against measured bytes",
}


def render_card(
    name: str, config: Mapping[str, Any], provenance: Mapping[str, Any], pictures: Sequence[str] = ()
) -> str:
    """Return the model card as Markdown.

    Parameters
    ----------
    name : title of the card.
    config : contents of ``config.json``.
    provenance : contents of ``provenance.json``; what it does not hold is left out of the card. ``comparison`` holds
        rows as `evomem.evaluation.compare` makes them, ``sentences`` what they say, ``transfer`` rows on other models.
    pictures : names of the files in ``assets/``.

    Raises
    ------
    PluginError : the provenance holds something else than a search writes where the card looks for it.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not a page
    )
    environment.filters.update(number=_number, interval=_interval, kib=_kib, cell=_cell, count=_count, yaml=_yaml)
    # JSON is the form in which the two arrive from disk; a card from memory must not differ.
    try:
        return environment.get_template(_TEMPLATE).render(
            name=provenance.get("experiment") or name,
            config=config,
            models=_models(provenance),
            # The hub refuses a card whose base models are not repositories: an alias or a folder is none.
            base_models=[model for model, _ in _models(provenance) if REPOSITORY.fullmatch(model)],
            provenance=provenance,
            scores=provenance.get("scores") or {},
            tasks=provenance.get("tasks") or [],
            rows=provenance.get("comparison") or [],
            transfer=provenance.get("transfer") or [],
            sentences=provenance.get("sentences") or [],
            spent=provenance.get("spent") or {},
            pictures=[(file, _caption(file)) for file in pictures],
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise PluginError(f"{name}: provenance: no model card can be made from it: {error}") from None


def _caption(file: str) -> str:
    stem = file.removesuffix(".png")
    return _CAPTIONS.get(stem.partition("-")[0], stem)


def _models(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the names of the models that it was searched on, and the hashes of their weights."""
    several = provenance.get("model_digests")
    if isinstance(several, list):
        return [(str(one.get("name", "?")), str(one.get("model_digest", "?"))) for one in several]
    model = provenance.get("model")
    name = model.get("name") if isinstance(model, Mapping) else model
    return [(str(name), str(provenance.get("model_digest", "?")))] if name else []


def _number(value: Any, digits: int = 3) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    return f"{value:.{digits}f}"


def _interval(value: Any) -> str:
    whole = isinstance(value, Sequence) and len(value) == 2
    return f"[{_number(value[0])}, {_number(value[1])}]" if whole else "-"


def _kib(value: Any) -> str:
    return f"{value / 1024:,.0f}" if isinstance(value, int | float) and math.isfinite(value) else "-"


def _count(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) and math.isfinite(value) else "?"


def _cell(value: Any, length: int = 200) -> str:
    """Return a text on one line, in which nothing ends a table's cell or opens a tag."""
    text = " ".join(str(value).split())[:length]
    return text.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _yaml(value: Any) -> str:
    """Return a text as YAML; a JSON string is one."""
    return json.dumps(str(value), ensure_ascii=True)
