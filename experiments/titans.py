"""Run: Titans trained on recall amid noise, and asked at many times the length that they were trained at: a table.

    OMP_NUM_THREADS=1 python -m experiments.titans --seeds 0,1,2 --json runs/titans.json
    OMP_NUM_THREADS=1 python -m experiments.titans --rows lmm --depth 1

A text is noise with pairs of a key and its value in random places, then all keys in random order, each with its value
behind it, which is to be predicted. Pairs are drawn anew for every text. ``window`` is sliding-window attention alone,
its feed-forward part so wide that it has as many parameters as the largest of the Titans. Training is deterministic by
seed; every row sees the same texts. Intervals are of 95 %, over texts; the mean over seeds is taken text by text.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean as mean
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from evomem.errors import EvomemError
from evomem.models.architectures.memory_matrix import MemoryMatrix, MemoryMatrixConfig
from evomem.models.architectures.titans import Titans, TitansConfig, Variant
from evomem.statistics import bootstrap_mean

KEYS, VALUES, NOISE = 24, 24, 16
VOCABULARY = KEYS + VALUES + NOISE
WINDOW = "window"
ROWS = (*get_args(Variant), WINDOW)
SHAPE: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def texts(seed: int, count: int, length: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Return ids (count, length) and which of them are answers, of the same shape.

    The last ``2 pairs`` tokens are the questions and answers; the rest has ``pairs`` pairs and noise.
    """
    draw = torch.Generator().manual_seed(seed)
    context = length - 2 * pairs
    ids = torch.randint(KEYS + VALUES, VOCABULARY, (count, length), generator=draw)
    keys = torch.rand(count, KEYS, generator=draw).argsort(1)[:, :pairs]
    values = KEYS + torch.randint(VALUES, (count, pairs), generator=draw)
    # Where pairs begin: distinct numbers below context - pairs, each moved on by the pairs before it.
    shown = torch.rand(count, context - pairs, generator=draw).argsort(1)[:, :pairs].sort(1).values
    shown = shown + torch.arange(pairs)
    order = torch.rand(count, pairs, generator=draw).argsort(1)
    asked = context + 2 * torch.arange(pairs).expand(count, -1)
    for first, pair in ((shown, (keys, values)), (asked, (keys.gather(1, order), values.gather(1, order)))):
        for step, part in enumerate(pair):
            ids.scatter_(1, first + step, part)
    answers = torch.zeros(count, length, dtype=torch.bool)
    return ids, answers.scatter_(1, asked + 1, torch.ones_like(asked, dtype=torch.bool))


def new_model(name: str, seed: int, given: argparse.Namespace) -> Any:
    """Return the untrained model of a row; raises `ConfigError` where its options make none."""
    torch.manual_seed(seed)
    options = {
        "segment": given.segment, "window": given.segment, "depth": given.depth, "conv": given.conv,
        "momentum": not given.no_momentum, "forgetting": not given.no_forgetting,
    }  # fmt: skip
    if name != WINDOW:
        return Titans(TitansConfig(variant=name, **SHAPE, **options))  # type: ignore[arg-type]
    most = max(count(Titans(TitansConfig(variant=variant, **SHAPE, **options))) for variant in get_args(Variant))

    def window(width: int) -> MemoryMatrix:
        config = MemoryMatrixConfig(**SHAPE, window=given.segment, matrix_slots=0, intermediate_size=width)
        return MemoryMatrix(config)

    narrow, wide = (count(window(width)) for width in (128, 129))
    torch.manual_seed(seed)
    return window(128 + max(0, round((most - narrow) / (wide - narrow))))


def count(model: Any) -> int:
    """Return a model's parameters."""
    return sum(part.numel() for part in model.parameters())


def train(model: Any, seed: int, given: argparse.Namespace) -> float:
    """Train a model, and return the mean loss (nats an answer) of the last 20 steps."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=given.rate, betas=(0.9, 0.98)), []
    model.train()
    for step in range(given.steps):
        rate = given.rate * min(1.0, (step + 1) / 50, 4 * (given.steps - step) / given.steps)
        optimizer.param_groups[0]["lr"] = rate
        ids, answers = texts(1_000_003 * (seed + 1) + step, given.batch, given.length, given.pairs)
        logits = model(ids, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits[answers[:, 1:]], ids[:, 1:][answers[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 100 == 99:
            print(f"  step {step + 1} loss {mean(losses[-100:]):.3f}", flush=True)
    model.eval()
    return mean(losses[-20:])


@torch.no_grad()
def recall(model: Any, length: int, given: argparse.Namespace) -> list[float]:
    """Return the share of right answers of every text of a length; the texts are none that were trained on."""
    ids, answers = texts(-1 - length, given.texts, length, given.pairs)
    last = 2 * given.pairs
    logits = torch.cat([model(part, logits_to_keep=last).logits for part in ids.split(25)])[:, :-1]
    right = logits.argmax(-1) == ids[:, 1 - last :]
    shown = answers[:, 1 - last :]
    shares: list[float] = ((right & shown).sum(1) / shown.sum(1)).tolist()
    return shares


def row_of(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return a row of the table: one model trained anew for every seed, and what it recalls at every length."""
    lengths = [given.length * times for times in given.times]
    shares: dict[int, list[list[float]]] = {length: [] for length in lengths}
    losses, began, parameters = [], time.process_time(), 0
    for seed in given.seeds:
        print(f"{name}, seed {seed}", flush=True)
        model = new_model(name, seed, given)
        parameters = count(model)
        losses.append(train(model, seed, given))
        for length in lengths:
            shares[length].append(recall(model, length, given))
    record: dict[str, Any] = {
        "row": name, "parameters": parameters, "loss_by_seed": losses, "cpu_seconds": time.process_time() - began,
    }  # fmt: skip
    for length in lengths:
        by_text = [mean(column) for column in zip(*shares[length], strict=True)]
        record[str(length)] = {
            "right": mean(by_text), "interval": bootstrap_mean(by_text).bounds(),
            "by_seed": [mean(texts_right) for texts_right in shares[length]],
        }  # fmt: skip
    return record


