"""Run: RegBench: languages learnt while they are read, by a Memory Mosaic and by a transformer of equal parameters.

    OMP_NUM_THREADS=1 python -m experiments.regbench train v1 --seed 0      # or v2, transformer; minutes of a core each
    OMP_NUM_THREADS=1 python -m experiments.regbench report --out docs/results/regbench

Every text is some words of one random automaton's language, never the same twice. A model must find out while it
reads which letters are legal next (Akyürek et al. 2024; Zhang et al. 2024, arXiv 2405.06394, section 7.4, and its
public code for sizes). Measured on automata that no model was trained on: the share of places at which the likeliest
letter is legal, and the distance of the predicted letters to the even distribution over the legal ones. Words are
shorter than published, so that a training takes minutes.
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
    running = 0.0
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
            print(f"{name} {seed} step {step + 1} loss {running:.3f} {time.process_time() - begun:.0f} s", flush=True)
    record = {
        "model": name, "seed": seed, "steps": steps, "rate": rate, "batch": BATCH, "loss": running,
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
    folder = options.runs / f"{options.model}-{options.seed}"
    folder.mkdir(parents=True, exist_ok=True)  # before minutes of training
    path = folder / "record.json"
    if path.exists():
        known = record_of(path)
        if (known["steps"], known["rate"]) != (options.steps, options.rate):
            parser.error(
                f"{folder} was trained with --steps {known['steps']} --rate {known['rate']}: name another --runs"
            )
        print(f"{folder} is trained already")
        return
    model, record = train(options.model, options.seed, steps=options.steps, rate=options.rate)
    for split in (Split.TRAIN, Split.SEALED):
        tested = texts(split, TESTED)
        record[split.value] = measured([predictions(model, one) for one in tested], tested)
    model.save_pretrained(folder)
    write_atomically(path, (json.dumps(record) + "\n").encode())
    print(
        {
            split: {name: round(float(np.mean(v)), 4) for name, v in record[split].items()}
            for split in ("train", "sealed")
        }
    )


def record_of(path: Path) -> dict[str, Any]:
    """Return the record of a training; end the program where a file is none, or is of other texts."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for split in ("train", "sealed"):
            for kind in ("accuracy", "tvd"):
                if len(record[split][kind]) != TESTED or not np.isfinite(record[split][kind]).all():
                    raise ValueError(f"{split}, {kind}: no {TESTED} numbers")
        if record["model"] not in NAMES or not {"seed", "steps", "rate", "parameters", "cpu_seconds"} <= record.keys():
            raise ValueError("says not what was trained, and how")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SystemExit(f"{path}: is no record of a training ({error!r}); remove its folder and train again") from None
    return record


def report(runs: Path, out: Path) -> None:
    """Print a table of all records of a folder, with the mosaics' paired differences to the transformer; write them.

    A difference is that of the seeds' means on every automaton, with an interval over automata; behind it, seed by
    seed, the mean over automata.
    """
    records = [record_of(path) for path in sorted(runs.glob("*/record.json"))]
    if not records:
        raise SystemExit(f"{runs}: no training has left a record.json here; train first, or name another --runs")
    tested = texts(Split.SEALED, TESTED)
    ngram = measured([backoff_predictions(one.symbols) for one in tested], tested)
    records.append({"model": "3-gram", "seed": 0, "parameters": 0, "cpu_seconds": 0.0, "sealed": ngram})
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out.with_suffix(".json"), (json.dumps(records) + "\n").encode())
    print("| model | parameters | seconds | seeds: accuracy / TVD, held-out automata | those of training |")
    by_name: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name in (*NAMES, "3-gram"):
        of_model = [one for one in records if one["model"] == name]
        if not of_model:
            continue
        by_name[name] = {kind: np.array([one["sealed"][kind] for one in of_model]) for kind in ("accuracy", "tvd")}
        seeds = ", ".join(
            f"{np.mean(one['sealed']['accuracy']):.3f} / {np.mean(one['sealed']['tvd']):.3f}" for one in of_model
        )
        trained = [one["train"] for one in of_model if "train" in one]
        means = (f"{np.mean([one[kind] for one in trained]):.3f}" for kind in ("accuracy", "tvd") if trained)
        seconds = np.mean([one["cpu_seconds"] for one in of_model])
        print(f"| {name} | {of_model[0]['parameters']:,} | {seconds:.0f} | {seeds} | {' / '.join(means)} |")
    for name, other in (("v1", "transformer"), ("v2", "transformer"), ("v2", "v1"), ("v1", "3-gram")):
        for kind in ("accuracy", "tvd"):
            if name in by_name and other in by_name:
                print(f"{name} minus {other}, {kind}: {difference(by_name[name][kind], by_name[other][kind])}")


def difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> str:
    """Return in words how two models differ, each (seeds, automata): on average, its interval, and by seed."""
    interval = percentile_interval(first.mean(0) - second.mean(0))
    count = min(len(first), len(second))
    seeds = ", ".join(f"{gap:+.3f}" for gap in (first[:count] - second[:count]).mean(1))
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}] (by seed {seeds})"


if __name__ == "__main__":
    main()
