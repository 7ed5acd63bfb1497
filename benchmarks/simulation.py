"""Evaluation: utilisation and time per generation of 10 to 10,000 virtual workers, by the real scheduling core.

``python -m benchmarks.simulation`` writes ``docs/results/distributed_simulation.json`` and ``.png`` and prints the
tables of the page beside them. Nothing is timed: the clock is virtual, so any machine gives the same numbers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from evomem.workers.schedule import Policy
from evomem.workers.simulation import Cluster, Generation, Report, simulate

NAME = "distributed_simulation"
SEED, GENERATIONS = 0, 5
WORKERS, CHUNKS = (10, 100, 1000, 10_000), (1, 4, 8, 32)
UNITS_PER_WORKER = (2, 4, 8, 16, 32, 64)

NEW = Cluster()
KNOWN = replace(NEW, reading_seconds=0.0)
LONG = replace(KNOWN, unit_seconds=0.0, candidate_seconds=10.0)
MACHINES = {"straggler_share": 0.0, "slow_share": 0.05}
"""One machine in twenty straggles, always, instead of one evaluation in twenty, anywhere."""
NOBODY = {"straggler_share": 0.0}

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results"), help="folder of the JSON file and the picture"
    )
    options = parser.parse_args(arguments)
    rows = [
        *(
            row("grid", case, cluster, workers, Generation(chunk=chunk))
            for case, cluster in (("new contexts", NEW), ("known contexts", KNOWN))
            for workers in WORKERS
            for chunk in CHUNKS
        ),
        *causes(1000),
        *sizes(),
        *seeds(1000),
    ]
    for table in ("grid", "causes", "sizes", "seeds"):
        print(f"\n{markdown([line for line in rows if line['table'] == table])}")
    options.out.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(json.dumps(line) for line in rows)
    (options.out / f"{NAME}.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")
    plot(options.out / f"{NAME}.png", rows)


def causes(workers: int) -> list[Row]:
    """What changes if one thing is different, at one number of workers and one candidate a unit."""
    cases = {
        "known contexts": (KNOWN, Policy()),
        "no second copies": (KNOWN, Policy(copies=1)),
        "at most 2 copies": (KNOWN, Policy(copies=2)),
        "copies after 2 medians": (KNOWN, Policy(straggler=2.0)),
        "messages cost nothing": (replace(KNOWN, message_seconds=0.0), Policy()),
        "nobody straggles": (replace(KNOWN, **NOBODY), Policy()),
        "machines straggle": (replace(KNOWN, **MACHINES), Policy()),
        "10 s evaluations": (LONG, Policy()),
        "10 s evaluations, machines straggle": (replace(LONG, **MACHINES), Policy()),
        "10 s evaluations, nobody straggles": (replace(LONG, **NOBODY), Policy()),
    }
    return [
        row("causes", case, cluster, workers, Generation(chunk=1), policy) for case, (cluster, policy) in cases.items()
    ]


def sizes() -> list[Row]:
    """How large a generation must be: units per worker, with evaluations of 10 s."""
    return [
        row("sizes", case, cluster, workers, Generation(population=workers * count // 8, samples=8, chunk=1))
        for case, cluster in (
            ("evaluations straggle", LONG),
            ("machines straggle", replace(LONG, **MACHINES)),
            ("nobody straggles", replace(LONG, **NOBODY)),
        )
        for workers, counts in ((1000, UNITS_PER_WORKER), (10_000, (16,)))
        for count in counts
    ]


def seeds(workers: int) -> list[Row]:
    """How much chance does: the figures at one candidate a unit with three seeds."""
    return [
        row("seeds", f"{case}, seed {seed}", cluster, workers, Generation(chunk=1), seed=seed)
        for case, cluster in (
            ("new contexts, evaluations straggle", NEW),
            ("new contexts, machines straggle", replace(NEW, **MACHINES)),
            ("known contexts, evaluations straggle", KNOWN),
            ("known contexts, machines straggle", replace(KNOWN, **MACHINES)),
        )
        for seed in (0, 1, 2)
    ]


def row(
    table: str,
    case: str,
    cluster: Cluster,
    workers: int,
    generation: Generation,
    policy: Policy | None = None,
    seed: int = SEED,
) -> Row:
    """Return one simulation's figures and everything that it was made with."""
    policy = policy or Policy()
    report = simulate(workers, generation, generations=GENERATIONS, cluster=cluster, policy=policy, seed=seed)
    return {
        "table": table,
        "case": case,
        **figures(report),
        "cluster": asdict(cluster),
        "policy": asdict(policy),
        "seed": seed,
    }


