"""Zoo: rows of the memory matrix by what a text states, against the same ranking at every fixed number: two tables.

    OMP_NUM_THREADS=1 python -m experiments.zoo.matrix_count --json docs/results/matrix_count.json \
        --runs runs/matrix/count-0 runs/matrix/count-1 runs/matrix/rate-0 runs/matrix/rate-1
    OMP_NUM_THREADS=1 python -m experiments.zoo.matrix_count --observations distinct_rate:32 effective_writes

Runs or plug-ins have an allocation by which the input decides. Each is set beside its own ranking at every number of
``--fixed``, on sealed samples with few or many pairs, by the score less the price of its bytes, which is the fitness of
the search (`experiments/matrix_count.yaml`). ``best fixed`` is the number that is best on these very samples, which
favours it. Then the rows that each holds after a text, as pairs grow at one length, and as filler grows at one
number of pairs. Intervals are of 95 %, paired sample by sample.

``--observations`` are what such an allocation may go by: numbers of a head. Each is shown in the mean over layers,
heads and training texts, after texts of which every write is kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from evomem.errors import ConfigError, EvomemError
from evomem.evaluation import Evaluation, Evaluator
from evomem.evaluation.measurement import EXACT, EvaluationProtocol
from evomem.evaluation.population import Recording
from evomem.files.atomic import write_atomically
from evomem.managers import MemoryManager
from evomem.managers.reallocation import with_allocation
from evomem.models import LoadedModel
from evomem.statistics import paired_bootstrap
from evomem.tasks import Split
from evomem.tasks import build as build_task
from experiments.zoo.matrix_recall import manager_of, matrix_model

MIX = "zoo_recall:length=128,pairs=16,fewest_pairs=2"
BY_PAIRS = "zoo_recall:length=128,pairs={}"
BY_LENGTH = "zoo_recall:length={},pairs=8"


def measured(
    loaded: LoadedModel, spec: str, managers: Sequence[MemoryManager], given: argparse.Namespace
) -> list[list[Evaluation]]:
    """Return the evaluations on sealed samples of a task, (managers, samples)."""
    task = build_task(spec, loaded.tokenizer)
    evaluator = Evaluator(loaded, EvaluationProtocol(kind="streaming", every=given.every))
    samples = task.samples(Split.SEALED, given.samples, given.seed)
    rows = [evaluator.evaluate(managers, sample, task, EXACT) for sample in samples]
    return [list(column) for column in zip(*rows, strict=True)]


def net(evaluations: Sequence[Evaluation], price: float) -> list[float]:
    """Return the log-likelihood less ``price`` per 10^6 bytes of mean memory, of every sample."""
    return [one.loglik - price * (one.bytes_mean or 0.0) / 1e6 for one in evaluations]


def summary(evaluations: Sequence[Evaluation], price: float) -> dict[str, float]:
    """Return means over samples."""
    return {
        "right": fmean(one.required("exact") for one in evaluations), "nats": fmean(one.loglik for one in evaluations),
        "rows": fmean(one.slots for one in evaluations), "bytes": fmean(one.bytes_mean or 0.0 for one in evaluations),
        "net": fmean(net(evaluations, price)),
    }  # fmt: skip


def by_counts(loaded: LoadedModel, runs: dict[str, MemoryManager], given: argparse.Namespace) -> dict[str, Any]:
    """Set every run beside its own ranking at fixed numbers, on texts with few or many pairs; prints a table."""
    fixed = [
        with_allocation(manager, "uniform").with_options(budget=count)
        for manager in runs.values()
        for count in given.fixed
    ]
    results = measured(loaded, given.task, [*runs.values(), *fixed], given)
    records: dict[str, Any] = {}
    print(f"\n{given.task}, {given.samples} sealed samples, {given.price:g} nats per 10^6 bytes\n")
    print("| run | a, b | right | nats | rows | less the price | best fixed | ahead of it by |\n|" + "---|" * 8)
    for number, (name, manager) in enumerate(runs.items()):
        evaluations = results[number]
        others = results[len(runs) + number * len(given.fixed) :][: len(given.fixed)]
        cells = {str(n): summary(one, given.price) for n, one in zip(given.fixed, others, strict=True)}
        best = max(range(len(others)), key=lambda number: cells[str(given.fixed[number])]["net"])
        ahead = paired_bootstrap(net(evaluations, given.price), net(others[best], given.price))
        records[name] = record = {
            "allocation": manager.allocation.describe(),
            "coefficients": [round(x, 4) for x in manager.allocation.coefficients.tolist()],  # type: ignore[operator, union-attr]
            **summary(evaluations, given.price), "best_fixed": given.fixed[best], "fixed": cells,
            "ahead": {"mean": ahead.mean, "interval": [ahead.low, ahead.high]},
            "net_by_sample": [round(x, 4) for x in net(evaluations, given.price)],
            "net_by_sample_of_best_fixed": [round(x, 4) for x in net(others[best], given.price)],
        }  # fmt: skip
        pair = ", ".join(f"{x:.2f}" for x in record["coefficients"])
        print(
            f"| {name} | {pair} | {record['right']:.2f} | {record['nats']:.3f} | {record['rows']:.1f} | "
            f"{record['net']:.3f} | {given.fixed[best]} ({cells[str(given.fixed[best])]['net']:.3f}) | "
            f"{ahead.mean:+.3f} [{ahead.low:+.3f}, {ahead.high:+.3f}] |",
            flush=True,
        )
    return records


def by_text(
    loaded: LoadedModel, runs: dict[str, MemoryManager], template: str, values: Sequence[int], given: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Return mean and deviation of the rows held after a text, by run and value; prints a table."""
    cells: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    for value in values:
        for name, results in zip(
            runs, measured(loaded, template.format(value), list(runs.values()), given), strict=True
        ):
            rows = [one.slots for one in results]
            cells[name][str(value)] = [round(fmean(rows), 2), round(stdev(rows), 2)]
    print(f"\n| rows after {template} | " + " | ".join(map(str, values)) + " |\n|" + "---|" * (len(values) + 1))
    for name, row in cells.items():
        print(
            f"| {name} | " + " | ".join(f"{mean:.1f} ± {spread:.1f}" for mean, spread in row.values()) + " |",
            flush=True,
        )
    return cells


