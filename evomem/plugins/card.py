"""Plug-in: the model card, from what is known about the manager.

What a provenance says is put into the card as text: never executed, and kept from breaking a table or the head.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from evomem.errors import PluginError
from evomem.managers.allocation import EmergentAllocation, ProbedAllocation, Slots, allocations
from evomem.plain_text import plain
from evomem.plugins.hub import REPOSITORY
from evomem.statistics import verdict

_TEMPLATE = "card.md.jinja"
_CAPTIONS = {
    "comparison": "Log-likelihood against the measured size of the cache; bars are 95 % intervals",
    "fitness": "Fitness by generation",
    "diagnostics": "What the search said of its own steps",
    "heads": "Slots of every layer and KV head after the context, on average over the samples",
    "front": "The front: score against measured bytes",
    "transfer": "Advantage over the best heuristic of each model; bars are 95 % intervals",
}
_MARKUP = re.compile(r"[\\|\[\]]")
"""What would end a table's cell, or begin a link or a picture."""
_EMPHASIS = {"better": "**{}**", "worse": "*{}*"}


def render_card(
    name: str,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    pictures: Sequence[str] = (),
    *,
    measured: bool = True,
) -> str:
    """Return the model card as Markdown.

    Parameters
    ----------
    name : title of the card.
    config : contents of ``config.json``.
    provenance : contents of ``provenance.json``; what it does not hold is left out of the card. ``comparison`` holds
        rows as `evomem.evaluation.compare` makes them, ``sentences`` what they say, ``transfer`` rows on other models.
    pictures : names of the files in ``assets/``.
    measured : whether the file has what an allocation wants to know of a model's heads.

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
    environment.filters["advantage"] = _advantage
    environment.tests["home"] = _at_home
    # JSON is the form in which the two arrive from disk; a card from memory must not differ.
    try:
        return environment.get_template(_TEMPLATE).render(
            name=provenance.get("experiment") or name,
            config=config,
            amount=_amount(config.get("budget"), config.get("allocation")),
            probed=_is_a(ProbedAllocation, config.get("allocation")),
            measured=measured,
            replaced=provenance.get("reallocated") or [],
            models=_models(provenance),
            # The hub refuses a card whose base models are not repositories: an alias or a folder is none.
            base_models=[model for model, _ in _models(provenance) if REPOSITORY.fullmatch(model)],
            provenance=provenance,
            scores=provenance.get("scores") or {},
            tasks=provenance.get("tasks") or [],
            rows=provenance.get("comparison") or [],
            **_transfer(provenance.get("transfer") or []),
            sentences=provenance.get("sentences") or [],
            spent=provenance.get("spent") or {},
            pictures=[(file, _caption(file)) for file in pictures],
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise PluginError(f"{name}: provenance: no model card can be made from it: {error}") from None


def _is_a(kind: type, described: Any) -> bool:
    """Whether an allocation, as ``config.json`` describes it, is of a kind: whether it looks at probes, say."""
    name = described.get("name") if isinstance(described, Mapping) else None
    return isinstance(name, str) and name in allocations and issubclass(allocations.get(name), kind)


def _amount(budget: Any, allocation: Any) -> str:
    """Return how much is kept at a budget under an allocation, as ``config.json`` has both."""
    whole = isinstance(budget, int)
    unit = "slots per KV head" if whole else "of the tokens read"
    if _is_a(EmergentAllocation, allocation):
        return f"at most {budget} {unit}, by the scores"
    options = allocation.get("options") if isinstance(allocation, Mapping) else None
    total = options.get("total") if isinstance(options, Mapping) and _is_a(Slots, allocation) else None
    if isinstance(total, Sequence) and len(total) == 2:
        return f"between {total[0]} and {total[1]} times {budget} {unit}, by the input"
    return f"{budget} {unit}, on average over the layers" if whole else f"{budget} {unit}"


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


def _transfer(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the rows on other models, with what is said of all of them."""
    away = [row for row in rows if not _at_home(row) and not row.get("recalibrated")]
    better, worse, equal = (sum(_verdict(row) == word for row in away) for word in ("better", "worse", "equal"))
    models = len({str(row.get("model")) for row in away})
    verdicts = (
        f"Of {better + worse + equal} cells on {models} other model{'s' if models > 1 else ''} it is better than the "
        f"best heuristic there in {better}, worse in {worse}, and not to be told from it in {equal}."
    )
    protocols = [str(row["protocol"]) for row in rows if row.get("protocol")]
    return {
        "transfer": rows,
        "found_on": ", ".join(dict.fromkeys(str(row.get("train_model") or "?") for row in rows)),
        "verdicts": verdicts if better + worse + equal else "",
        "common": max(protocols, key=protocols.count, default=""),
        "protocols": len(set(protocols)),
        "recalibrated": any(row.get("recalibrated") for row in rows),
    }


def _at_home(row: Mapping[str, Any]) -> bool:
    """Whether a row is about a model that the manager was found on."""
    return str(row.get("model")) in str(row.get("train_model", "")).split(" + ")


_WORDS = {"wins": "better", "loses": "worse", "ties": "equal", "unknown": ""}


def _verdict(row: Mapping[str, Any]) -> str:
    """Return whether the interval of the advantage excludes zero: better, worse or equal; nothing without one."""
    interval = row.get("interval")
    if not isinstance(interval, Sequence) or len(interval) != 2 or not all(map(_is_number, interval)):
        return ""
    return _WORDS[verdict(interval)]


def _advantage(row: Mapping[str, Any]) -> str:
    if not _is_number(row.get("difference")):
        return "-"
    verdict = _verdict(row)
    low, high = row["interval"] if verdict else (math.nan, math.nan)
    span = f" [{low:+.3f}, {high:+.3f}]" if verdict else ""
    return _EMPHASIS.get(verdict, "{}").format(f"{row['difference']:+.3f}{span}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if _is_number(value) else "-"


def _interval(value: Any) -> str:
    whole = isinstance(value, Sequence) and len(value) == 2
    return f"[{_number(value[0])}, {_number(value[1])}]" if whole else "-"


def _kib(value: Any) -> str:
    return f"{value / 1024:,.0f}" if isinstance(value, int | float) and math.isfinite(value) else "-"


def _count(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) and math.isfinite(value) else "?"


def _cell(value: Any, length: int = 200) -> str:
    """Return a text on one line that Markdown shows as it is: it ends no cell, opens no tag, and makes no link."""
    text = plain(" ".join(str(value).split())[:length]).replace("`", "'")
    return _MARKUP.sub(r"\\\g<0>", text).replace("&", "&amp;").replace("<", "&lt;")


def _yaml(value: Any) -> str:
    """Return a text as YAML; a JSON string is one."""
    return json.dumps(str(value), ensure_ascii=True)
