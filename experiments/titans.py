"""Run: Titans trained on recall amid noise, and asked at many times the length that they were trained at: a table.

    OMP_NUM_THREADS=1 python -m experiments.titans --seeds 0,1,2 --json docs/results/titans.json
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
from pathlib import Path
from statistics import fmean as mean
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

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
    # Places of pairs: distinct numbers below context - pairs, each moved on by the pairs before it.
    places = torch.rand(count, context - pairs, generator=draw).argsort(1)[:, :pairs].sort(1).values
    places = places + torch.arange(pairs)
    order = torch.rand(count, pairs, generator=draw).argsort(1)
    asked = context + 2 * torch.arange(pairs).expand(count, -1)
    for where, shown in ((places, (keys, values)), (asked, (keys.gather(1, order), values.gather(1, order)))):
        for step, part in enumerate(shown):
            ids.scatter_(1, where + step, part)
    answers = torch.zeros(count, length, dtype=torch.bool)
    return ids, answers.scatter_(1, asked + 1, torch.ones_like(asked, dtype=torch.bool))


def new_model(row: str, seed: int, given: argparse.Namespace) -> Any:
    """Return the untrained model of a row."""
    torch.manual_seed(seed)
    options = {
        "segment": given.segment, "window": given.segment, "depth": given.depth, "conv": given.conv,
        "momentum": not given.no_momentum, "forgetting": not given.no_forgetting,
    }  # fmt: skip
    if row != WINDOW:
        return Titans(TitansConfig(variant=row, **SHAPE, **options))  # type: ignore[arg-type]
    most = max(count(Titans(TitansConfig(variant=one, **SHAPE, **options))) for one in get_args(Variant))

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


def main() -> None:
    """Train, measure, print, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="variants, and window")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--length", type=int, default=64, help="tokens of a text that is trained on")
    parser.add_argument("--times", default="1,4,8,16", help="how many times as long texts are that are measured")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--texts", type=int, default=100, help="texts of each length that are measured")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--segment", type=int, default=16, help="tokens of a segment, and of attention's window")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--conv", type=int, default=4)
    parser.add_argument("--no-momentum", action="store_true")
    parser.add_argument("--no-forgetting", action="store_true")
    parser.add_argument("--json", type=Path, help="file for the rows")
    given = parser.parse_args()
    rows = given.rows.split(",")
    if unknown := set(rows) - set(ROWS):
        raise SystemExit(f"--rows: there is no {min(unknown)!r}; give some of {', '.join(ROWS)}")
    seeds, times = given.seeds.split(","), given.times.split(",")
    for name, numbers in (("--seeds", seeds), ("--times", times)):
        if not all(number.isdecimal() for number in numbers):
            raise SystemExit(f"{name}: give whole numbers with commas between them")
    if min(given.steps, given.batch, given.texts, given.pairs, *(int(one) for one in times)) < 1:
        raise SystemExit("--steps, --batch, --texts, --pairs and --times are counts; give at least 1")
    if given.pairs > KEYS or given.length < 4 * given.pairs:
        raise SystemExit(f"--pairs {given.pairs}: give at most {KEYS}, and 4 tokens of --length for each")
    lengths, records = [given.length * int(one) for one in times], []
    for row in rows:
        shares: dict[int, list[list[float]]] = {length: [] for length in lengths}
        losses, began = [], time.process_time()
        for seed in seeds:
            print(f"{row}, seed {seed}", flush=True)
            model = new_model(row, int(seed), given)
            losses.append(train(model, int(seed), given))
            for length in lengths:
                shares[length].append(recall(model, length, given))
        record: dict[str, Any] = {
            "row": row, "parameters": count(model), "loss_by_seed": losses, "cpu_seconds": time.process_time() - began,
        }  # fmt: skip
        for length in lengths:
            by_text = [mean(column) for column in zip(*shares[length], strict=True)]
            record[str(length)] = {
                "right": mean(by_text), "interval": bootstrap_mean(by_text).bounds(),
                "by_seed": [mean(one) for one in shares[length]],
            }  # fmt: skip
        records.append(record)
    print(f"\n| | parameters | {' | '.join(map(str, lengths))} |\n|" + "---|" * (2 + len(lengths)))
    for record in records:
        cells = [record[str(length)] for length in lengths]
        shown = [f"{c['right']:.3f} [{c['interval'][0]:.3f}, {c['interval'][1]:.3f}]" for c in cells]
        print(f"| {record['row']} | {record['parameters']:,} | {' | '.join(shown)} |")
    if given.json is not None:
        settings = {name: value for name, value in vars(given).items() if name != "json"}
        given.json.write_text(json.dumps({"settings": settings, "rows": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
