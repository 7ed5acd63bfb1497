"""Run: RegBench: languages learnt while they are read, by a Memory Mosaic and by a transformer of equal parameters.

    OMP_NUM_THREADS=1 python -m experiments.regbench train v1 --seed 0 --rate 3e-3   # or v2, transformer; minutes each
    OMP_NUM_THREADS=1 python -m experiments.regbench report --out docs/results/regbench

Every text is some words of one random automaton's language, never the same twice. A model must find out while it
reads which letters are legal next (Akyürek et al. 2024; Zhang et al. 2024, arXiv 2405.06394, section 7.4, and its
public code for sizes). Measured on automata that no model was trained on: the share of places at which the likeliest
letter is legal, and the distance of the predicted letters to the even distribution over the legal ones. Words are
shorter than published, so that a training takes minutes.

Each model has a learning rate of its own: of those that seed 0 was trained with, the one with the least distance on
automata of the split `select`, which neither training nor the report reads.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from evomem.files.atomic import write_atomically
from evomem.models.architectures.mosaic import MemoryMosaic, MosaicConfig
from evomem.statistics import percentile_interval
from evomem.tasks.base import Split
from evomem.tasks.streams.automata import (
    LETTERS,
    SEPARATOR,
    Episode,
    automata,
    backoff_predictions,
    draw_episode,
    greedy_accuracy,
    total_variation,
)

LONGEST = 15
"""Letters of a word, at most; published: 49. A text has 10 to 19 words, as published."""
AUTOMATA = 5000
"""Languages that a model is trained on, with one text of each; as published."""
BATCH = 16
SYMBOLS = LETTERS + 1
TESTED = 200
"""Languages that models are measured on, of each split."""
SEED_OF_TEXTS = 7
NAMES = ("v1", "v2", "transformer")


def new_model(name: str, seed: int) -> PreTrainedModel:
    """Return an untrained model of two layers, 64 wide, with 4 heads; all have about the same number of parameters."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": SYMBOLS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if name == "transformer":
        config = LlamaConfig(**sizes, intermediate_size=192, max_position_embeddings=512, tie_word_embeddings=True)
        auto: Any = AutoModelForCausalLM  # not annotated
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
        return model
    if name == "v1":
        return MemoryMosaic(MosaicConfig(**sizes, form="v1", persistent_size=256))
    # Texts are short: what is near is a word, and what is far may begin right behind it.
    return MemoryMosaic(
        MosaicConfig(**sizes, form="v2", persistent_size=144, short_window=16, long_delay=4, longest_delay=16)
    )


def texts(split: Split, count: int) -> list[Episode]:
    """Return a text of each of ``count`` languages of a split."""
    return [
        draw_episode(np.random.default_rng([SEED_OF_TEXTS, number]), automaton, longest=LONGEST)
        for number, automaton in enumerate(automata(split, count, SEED_OF_TEXTS))
    ]


