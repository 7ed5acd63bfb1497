"""Zoo: what the memory matrix recalls beyond its window, written by itself and decided by managers: a table.

    OMP_NUM_THREADS=1 python -m experiments.zoo.matrix_recall --tasks zoo_recall:length=128,pairs=16
    OMP_NUM_THREADS=1 python -m experiments.zoo.matrix_recall lru runs/matrix/all-0 runs/matrix/all-1 \
        --tasks zoo_forgetting:length=128,pairs=10 --slots 32,16 --json docs/results/matrix_decided.json

``emptied`` is the model whose matrix is emptied between context and question: what the window alone can do. Own writing
in fewer slots is that of the model with the first slots of its matrix. Managers decide every ``--every`` tokens, and
their budget is that much smaller than ``--slots``, so that never more rows are held, not even before a decision.
Folders ``ARM-SEED`` (runs or plug-ins) are one arm: the mean over its seeds is taken sample by sample. Intervals are of
95 %, over samples; ``ahead`` is the mean log-likelihood minus that of the model's own writing in as many slots.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch

from evomem import plugins
from evomem.errors import ConfigError, EvomemError
from evomem.evaluation import Evaluator
from evomem.evaluation.measurement import EXACT, EvaluationProtocol
from evomem.files.atomic import write_atomically
from evomem.managers import MemoryManager, build
from evomem.models import LoadedModel, load
from evomem.models.architectures.memory_matrix import MemoryMatrix
from evomem.statistics import bootstrap_mean
from evomem.tasks import Sample, Split
from evomem.tasks import build as build_task
from evomem.tasks.streams.base import StreamTask

FIELD = ("random", "fifo", "lru", "lfu", "keydiff")


def with_slots(model: Any, slots: int) -> Any:
    """Return a copy of a memory matrix with the first ``slots`` slots of every layer."""
    fewer = copy.deepcopy(model)
    for block in fewer.blocks:
        memory = block.attention.memory
        if memory is not None:
            memory.initial = torch.nn.Parameter(memory.initial[:, :slots].detach().clone(), requires_grad=False)
    return fewer


@torch.no_grad()
def own_recall(
    evaluator: Evaluator, model: Any, samples: Sequence[Sample], *, empties: bool = False
) -> list[list[float]]:
    """Return (right, log-likelihood) of every sample's answer, the memory written by the model itself.

    model : a `MemoryMatrix`, or a `Fam`.
    empties : empty the matrix between context and question; window and positions stay.
    """
    results = []
    for sample in samples:
        tokens, cache = evaluator.tokens(sample), model.new_cache()
        model(tokens.read, past_key_values=cache)
        if empties:
            for block, layer in zip(model.blocks, cache.layers, strict=True):
                if layer.matrix is not None:
                    layer.begin(block.attention.memory.initial.expand_as(layer.matrix))
        fed = torch.cat((tokens.prompt, tokens.answer[:, :-1]), 1)
        logits = model(fed, past_key_values=cache).logits[:, -tokens.answer.shape[1] :]
        logs = logits.log_softmax(-1).gather(-1, tokens.answer[..., None]).mean()
        results.append([float((logits.argmax(-1) == tokens.answer).all()), float(logs)])
    return results


def manager_of(source: str) -> MemoryManager:
    """Return the manager of a spec, a plug-in's folder, or a run's."""
    folder = Path(source) / "winner" / "plugin"
    if "/" not in source:
        return build(source)
    return plugins.load(str(folder) if folder.is_dir() else source)


def arm_of(source: str) -> str:
    """Return the arm of an entrant: its name, without the seed where it is a folder."""
    name = Path(source).name if "/" in source else source
    before, _, seed = name.rpartition("-")
    return before if "/" in source and before and seed.isdigit() else name


@dataclass
class Row:
    """What one memory came to, sample by sample.

    Attributes
    ----------
    memory : its name.
    budget : slots; None: no limit.
    right, nats : (seeds, samples), whether the answer is right, and its mean log-likelihood.
    slots, nbytes : means of the slots after the context, and of the bytes while it was read.
    """

    memory: str
    budget: int | None
    right: list[list[float]]
    nats: list[list[float]]
    slots: float
    nbytes: float

    def means(self, values: list[list[float]]) -> list[float]:
        """Return the mean over seeds of every sample."""
        return [sum(column) / len(column) for column in zip(*values, strict=True)]

    def record(self, own: Row | None) -> dict[str, Any]:
        """Return the row as it is printed and saved, beside the model's own writing in as many slots."""
        right, nats = self.means(self.right), self.means(self.nats)
        record: dict[str, Any] = {
            "memory": self.memory, "budget": self.budget, "seeds": len(self.nats), "samples": len(nats),
            "right": mean(right), "right_interval": bootstrap_mean(right).bounds(), "nats": mean(nats),
            "nats_by_seed": [mean(one) for one in self.nats], "slots": self.slots, "bytes": self.nbytes,
        }  # fmt: skip
        if own is not None and own is not self:
            ahead = [mine - other for mine, other in zip(nats, own.means(own.nats), strict=True)]
            record |= {"ahead": mean(ahead), "ahead_interval": bootstrap_mean(ahead).bounds()}
        return record