def figures(report: Report) -> Row:
    """Return a report as plain numbers."""
    stats = report.stats
    return {
        "workers": report.workers, **asdict(report.generation), "generations": report.generations,
        "units_per_worker": report.units_per_worker, "results": report.results, "seconds": report.seconds,
        "utilisation": report.utilisation, "efficiency": report.efficiency, "wasted": report.wasted,
        "driver": report.driver, "bound": report.bound, "duplicates": stats.duplicates, "dropped": stats.dropped,
        "deaths": stats.deaths, "requeued": stats.requeued, "quarantined": stats.quarantined,
    }  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """Return rows as a table."""
    head = (
        "case", "workers", "chunk", "units per worker", "s per generation", "utilisation", "efficiency", "wasted",
        "driver busy", "copies", "deaths", "bound",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 2) + "---|"]
    for line in rows:
        shares = (f"{line[name]:.2f}" for name in ("utilisation", "efficiency", "wasted", "driver"))
        cells = (
            line["case"], f"{line['workers']:,}", line["chunk"], f"{line['units_per_worker']:.3g}",
            f"{line['seconds']:.1f}", *shares, f"{line['duplicates']:,}", line["deaths"], line["bound"],
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw utilisation and time per generation over workers, and utilisation over units per worker."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    grid = [line for line in rows if line["case"] == "new contexts"]
    for axes, what in ((left, "utilisation"), (middle, "seconds")):
        axes.set_xscale("log")
        axes.set_yscale("log" if what == "seconds" else "linear")
        curves(axes, {f"chunk {chunk}": [line for line in grid if line["chunk"] == chunk] for chunk in CHUNKS}, what)
        axes.set_xlabel("workers")
    middle.set_title("Seconds per generation: the same")
    left.set_title("Utilisation: 256 candidates on 64 samples")
    sizes = [line for line in rows if line["table"] == "sizes" and line["workers"] == 1000]
    cases = {name: [line for line in sizes if line["case"] == name] for name in dict.fromkeys(s["case"] for s in sizes)}
    right.set_xscale("log", base=2)
    curves(right, cases, "utilisation", "units_per_worker")
    right.set_xticks(UNITS_PER_WORKER, [str(count) for count in UNITS_PER_WORKER])
    right.set(xlabel="units per worker and generation", title="Utilisation: 1,000 workers, 10 s evaluations")
    for axes in (left, right):
        axes.axhline(0.85, color="#8C8C8C", linewidth=1, linestyle="--", zorder=0)
        axes.annotate(
            "goal .85", (0.99, 0.85), xycoords=("axes fraction", "data"), xytext=(0, -11), textcoords="offset points",
            color="#666666", fontsize=8.5, ha="right",
        )  # fmt: skip
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def curves(axes: Any, lines: dict[str, list[Row]], what: str, over: str = "workers") -> None:
    """Draw a curve per name, each labelled at its end; labels that would touch are pushed apart."""
    # Okabe and Ito's palette, which people with any kind of colour vision tell apart.
    colours = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")
    ends = []
    for colour, (name, rows) in zip(colours, lines.items(), strict=False):
        x, y = [row[over] for row in rows], [row[what] for row in rows]
        axes.plot(x, y, "o-", color=colour)
        ends.append((y[-1], x[-1], name, colour))
    if what == "utilisation":
        axes.set_ylim(0, 1.02)
    axes.spines[["top", "right"]].set_visible(False)
    points = 72 / axes.figure.dpi
    last = float("-inf")
    for y, x, name, colour in sorted(ends):
        height = axes.transData.transform((x, y))[1] * points
        last = max(height, last + 12)
        axes.annotate(
            name, (x, y), xytext=(8, last - height), textcoords="offset points", color=colour, fontsize=9.5,
            va="center", annotation_clip=False,
        )  # fmt: skip


if __name__ == "__main__":
    main()