def batch_of(episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
    """Return what is read and what comes next, (batch, longest) int64 each; -100 where nothing is to be said.

    Where a word ends does not depend on its language, so separators are read but not to be predicted.
    """
    longest = max(len(episode.symbols) for episode in episodes)
    read, said = torch.full((len(episodes), longest), SEPARATOR), torch.full((len(episodes), longest), -100)
    for row, episode in enumerate(episodes):
        symbols = torch.from_numpy(episode.symbols)
        read[row, 1 : len(symbols)] = symbols[:-1]
        said[row, : len(symbols)] = symbols.where(torch.from_numpy(episode.scored), -100)
    return read, said


def train(name: str, seed: int, *, steps: int, rate: float) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return a trained model and how it was trained. AdamW, decay .1, clipped at 1; the rate rises, then falls to 0.

    A batch is of texts of about equal length, so that little of it is padding.
    """
    model = new_model(name, seed).train()
    lessons = sorted(texts(Split.TRAIN, AUTOMATA), key=lambda one: len(one.symbols))
    matrices = [part for part in model.parameters() if part.dim() > 1]
    others = [part for part in model.parameters() if part.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    draw, begun = np.random.default_rng(seed), time.process_time()
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, (steps - step) / (0.8 * steps), 1.0)
    )
    running, curve = 0.0, []
    for step in range(steps):
        first = int(draw.integers(len(lessons) - BATCH + 1))
        read, said = batch_of(lessons[first : first + BATCH])
        loss = cross_entropy(model(input_ids=read, use_cache=False).logits.flatten(0, 1), said.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running += 0.02 * (float(loss.detach()) - running) if step else float(loss.detach())
        if (step + 1) % 100 == 0:
            curve.append(round(running, 4))
            print(f"{name} {seed} step {step + 1} loss {running:.3f} {time.process_time() - begun:.0f} s", flush=True)
    record = {
        "model": name, "seed": seed, "steps": steps, "rate": rate, "batch": BATCH, "loss": running, "losses": curve,
        "parameters": sum(part.numel() for part in model.parameters()),
        "cpu_seconds": round(time.process_time() - begun, 1),
    }  # fmt: skip
    return model.eval(), record


@torch.no_grad()
def predictions(model: PreTrainedModel, episode: Episode) -> NDArray[np.float32]:
    """Return what a model expects at every place of a text: probabilities (length, symbols)."""
    read, _ = batch_of([episode])
    probabilities: NDArray[np.float32] = model(input_ids=read, use_cache=False).logits[0].softmax(-1).numpy()
    return probabilities


def measured(predicted: Sequence[NDArray[Any]], episodes: Sequence[Episode]) -> dict[str, list[float]]:
    """Return accuracy and distance (`greedy_accuracy`, `total_variation`) on every text."""
    pairs = list(zip(predicted, episodes, strict=True))
    return {
        "accuracy": [round(greedy_accuracy(said, one.legal, one.scored), 4) for said, one in pairs],
        "tvd": [round(total_variation(said, one.legal, one.scored), 4) for said, one in pairs],
    }


def main() -> None:
    """Train a model, or report on all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("train", "report"))
    parser.add_argument("model", nargs="?", choices=NAMES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--runs", type=Path, default=Path("runs/regbench"), help="folder of the trainings' records")
    parser.add_argument("--out", type=Path, default=Path("runs/regbench/regbench"), help="of report: file, no suffix")
    options = parser.parse_args()
    if options.action == "report":
        report(options.runs, options.out)
        return
    if options.model is None:
        parser.error("train needs a model: " + ", ".join(NAMES))
    if options.steps < 1 or options.seed < 0 or not 0 < options.rate < float("inf"):
        parser.error(
            f"--steps {options.steps}, --seed {options.seed}, --rate {options.rate}: at least one step, a seed of at "
            "least 0, and a rate above 0"
        )
    folder = options.runs / f"{options.model}-{options.seed}-{options.steps}-{options.rate:g}"
    folder.mkdir(parents=True, exist_ok=True)  # before minutes of training
    path = folder / "record.json"
    if path.exists():
        record_of(path)
        print(f"{folder} is trained already")
        return
    model, record = train(options.model, options.seed, steps=options.steps, rate=options.rate)
    for split in Split:
        tested = texts(split, TESTED)
        record[split.value] = measured([predictions(model, one) for one in tested], tested)
    model.save_pretrained(folder)
    write_atomically(path, (json.dumps(record) + "\n").encode())
    print({split: {name: round(float(np.mean(v)), 4) for name, v in record[split].items()} for split in Split})


def record_of(path: Path) -> dict[str, Any]:
    """Return the record of a training; end the program where a file is none, or is of other texts."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for split in Split if "select" in record else (Split.TRAIN, Split.SEALED):  # older records have no select
            for kind in ("accuracy", "tvd"):
                if len(record[split][kind]) != TESTED or not np.isfinite(record[split][kind]).all():
                    raise ValueError(f"{split}, {kind}: no {TESTED} numbers")
        if (
            record["model"] not in NAMES
            or not {"seed", "steps", "rate", "loss", "parameters", "cpu_seconds"} <= record.keys()
        ):
            raise ValueError("says not what was trained, and how")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SystemExit(f"{path}: is no record of a training ({error!r}); remove its folder and train again") from None
    return record


def chosen(records: Sequence[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Return the trainings of every model and number of steps at its best learning rate, by seed; print all rates.

    The best rate has the least distance on the split `select`, of the lowest seed of all; where one rate was tried
    nothing is chosen. The program ends where rates cannot be compared.
    """
    groups: dict[tuple[str, int], dict[float, list[dict[str, Any]]]] = {}
    for one in sorted(records, key=lambda one: (NAMES.index(one["model"]), one["steps"], one["rate"], one["seed"])):
        groups.setdefault((one["model"], one["steps"]), {}).setdefault(one["rate"], []).append(one)
    best = {}
    print("| model | steps | rate | accuracy / TVD on select, seed | loss in training |")
    for key, rates in groups.items():
        lowest = min(one["seed"] for trained in rates.values() for one in trained)
        firsts = {rate: trained[0] for rate, trained in rates.items() if trained[0]["seed"] == lowest}
        if len(rates) == 1:
            (best[key],) = rates.values()
            continue
        if missing := [one for one in firsts.values() if "select" not in one]:
            raise SystemExit(
                f"{key[0]} was trained at {len(rates)} rates, and the record of seed {lowest} at "
                f"{missing[0]['rate']:g} has no select split to choose by: remove its folder and train it again"
            )
        for rate, one in firsts.items():
            accuracy, tvd = (np.mean(one["select"][kind]) for kind in ("accuracy", "tvd"))
            print(f"| {key[0]} | {key[1]:,} | {rate:g} | {accuracy:.3f} / {tvd:.3f}, {lowest} | {one['loss']:.3f} |")
        best[key] = rates[min(firsts, key=lambda rate: float(np.mean(firsts[rate]["select"]["tvd"])))]
    return best


def report(runs: Path, out: Path) -> None:
    """Print a table of all models, each at its best learning rate, with paired differences; write all records.

    A difference is that of the seeds' means on every automaton, with an interval over automata; behind it, seed by
    seed, the mean over automata. Models are set against others that were trained for as many steps, or more.
    """
    records = [record_of(path) for path in sorted(runs.glob("*/record.json"))]
    if not records:
        raise SystemExit(f"{runs}: no training has left a record.json here; train first, or name another --runs")
    tested = texts(Split.SEALED, TESTED)
    ngram = measured([backoff_predictions(one.symbols) for one in tested], tested)
    rule = {"model": "3-gram", "seed": 0, "steps": 0, "parameters": 0, "cpu_seconds": 0.0, "sealed": ngram}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out.with_suffix(".json"), (json.dumps([*records, rule]) + "\n").encode())
    best = chosen(records) | {("3-gram", 0): [rule]}
    print("| model | steps | rate | parameters | seconds | seeds: accuracy / TVD, held-out automata | of training |")
    values: dict[tuple[str, int], dict[str, NDArray[np.float64]]] = {}
    for (name, steps), trained in best.items():
        values[name, steps] = {kind: np.array([one["sealed"][kind] for one in trained]) for kind in ("accuracy", "tvd")}
        seeds = ", ".join(
            f"{np.mean(one['sealed']['accuracy']):.3f} / {np.mean(one['sealed']['tvd']):.3f}" for one in trained
        )
        known = [one["train"] for one in trained if "train" in one]
        means = (f"{np.mean([one[kind] for one in known]):.3f}" for kind in ("accuracy", "tvd") if known)
        seconds = np.mean([one["cpu_seconds"] for one in trained])
        rate = f"{trained[0]['rate']:g}" if known else ""
        print(
            f"| {name} | {steps:,} | {rate} | {trained[0]['parameters']:,} | {seconds:.0f} | {seeds} | "
            f"{' / '.join(means)} |"
        )
    for first, second in ((one, other) for one in values for other in values if comparable(one, other)):
        for kind in ("accuracy", "tvd"):
            print(f"{first} minus {second}, {kind}: {difference(values[first][kind], values[second][kind])}")


def comparable(first: tuple[str, int], second: tuple[str, int]) -> bool:
    """Return whether a model trained for some steps is set against another: mosaics against all others, v2 before v1.

    The 3-gram is trained for none, and every model is set against it.
    """
    (name, steps), (other, others) = first, second
    if other == "3-gram":
        return name != other
    return (name, other) in (("v1", "transformer"), ("v2", "transformer"), ("v2", "v1")) and steps <= others


def difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> str:
    """Return in words how two models differ, each (seeds, automata): on average, its interval, and by seed."""
    interval = percentile_interval(first.mean(0) - second.mean(0))
    count = min(len(first), len(second))
    seeds = ", ".join(f"{gap:+.3f}" for gap in (first[:count] - second[:count]).mean(1))
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}] (by seed {seeds})"


if __name__ == "__main__":
    main()
