"""Run: how many blocks a pass key is held by a feedback memory, by itself and under managers: a table.

    python -m experiments.fam runs/fam/gate-1 runs/fam/gate-2 runs/fam/gate-3 --constants 0.02,0.1,0.5 \
        --json docs/results/fam.json
    python -m experiments.fam --model runs/fam/blocks --blocks 2,3,4,8
    python -m experiments.fam runs/fam/gate-1 --segments 0,2,3
    python -m experiments.fam --oracle --blocks 24

Every row is a memory on sealed samples of ``zoo_passkey`` of so many blocks: ``own`` is the model by itself, which
writes every update whole; subjects are specs, and folders of plug-ins or runs. Folders ``ARM-SEED`` are one arm: the
mean over its seeds is taken sample by sample. ``best constant`` is, at every length, the constant gate of
``--constants`` that has most right answers there, and among equals the likeliest ones, chosen on these very samples.
``ahead`` is right answers minus its. ``--oracle`` adds rows that know where the key is: ``oracle`` writes the first
block and the one with the key, ``until key`` every block up to that one, ``nothing`` none. Intervals are of 95 %, over
samples. Rows of an earlier run stay in the JSON file unless they are measured anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch

from evomem.errors import EvomemError
from evomem.evaluation import Evaluator
from evomem.evaluation.measurement import EXACT, EvaluationProtocol
from evomem.managers import MemoryManager, build
from evomem.managers.options import Schedule
from evomem.memory import Decision, LayerView
from evomem.models import LoadedModel, load
from evomem.models.architectures.fam import Fam
from evomem.models.pretrained.files import write_json
from evomem.statistics import bootstrap_mean, paired_bootstrap
from evomem.tasks import Sample, Split
from evomem.tasks import build as build_task
from evomem.tasks.text.zoo import PASSKEY
from experiments.arguments import numbers
from experiments.zoo.matrix_recall import arm_of, manager_of, own_recall

TASK = "zoo_passkey"
OWN, CONSTANT, BEST = "own", "constant", "best constant"
ORACLES: dict[str, Callable[[int, int], bool]] = {
    "oracle": lambda block, key: block in (0, key),
    "until key": lambda block, key: block <= key,
    "nothing": lambda block, key: False,
}
"""Whether a block's update is written, by the number of the block and of the one with the key."""
LONG = 256
"""Blocks from which on a text has fewer samples (``--long-samples``)."""


@dataclass
class Row:
    """What one memory came to on samples of one length.

    Attributes
    ----------
    memory : its name.
    change : of an oracle, mean relative size of the last layer's updates by filler, and by the block with the key.
    right, nats : (seeds, samples), whether the answer is right, and its log-likelihood.
    nbytes : (seeds, samples), most bytes held at once, keys and values of the segments included.
    """

    memory: str
    right: list[list[float]]
    nats: list[list[float]]
    nbytes: list[list[float]]
    change: tuple[float, float] | None = None

    @property
    def by_sample(self) -> list[float]:
        """The mean over seeds of whether the answer is right, of every sample."""
        return [mean(column) for column in zip(*self.right, strict=True)]

    def record(self, best: Row | None) -> dict[str, Any]:
        """Return the row as it is saved, beside the best constant gate."""
        right = self.by_sample
        record: dict[str, Any] = {
            "memory": self.memory, "seeds": len(self.right), "samples": len(right), "right": mean(right),
            "right_interval": bootstrap_mean(right).bounds(), "right_by_seed": [mean(one) for one in self.right],
            "nats": mean([mean(one) for one in self.nats]), "bytes_peak": max(max(one) for one in self.nbytes),
        }  # fmt: skip
        if best is not None and best is not self:
            ahead = paired_bootstrap(right, best.by_sample)
            record |= {"ahead": ahead.mean, "ahead_interval": ahead.bounds(), "ahead_of": best.memory}
        if self.change is not None:
            record |= dict(zip(("change_by_filler", "change_by_key"), self.change, strict=True))
        return record


