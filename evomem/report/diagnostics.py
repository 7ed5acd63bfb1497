"""Report: what a search says of its own steps, as a picture: gradient, distance from the warm start, the oracle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from evomem.report.plots import figure_with, save_figure
from evomem.tracking.base import GenerationRecord

_PANELS = (
    ("signal to noise of the gradient", ("signal_to_noise",)),
    ("nats per random choice", ("kl", "entropy")),
    ("against the oracle", ("rank_correlation", "good_decisions")),
    ("cost of the ranking", ("expected_cost", "sorted_cost")),
)
_COLOURS = ("#0072B2", "#D55E00")
_NAMES = {
    "signal_to_noise": "signal to noise",
    "kl": "KL to the warm start",
    "entropy": "entropy",
    "rank_correlation": "rank correlation with future attention",
    "good_decisions": "good decisions (Belady)",
    "expected_cost": "expected",
    "sorted_cost": "deployed",
}


def diagnostics_plot(path: Path, generations: Sequence[GenerationRecord], title: str) -> bool:
    """Draw the diagnostics of a search over its generations; return whether there was anything to draw.

    A panel per kind, of those that the search has; generations in which a number was not measured are left out. Dotted
    lines mark where stages begin.
    """
    series = {
        name: [
            (record.generation + 1, record.diagnostics[name])
            for record in generations
            if math.isfinite(record.diagnostics.get(name, math.nan))
        ]
        for _, names in _PANELS
        for name in names
    }
    panels = [(label, [name for name in names if series[name]]) for label, names in _PANELS]
    panels = [(label, names) for label, names in panels if names]
    if not panels:
        return False
    figure, all_axes = figure_with(title, rows=len(panels), size=(8.6, 1.2 + 1.7 * len(panels)))
    starts = [b.generation + 1 for a, b in itertools.pairwise(generations) if a.stage != b.stage]
    for axes, (label, names) in zip(all_axes, panels, strict=True):
        for name, colour in zip(names, _COLOURS, strict=False):
            x, y = zip(*series[name], strict=True)
            dots = "o" if len(x) < 25 else None
            axes.plot(x, y, color=colour, linewidth=1.5, marker=dots, markersize=4, label=_NAMES[name])
        if "signal_to_noise" in names:  # the first steps of an exact gradient would flatten all others
            axes.set_yscale("symlog", linthresh=1)
            axes.yaxis.set_major_formatter("{x:g}")
        for start in starts:
            axes.axvline(start - 0.5, color="#8C8C8C", linewidth=1, linestyle=":")
        axes.set_xlim(0.5, generations[-1].generation + 1.5)
        axes.set_ylabel(label.replace(" of the ", "\nof the ").replace(" against", "\nagainst"), fontsize=9)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    all_axes[-1].set_xlabel("generation")
    save_figure(figure, path)
    return True