def observed(loaded: LoadedModel, names: Sequence[str], given: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return what is observed of whole texts, by observation, then mean and deviation by text; prints a table.

    Raises
    ------
    ConfigError : there is no such observation of a memory matrix, or it is one of every slot.
    """
    model: Any = loaded.model
    policy, cells = Recording(frozenset(names)), dict[str, dict[str, list[float]]]()
    evaluator = Evaluator(loaded, EvaluationProtocol(kind="streaming", every=given.every))
    templates = [(BY_PAIRS, value) for value in given.pairs] + [(BY_LENGTH, value) for value in given.lengths]
    for template, value in templates:
        spec, values = template.format(value), dict[str, list[float]]()
        for sample in build_task(spec, loaded.tokenizer).samples(Split.TRAIN, given.texts, given.seed):
            cache = model.decided_cache(policy)
            with torch.no_grad():
                model(evaluator.tokens(sample).read, past_key_values=cache)
            views = [layer.view() for layer in cache.layers]
            for name in names:
                tensors = [view.recorded[name] for view in views]
                if tensors[0].dim() != 2:
                    raise ConfigError(
                        f"--observations {name}: is one of every slot; give those of a head, for example "
                        "effective_writes"
                    )
                values.setdefault(name, []).append(fmean(float(tensor.float().mean()) for tensor in tensors))
        for name, numbers in values.items():
            cells.setdefault(name, {})[spec] = [round(fmean(numbers), 3), round(stdev(numbers), 3)]
    print("\n| after | " + " | ".join(template.format(value) for template, value in templates) + " |")
    print("|" + "---|" * (len(templates) + 1))
    for name, row in cells.items():
        print(f"| {name} | " + " | ".join(f"{mean:.2f} ± {spread:.2f}" for mean, spread in row.values()) + " |")
    return cells


def main() -> None:
    """Measure, print, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=[], help="folders of runs or plug-ins, each with another name")
    parser.add_argument("--observations", nargs="+", default=[], help="numbers of a head, for a table of their own")
    parser.add_argument("--texts", type=int, default=8, help="training texts for --observations")
    parser.add_argument("--model", default="zoo-memory-matrix")
    parser.add_argument("--task", default=MIX, help="texts with few or many pairs")
    parser.add_argument("--fixed", type=int, nargs="+", default=[4, 8, 12, 16, 20, 24], help="fixed numbers of rows")
    parser.add_argument("--pairs", type=int, nargs="+", default=[2, 4, 8, 16], help=f"pairs in {BY_PAIRS}")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[64, 96, 128, 192, 256], help=f"tokens in {BY_LENGTH}"
    )
    parser.add_argument("--price", type=float, default=85.0, help="nats per 10^6 bytes; a row has about 350")
    parser.add_argument("--every", type=int, default=4, help="tokens between decisions")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the rows")
    given = parser.parse_args()
    if given.samples < 2 or given.every < 1 or min(given.fixed) < 1 or not 0 <= given.price < float("inf"):
        raise SystemExit(
            "give at least 2 samples, a decision every 1 or more tokens, fixed numbers of at least 1, and a finite "
            "price of at least 0"
        )
    if (
        bool(given.runs) == bool(given.observations)
        or given.texts < 2
        or len(set(given.observations)) < len(given.observations)
    ):
        raise SystemExit("give --runs, or --observations, each once, and at least 2 --texts of them")
    try:
        if given.json is not None:
            given.json.parent.mkdir(parents=True, exist_ok=True)  # before all that is measured
        loaded = matrix_model(given.model)
        runs = {Path(source).name: manager_of(source) for source in given.runs}
        if len(runs) < len(given.runs):
            raise SystemExit("--runs: two folders have one name; rename one of them")
        for name, manager in runs.items():
            if not hasattr(manager.allocation, "coefficients"):
                raise SystemExit(
                    f"--runs {name}: its allocation is {manager.allocation.name!r}, where the input decides nothing; "
                    "search one with by_effective_writes or by_distinct_rate"
                )
        record: dict[str, Any]
        if given.observations:
            record = {
                "model": given.model,
                "texts": given.texts,
                "observed": observed(loaded, given.observations, given),
            }
        else:
            record = {
                "model": given.model, "task": given.task, "price_per_megabyte": given.price, "samples": given.samples,
                "runs": by_counts(loaded, runs, given),
                "rows_by_pairs": by_text(loaded, runs, BY_PAIRS, given.pairs, given),
                "rows_by_length": by_text(loaded, runs, BY_LENGTH, given.lengths, given),
            }  # fmt: skip
    except (EvomemError, OSError) as error:
        raise SystemExit(str(error)) from None
    if given.json is not None:
        write_atomically(given.json, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