@dataclass
class KeyBlock:
    """A cache policy that knows which block has the key (`ORACLES`), and notes how large updates are.

    Attributes
    ----------
    written : whether a block's update is written, by its number.
    changes : (block, mean relative size of the update) of the last layer.
    """

    block: int
    written: Callable[[int], bool]
    changes: list[tuple[int, float]] = field(default_factory=list)
    observes: frozenset[str] = frozenset({"change"})

    @property
    def schedule(self) -> Schedule:
        """It decides whenever a block ends."""
        return Schedule(every=self.block)

    def decide(self, view: LayerView) -> Decision:
        """Return the decision about one layer."""
        number = view.seen // self.block - 1
        if view.layer == view.layers - 1:
            self.changes.append((number, float(view.recorded["change"].mean())))
        return Decision(view.valid, keys=view.keys, values=view.values if self.written(number) else view.keys)


def with_segments(loaded: LoadedModel, segments: int) -> LoadedModel:
    """Return the model with another number of memory segments; its weights are the same."""
    model: Any = copy.deepcopy(loaded.model)
    model.config.segments = segments
    for block in model.blocks:
        block.attention.segments = segments
    return replace(loaded, model=model)


def constant(share: float) -> MemoryManager:
    """Return the gate that writes the same share of every update."""
    return build("write_gate", features=(), bias=math.log(share / (1 - share)))


def own_row(evaluator: Evaluator, model: Any, samples: Sequence[Sample]) -> Row:
    """Return what the model by itself comes to."""
    results, cache = own_recall(evaluator, model, samples), model.new_cache()
    with torch.no_grad():
        model(evaluator.tokens(samples[0]).read, past_key_values=cache)
    held = [float(cache.nbytes())] * len(samples)
    return Row(OWN, [[one[0] for one in results]], [[one[1] for one in results]], [held])


def decided_rows(evaluator: Evaluator, managers: Sequence[tuple[str, MemoryManager]], samples: Sequence[Sample],
                 task: Any) -> list[Row]:  # fmt: skip
    """Return what named managers come to, those of one name as the seeds of one arm."""
    every = evaluator.protocol.every
    entrants = [manager.with_options(every=every) for _, manager in managers]
    results = [evaluator.evaluate(entrants, sample, task, EXACT) for sample in samples]
    rows: dict[str, Row] = {}
    for number, (name, _) in enumerate(managers):
        row = rows.setdefault(name, Row(name, [], [], []))
        mine = [one[number] for one in results]
        row.right.append([one.required("exact") for one in mine])
        row.nats.append([one.required("loglik") for one in mine])
        row.nbytes.append([one.bytes_peak or 0.0 for one in mine])
    return list(rows.values())


@torch.no_grad()
def oracle_row(evaluator: Evaluator, model: Any, samples: Sequence[Sample], name: str) -> Row:
    """Return what writing certain blocks comes to, where it is known which one has the key."""
    block, row, sizes = model.config.block, Row(name, [[]], [[]], [[]]), ([], [])  # type: ignore[var-annotated]
    begins = evaluator.loaded.tokenizer.convert_tokens_to_ids(PASSKEY)
    for sample in samples:
        tokens = evaluator.tokens(sample)
        key = (int((tokens.read[0] == begins).nonzero()[0]) + 1) // block
        policy = KeyBlock(block, partial(ORACLES[name], key=key))
        cache = model.decided_cache(policy)
        model(tokens.read, past_key_values=cache)
        row.nbytes[0].append(float(cache.bytes_peak))
        logits = model(torch.cat((tokens.prompt, tokens.answer[:, :-1]), 1), past_key_values=cache).logits
        logits = logits[:, -tokens.answer.shape[1] :]
        row.right[0].append(float((logits.argmax(-1) == tokens.answer).all()))
        row.nats[0].append(float(logits.log_softmax(-1).gather(-1, tokens.answer[..., None]).mean()))
        for number, size in policy.changes:
            if number:  # the first block's update is no change of a summary
                sizes[number == key].append(size)
    if all(sizes):
        row.change = (mean(sizes[0]), mean(sizes[1]))
    return row