def line(record: dict[str, Any]) -> str:
    """Return a row of the table."""
    low, high = record["right_interval"]
    ahead = ""
    if "ahead" in record:
        ahead = f"{record['ahead']:+.3f} [{record['ahead_interval'][0]:+.3f}, {record['ahead_interval'][1]:+.3f}]"
    seeds = " ".join(f"{one:.3f}" for one in record["nats_by_seed"]) if record["seeds"] > 1 else ""
    budget = "" if record["budget"] is None else record["budget"]
    return (
        f"| {record['memory']} | {budget} | {record['right']:.2f} [{low:.2f}, {high:.2f}] | {record['nats']:.3f} | "
        f"{ahead} | {seeds} | {record['slots']:.1f} | {record['bytes'] / 1024:.1f} |"
    )


def measure(
    loaded: LoadedModel, spec: str, managers: Mapping[str, MemoryManager], given: argparse.Namespace
) -> list[dict[str, Any]]:
    """Print the table of one task, and return its rows.

    Raises
    ------
    ConfigError : the task has streams, which no language model reads; or a manager holds more than the slots it is
        compared in.
    """
    task = build_task(spec, loaded.tokenizer)
    if isinstance(task, StreamTask):
        raise ConfigError(
            f"--tasks {spec}: has streams of requests, which a memory matrix does not read; take zoo_recall"
        )
    samples = task.samples(Split.SEALED, given.samples, given.seed)
    evaluator = Evaluator(loaded, EvaluationProtocol(kind="streaming", every=given.every))
    evaluator.check_positions(samples)
    model: Any = loaded.model
    rows = [own_row(evaluator, model, "emptied", None, samples, empties=True)]
    rows += [own_row(evaluator, with_slots(model, number), "own writing", number, samples) for number in given.slots]
    own = {row.budget: row for row in rows if row.budget is not None}
    entrants: list[tuple[str, int | None]] = [("full", None)]
    entrants += [(source, budget) for budget in given.slots for source in managers]
    entered = [build("full")]
    entered += [
        managers[source].with_options(budget=most - given.every) for source, most in entrants if most is not None
    ]
    results = [evaluator.evaluate(entered, sample, task, EXACT) for sample in samples]
    arms: dict[tuple[str, int | None], list[int]] = {}
    for number, (source, budget) in enumerate(entrants):
        arms.setdefault((arm_of(source), budget), []).append(number)
    for (name, budget), numbers in arms.items():
        right = [[one[number].required("exact") for one in results] for number in numbers]
        nats = [[one[number].loglik for one in results] for number in numbers]
        slots = mean([one[number].slots for number in numbers for one in results])
        if budget is not None and slots > budget:
            raise ConfigError(
                f"{name}: holds {slots:.1f} rows where at most {budget} are compared; give it a budget that it keeps"
            )
        nbytes = mean([one[number].bytes_mean or 0.0 for number in numbers for one in results])
        rows.append(Row(name, budget, right, nats, slots, nbytes))
    records = [row.record(own.get(row.budget)) for row in rows]
    print(f"\n{spec}, a decision every {given.every} tokens, {len(samples)} sealed samples\n")
    print("| memory | slots | right | nats | ahead of own writing | nats by seed | held | KiB |\n|" + "---|" * 8)
    for record in records:
        print(line(record), flush=True)
    return records