def table(records: Sequence[dict[str, Any]], lengths: Sequence[int]) -> str:
    """Return the share of right answers by row and length, in Markdown."""
    lines = [f"| | parameters | {' | '.join(map(str, lengths))} |", "|" + "---|" * (2 + len(lengths))]
    for record in records:
        cells = [record[str(length)] for length in lengths]
        shown = [f"{c['right']:.3f} [{c['interval'][0]:.3f}, {c['interval'][1]:.3f}]" for c in cells]
        lines.append(f"| {record['row']} | {record['parameters']:,} | {' | '.join(shown)} |")
    return "\n".join(lines)


def numbers(least: int) -> Callable[[str], list[int]]:
    """Return what reads different whole numbers of at least ``least`` that commas separate."""

    def read(text: str) -> list[int]:
        parts = text.split(",")
        values = [int(part) for part in parts if part.isdecimal()]
        if len(values) < len(parts) or min(values) < least or len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(
                f"{text!r}: give whole numbers of at least {least}, commas between them, none twice"
            )
        return values

    return read


def models(text: str) -> list[str]:
    """Return some of `ROWS` that commas separate; raise `argparse.ArgumentTypeError` for another name, or one twice."""
    parts = text.split(",")
    if set(parts) - set(ROWS) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r}: give some of {', '.join(ROWS)}, commas between them, none twice")
    return parts


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    root = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root.add_argument("--rows", type=models, default=list(ROWS), help=f"models: some of {','.join(ROWS)}; all")
    root.add_argument("--seeds", type=numbers(0), default=[0], help="a training for each, for example 0,1,2")
    root.add_argument("--length", type=int, default=64, help="tokens of a text that is trained on")
    root.add_argument(
        "--times", type=numbers(1), default=[1, 4, 8, 16], help="how many times as long texts are that are measured"
    )
    root.add_argument("--pairs", type=int, default=6, help="pairs of a text, and questions at its end")
    root.add_argument("--texts", type=int, default=100, help="texts of each length that are measured")
    root.add_argument("--steps", type=int, default=1000, help="steps of training")
    root.add_argument("--batch", type=int, default=32, help="texts of a step")
    root.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    root.add_argument("--segment", type=int, default=16, help="tokens of a segment, and of attention's window")
    root.add_argument("--depth", type=int, default=2, help="matrices of a neural memory, 1 to 4")
    root.add_argument("--conv", type=int, default=4, help="tokens that a memory's keys are mixed of; 1: no convolution")
    root.add_argument("--no-momentum", action="store_true", help="momentary surprise only (eta = 0)")
    root.add_argument("--no-forgetting", action="store_true", help="weights never fade (alpha = 0)")
    root.add_argument("--json", type=Path, help="file for the rows")
    return root


def check(given: argparse.Namespace) -> None:
    """Raise `SystemExit` for numbers that no training has, before hours of it."""
    if min(given.steps, given.batch, given.pairs, given.segment) < 1 or given.texts < 2:
        raise SystemExit("--steps, --batch, --pairs and --segment are counts of at least 1, --texts of at least 2")
    if given.pairs > KEYS or given.length < 4 * given.pairs:
        raise SystemExit(f"--pairs {given.pairs}: give at most {KEYS}, and 4 tokens of --length for each")
    if not 0 < given.rate < float("inf"):
        raise SystemExit(f"--rate {given.rate}: give a number above 0")
    try:
        new_model(given.rows[0], given.seeds[0], given)
        if given.json is not None:
            given.json.parent.mkdir(parents=True, exist_ok=True)
    except (EvomemError, OSError) as error:
        raise SystemExit(str(error)) from None


def main() -> None:
    """Train, measure, print, and save."""
    given = parser().parse_args()
    check(given)
    records = [row_of(name, given) for name in given.rows]
    print("\n" + table(records, [given.length * times for times in given.times]))
    if given.json is not None:
        settings = {name: value for name, value in vars(given).items() if name != "json"}
        given.json.write_text(json.dumps({"settings": settings, "rows": records}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