def measure(
    loaded: LoadedModel, subjects: Sequence[tuple[str, MemoryManager]], blocks: int, given: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return the rows of one model at one length, and print them."""
    model: Any = loaded.model
    block = model.config.block
    task = build_task(TASK, loaded.tokenizer, blocks * block)
    count = given.samples if blocks < LONG else given.long_samples
    samples = task.samples(Split.SEALED, count, given.seed)
    evaluator = Evaluator(loaded, EvaluationProtocol(kind="streaming", every=block))
    constants = [(f"{CONSTANT} {share:g}", constant(share)) for share in given.constants]
    began = time.process_time()
    rows = [own_row(evaluator, model, samples)]
    rows += [oracle_row(evaluator, model, samples, name) for name in ORACLES] if given.oracle else []
    if subjects or constants:
        rows += decided_rows(evaluator, [*subjects, *constants], samples, task)
    fixed = [row for row in rows if row.memory.startswith(CONSTANT)]
    best = max(fixed, key=lambda row: (mean(row.by_sample), mean(row.nats[0])), default=None)
    records = [row.record(best) for row in rows]
    if best is not None:
        records.append({**best.record(None), "memory": BEST, "of": best.memory})
    for record in records:
        record |= {"model": given.name or loaded.name, "segments": model.config.segments, "blocks": blocks}
        if not record["memory"].startswith(CONSTANT):
            print(line(record), flush=True)
    print(f"  {blocks} blocks: {time.process_time() - began:.0f} processor seconds", flush=True)
    return records


def line(record: dict[str, Any]) -> str:
    """Return a row of the table."""
    low, high = record["right_interval"] or (math.nan, math.nan)
    ahead = ""
    if record.get("ahead_interval"):
        ahead = f"{record['ahead']:+.2f} [{record['ahead_interval'][0]:+.2f}, {record['ahead_interval'][1]:+.2f}]"
    seeds = " ".join(f"{one:.2f}" for one in record["right_by_seed"]) if record["seeds"] > 1 else ""
    return (
        f"| {record['model']}, m {record['segments']} | {record['blocks']} | {record['memory']} {record.get('of', '')} "
        f"| {record['right']:.2f} [{low:.2f}, {high:.2f}] | {seeds} | {ahead} | {record['nats']:.2f} | "
        f"{record['bytes_peak']:.0f} |"
    )


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells a row from every other."""
    return tuple(record[name] for name in ("model", "segments", "blocks", "memory", "samples"))


def shares(text: str) -> list[float]:
    """Return numbers between 0 and 1 that commas separate."""
    try:
        read = [float(part) for part in text.split(",") if part]
    except ValueError:
        read = [-1.0]
    if not all(0 < share < 1 for share in read):
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers above 0 and below 1, commas between them")
    return read


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    root = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root.add_argument("subjects", nargs="*", help="specs of managers, and folders of plug-ins or runs")
    root.add_argument("--model", default="zoo-fam", help="alias or folder of a feedback memory")
    root.add_argument("--name", help="what the model is called in the rows; by default its alias or folder")
    root.add_argument("--blocks", type=numbers(1), default=[4, 16, 32, 64, 128], help="blocks of a text")
    root.add_argument("--segments", type=numbers(0), help="memory segments; by default the model's own")
    root.add_argument("--constants", type=shares, default=[], help="shares that constant gates write")
    root.add_argument("--oracle", action="store_true", help="also rows that know where the key is")
    root.add_argument("--samples", type=int, default=32, help="sealed samples of a length")
    root.add_argument("--long-samples", type=int, default=12, help=f"the same of {LONG} blocks and more")
    root.add_argument("--seed", type=int, default=0, help="of the samples")
    root.add_argument("--json", type=Path, help="file that rows are added to")
    return root


def main() -> None:
    """Measure, print, and save."""
    given = parser().parse_args()
    if min(given.samples, given.long_samples) < 2:
        raise SystemExit("--samples and --long-samples: give at least 2, so that there are intervals")
    try:
        loaded = load(given.model)
        subjects = [(arm_of(source), manager_of(source)) for source in given.subjects]
        if given.json is not None:
            given.json.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(given.json.read_text())["rows"] if given.json is not None and given.json.is_file() else []
    except (EvomemError, OSError, ValueError, KeyError) as error:
        raise SystemExit(str(error)) from None
    if not isinstance(loaded.model, Fam):
        raise SystemExit(f"--model {given.model}: has no feedback memory; give zoo-fam, or a folder of such a model")
    if not loaded.model.config.feedback and (subjects or given.constants or given.oracle):
        raise SystemExit(f"--model {given.model}: has no feedback (feedback 0) to decide about; give no manager")
    rows = {key_of(record): record for record in known}
    for segments in given.segments or [loaded.model.config.segments]:
        for blocks in given.blocks:
            records = measure(with_segments(loaded, segments), subjects, blocks, given)
            rows |= {key_of(record): record for record in records}
            if given.json is not None:
                write_json(given.json, {"task": TASK, "rows": list(rows.values())})


if __name__ == "__main__":
    main()