def own_row(
    evaluator: Evaluator, model: Any, name: str, slots: int | None, samples: Sequence[Sample], *, empties: bool = False
) -> Row:
    """Return what the model's own writing comes to."""
    results, cache = own_recall(evaluator, model, samples, empties=empties), model.new_cache()
    model(evaluator.tokens(samples[0]).read, past_key_values=cache)
    held = float(model.blocks[-1].attention.memory.initial.shape[1])
    return Row(name, slots, [[one[0] for one in results]], [[one[1] for one in results]], held, cache.nbytes())


def matrix_model(name: str) -> LoadedModel:
    """Return a loaded memory matrix.

    Raises
    ------
    ConfigError : the model is another one, or has no memory.
    """
    loaded = load(name)
    if not isinstance(loaded.model, MemoryMatrix) or not loaded.model.config.memory_layers:
        raise ConfigError(f"{name} has no memory matrix; give zoo-memory-matrix, or a folder of such a model")
    return loaded


def slot_counts(text: str) -> list[int]:
    """Return numbers of slots that commas separate; raise `argparse.ArgumentTypeError` for anything else."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers of at least 1, for example 32,16")
    return [int(part) for part in parts]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("managers", nargs="*", default=list(FIELD), help="specs, and folders of plug-ins or runs")
    parser.add_argument("--model", default="zoo-memory-matrix")
    parser.add_argument("--tasks", nargs="+", default=["zoo_recall:length=128,pairs=16"])
    parser.add_argument("--slots", type=slot_counts, default=[32, 16], help="most rows that are held at any time")
    parser.add_argument("--every", type=int, default=4, help="tokens between decisions")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the rows")
    given = parser.parse_args(arguments)
    try:
        check(given)
        if given.json is not None:
            given.json.parent.mkdir(parents=True, exist_ok=True)  # before all that is measured
        loaded = matrix_model(given.model)
        most = int(loaded.model.config.matrix_slots)  # type: ignore[arg-type]
        if too_many := [number for number in given.slots if number > most]:
            raise ConfigError(f"--slots {too_many[0]}: the model's own matrix has {most} slots; give at most that many")
        entrants = {source: manager_of(source) for source in given.managers}
        tables = {spec: measure(loaded, spec, entrants, given) for spec in given.tasks}
        if given.json is not None:
            record = {"every": given.every, "model": given.model, "tasks": tables}
            write_atomically(given.json, (json.dumps(record, indent=1) + "\n").encode())
    except (EvomemError, OSError) as error:
        raise SystemExit(str(error)) from None


def check(given: argparse.Namespace) -> None:
    """Raise `ConfigError` where numbers or names of the command line say nothing that could be measured."""
    for name, least in (("every", 1), ("samples", 2), ("seed", 0)):
        if getattr(given, name) < least:
            raise ConfigError(f"--{name} {getattr(given, name)}: give at least {least}")
    for name in ("managers", "tasks", "slots"):
        values = getattr(given, name)
        if twice := [value for place, value in enumerate(values) if value in values[:place]]:
            raise ConfigError(f"{name}: {twice[0]} is there twice; leave one out")
    if given.slots and min(given.slots) <= given.every:
        raise ConfigError(
            f"--slots {min(given.slots)}: a decision every {given.every} tokens would leave none; give at least "
            f"{given.every + 1}"
        )


if __name__ == "__main__":
    main()
