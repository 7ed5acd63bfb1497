"""Run: Titans trained on recall amid noise, and asked at many times the length that they were trained at: a table.

    python -m experiments.titans --seeds 0,1,2 --out runs/titans --json docs/results/titans.json
    python -m experiments.titans --rows lmm,lmm-depth-1 --steps 200
    python -m experiments.titans --rows lmm,mac,mag,mal --out runs/titans --ship

Texts (`experiments.titans_texts`) state a few pairs, needles, or pairs of which some change, amid made-up prose; behind
them all are asked for. One model learns all three in turn, 64 tokens long. Rows beside the four variants: ``window`` is
sliding-window attention alone, its feed-forward part so wide that it has as many parameters as the largest of the four;
the others are LMM with one thing changed. Memories begin knowing what a key is (`begin_as_successors`), but for
``lmm-random-start``.

Training is deterministic by seed; every row sees the same texts. Each training is kept in its folder of ``--out``, and
is not done again: after a kill the same command goes on. Intervals are of 95 %, over texts; the mean over seeds is
taken text by text; differences are paired.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean as mean
from typing import Any, get_args

import torch
from torch.nn.functional import cross_entropy

from evomem.errors import EvomemError
from evomem.models.architectures.memory_matrix import MemoryMatrix, MemoryMatrixConfig
from evomem.models.architectures.titans import Titans, TitansConfig, Variant
from evomem.models.architectures.titans_layers import NeuralMemory
from evomem.models.pretrained.files import sha256
from evomem.statistics import bootstrap_mean, paired_bootstrap
from evomem.tasks import Split
from experiments.arguments import numbers, some_of
from experiments.titans_texts import SHORTEST, TASKS, TOKENIZER, shares, texts

WINDOW = "window"
ABLATIONS: dict[str, dict[str, Any]] = {
    "lmm-depth-1": {"depth": 1},
    "lmm-depth-3": {"depth": 3},
    "lmm-no-momentum": {"momentum": False},
    "lmm-no-forgetting": {"forgetting": False},
    "lmm-no-conv": {"conv": 1},
    "lmm-random-start": {},
}
"""Rows that are LMM with one thing changed."""
ROWS = (*get_args(Variant), WINDOW, *ABLATIONS)
SHAPE: dict[str, Any] = {
    "vocab_size": len(TOKENIZER), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": TOKENIZER.pad_token_id, "eos_token_id": TOKENIZER.eos_token_id,
}  # fmt: skip
EVERYWHERE = 0.1
"""Weight of the loss on all words, beside that on the answers."""
RATE = 3e-3
"""Highest learning rate."""
RATES = {"mac": 1e-3}
"""That of rows that do not learn by the usual one."""
SHIPPED = Path(__file__).resolve().parent / "zoo" / "models"


def new_model(name: str, seed: int, given: argparse.Namespace) -> Any:
    """Return the untrained model of a row; raises `ConfigError` where its options make none."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"segment": given.segment, "window": given.segment}
    if name != WINDOW:
        variant, _, changed = name.partition("-")
        model = Titans(TitansConfig(variant=variant, **SHAPE, **options, **ABLATIONS.get(name, {})))  # type: ignore[arg-type]
        if changed != "random-start":
            begin_as_successors(model)
            if variant == "mac":
                begin_as_tokens(model)
        return model
    most = max(count(Titans(TitansConfig(variant=variant, **SHAPE, **options))) for variant in get_args(Variant))

    def window(width: int) -> MemoryMatrix:
        config = MemoryMatrixConfig(**SHAPE, window=given.segment, matrix_slots=0, intermediate_size=width)
        return MemoryMatrix(config)

    narrow, wide = (count(window(width)) for width in (128, 129))
    torch.manual_seed(seed)
    return window(128 + max(0, round((most - narrow) / (wide - narrow))))


@torch.no_grad()
def begin_as_successors(model: Titans) -> None:
    """Let every neural memory begin as one of what follows what.

    The convolution of its keys looks at the token before, those of values and queries at the token itself, and keys
    are made of a token as queries are: so a token is stored under the one before it, and a query reads what followed
    the same token the last time. Everything is trained; what to store, and for how long, is left to the gates. Without
    a convolution only the last of the three holds.
    """
    for memory in (module for module in model.modules() if isinstance(module, NeuralMemory)):
        memory.query.linear.weight.copy_(memory.key.linear.weight)
        for part, back in ((memory.key, 2), (memory.value, 1), (memory.query, 1)):
            if part.taps.shape[1] > 1:
                part.taps.mul_(0.1)[:, -back] += 1.0


@torch.no_grad()
def begin_as_tokens(model: Titans) -> None:
    """Let attention of MAC begin by handing on the token that asks, beside a part that all tokens share.

    M of MAC learns what attention says, y, and y ⊗ M(y) is what a layer adds. At a random start attention says nearly
    the same of every token: a segment's keys are alike, and M grows tenfold within it. So queries and keys begin equal
    and strong, output as the values' inverse. The shared part lets M(y) through the product unscrambled; keys, values
    and queries of M do not see it. What is recalled begins weak.
    """
    width = model.config.hidden_size
    model.embed.weight.add_(model.config.initializer_range)
    blocks: Any = model.blocks
    for block in blocks:
        attention, memory = block.attention, block.memory
        values = torch.nn.init.orthogonal_(torch.empty(width, width))
        attention.v_proj.weight.copy_(values)
        attention.o_proj.weight.copy_(values.T)
        for part in (attention.q_proj, attention.k_proj):
            part.weight.copy_(2**0.5 * torch.eye(width))
        for part in (memory.key, memory.value, memory.query):
            part.linear.weight.sub_(part.linear.weight.mean(1, keepdim=True))
        memory.retrieve.linear.weight.copy_(memory.query.linear.weight)
        memory.retrieve.taps.copy_(memory.query.taps)
        block.recall_norm.weight.fill_(0.1)


def count(model: Any) -> int:
    """Return a model's parameters."""
    return sum(part.numel() for part in model.parameters())


def rate_of(name: str, given: argparse.Namespace) -> float:
    """Return the highest learning rate of a row."""
    rate: float = RATES.get(name, RATE) if given.rate is None else given.rate
    return rate


def train(model: Any, name: str, seed: int, given: argparse.Namespace) -> float:
    """Train a row's model, and return the mean loss (nats a word of an answer) of the last 20 steps."""
    highest, losses = rate_of(name, given), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=highest, betas=(0.9, 0.98))
    model.train()
    for step in range(given.steps):
        rate = highest * min(1.0, (step + 1) / 50, 4 * (given.steps - step) / given.steps)
        optimizer.param_groups[0]["lr"] = rate
        drawn = texts(TASKS[step % len(TASKS)], f"{seed} {step}", given.batch, given.length, Split.TRAIN)
        logits, following = model(drawn.ids, use_cache=False).logits[:, :-1], drawn.ids[:, 1:]
        each = cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none").view(following.shape)
        answers = each[drawn.answers[:, 1:]].mean()
        optimizer.zero_grad()
        (answers + EVERYWHERE * each[drawn.real[:, 1:]].mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(answers.detach()))
        if step % 100 == 99:
            print(f"  step {step + 1} loss {mean(losses[-100:]):.3f}", flush=True)
    model.eval()
    return mean(losses[-20:])


@torch.no_grad()
def recall(model: Any, task: str, length: int, given: argparse.Namespace) -> Sequence[float]:
    """Return the share of right words of every text of a task and length; of `Split.SEALED`, and drawn once for all."""
    drawn = texts(task, "measured", given.texts, length, Split.SEALED, restated_only=True)
    last = drawn.ids.shape[1] - int(drawn.answers.nonzero()[:, 1].min()) + 1
    logits = torch.cat([model(part, logits_to_keep=last, use_cache=False).logits for part in drawn.ids.split(32)])
    right = logits[:, :-1].argmax(-1) == drawn.ids[:, 1 - last :]
    return shares(right, drawn.answers[:, 1 - last :])


def trained(name: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Return what one training comes to, from its folder where it was done before; see `main`.

    Raises
    ------
    SystemExit : the folder has a training with other settings.
    """
    folder, settings = given.out / f"{name}-{seed}", settings_of(name, given)
    record = folder / "result.json"
    if record.is_file():
        known: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        if known["settings"] != settings:
            raise SystemExit(f"{folder}: was trained with other settings, {known['settings']}; give another --out")
        return known
    print(f"{name}, seed {seed}", flush=True)
    model, began = new_model(name, seed, given), time.process_time()
    loss = train(model, name, seed, given)
    seconds = time.process_time() - began
    by_task = {
        task: {str(given.length * times): recall(model, task, given.length * times, given) for times in given.times}
        for task in TASKS
    }
    result = {
        "settings": settings, "row": name, "seed": seed, "parameters": count(model), "loss": loss,
        "train_cpu_seconds": round(seconds, 1), "cpu_seconds": round(time.process_time() - began, 1), "right": by_task,
    }  # fmt: skip
    for task, by_length in by_task.items():
        print(
            f"  {task} " + ", ".join(f"{length}: {mean(right):.3f}" for length, right in by_length.items()), flush=True
        )
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    record.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def settings_of(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return what a row's training depends on, beside its seed."""
    names = ("length", "times", "texts", "steps", "batch", "segment")
    return {**{name: getattr(given, name) for name in names}, "rate": rate_of(name, given)}


def row_of(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return a row of the table: one model trained anew for every seed, and what it recalls, by task and length."""
    results = [trained(name, seed, given) for seed in given.seeds]
    record: dict[str, Any] = {
        "row": name, "settings": results[0]["settings"], "parameters": results[0]["parameters"],
        "loss_by_seed": [one["loss"] for one in results],
        "train_cpu_seconds": sum(one["train_cpu_seconds"] for one in results), "right": {},
    }  # fmt: skip
    for task in TASKS:
        record["right"][task] = {}
        for length in results[0]["right"][task]:
            by_seed = [one["right"][task][length] for one in results]
            by_text = [mean(column) for column in zip(*by_seed, strict=True)]
            record["right"][task][length] = {
                "mean": mean(by_text), "interval": bootstrap_mean(by_text).bounds(),
                "by_seed": [mean(seed) for seed in by_seed], "by_text": [round(share, 4) for share in by_text],
            }  # fmt: skip
    return record


def reread(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return what a row's trained models recall at the trained length when they read in other segments.

    Surprise is then measured by the weights of fewer or more tokens ago; nothing is trained again.
    """
    record: dict[str, Any] = {}
    for segment in given.read_segments:
        kept = [Titans.from_pretrained(given.out / f"{name}-{seed}", segment=segment).eval() for seed in given.seeds]
        record[str(segment)] = {}
        for task in TASKS:
            by_seed = [recall(model, task, given.length, given) for model in kept]
            by_text = [mean(column) for column in zip(*by_seed, strict=True)]
            cell = {"mean": mean(by_text), "interval": bootstrap_mean(by_text).bounds()}
            record[str(segment)][task] = {**cell, "by_seed": [mean(seed) for seed in by_seed]}
            print(f"{name} in segments of {segment}: {task} {given.length}: {cell['mean']:.3f}", flush=True)
    return record


def add_differences(records: Sequence[dict[str, Any]]) -> None:
    """Give every row the paired differences to ``lmm`` and to ``window``, where these are among the rows."""
    for base in (record for record in records if record["row"] in ("lmm", WINDOW)):
        for record in (record for record in records if record is not base):
            for task, by_length in record["right"].items():
                for length, cell in by_length.items():
                    paired = paired_bootstrap(cell["by_text"], base["right"][task][length]["by_text"])
                    cell[f"minus_{base['row']}"] = {"mean": paired.mean, "interval": paired.bounds()}


def table(records: Sequence[dict[str, Any]], task: str) -> str:
    """Return the share of right words by row and length, in Markdown."""
    lengths = list(records[0]["right"][task])
    lines = [f"| {task} | parameters | {' | '.join(lengths)} |", "|" + "---|" * (2 + len(lengths))]
    for record in records:
        cells = [record["right"][task][length] for length in lengths]
        shown = [f"{c['mean']:.3f} [{c['interval'][0]:.3f}, {c['interval'][1]:.3f}]" for c in cells]
        lines.append(f"| `{record['row']}` | {record['parameters']:,} | {' | '.join(shown)} |")
    return "\n".join(lines)


def ship(name: str, given: argparse.Namespace, models: Path) -> Path:
    """Copy a trained row's first seed to the zoo, as ``zoo-titans-NAME``, and return the folder."""
    folder, result = models / f"zoo-titans-{name}", trained(name, given.seeds[0], given)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(given.out / f"{name}-{given.seeds[0]}", folder, ignore=shutil.ignore_patterns("result.json"))
    result["right"] = {
        task: {length: round(mean(right), 4) for length, right in by_length.items()}
        for task, by_length in result["right"].items()
    }
    result["sha256"] = sha256(folder / "model.safetensors")
    (folder / "recipe.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors are private to their writer
    return folder


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    root = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root.add_argument("--rows", type=some_of(ROWS), default=list(ROWS), help=f"models: some of {','.join(ROWS)}; all")
    root.add_argument("--seeds", type=numbers(0), default=[0], help="a training for each, for example 0,1,2")
    root.add_argument("--length", type=int, default=64, help="tokens of a text that is trained on")
    root.add_argument(
        "--times", type=numbers(1), default=[1, 4, 8, 16], help="how many times as long texts are that are measured"
    )
    root.add_argument("--texts", type=int, default=64, help="texts of each task and length that are measured")
    root.add_argument("--steps", type=int, default=450, help="steps of training")
    root.add_argument("--batch", type=int, default=16, help="texts of a step")
    root.add_argument("--rate", type=float, help=f"highest learning rate; {RATE}, of mac {RATES['mac']}")
    root.add_argument("--segment", type=int, default=16, help="tokens of a segment, and of attention's window")
    root.add_argument("--out", type=Path, default=Path("runs/titans"), help="folder of the trained models")
    root.add_argument(
        "--read-segments", type=numbers(1), default=[], help="then let them read in other segments, for example 8,4,1"
    )
    root.add_argument("--json", type=Path, help="file for the rows")
    root.add_argument("--ship", action="store_true", help="copy the first seed of each row to the zoo: zoo-titans-NAME")
    return root


def check(given: argparse.Namespace) -> None:
    """Raise `SystemExit` for numbers that no training has, before hours of it."""
    if min(given.steps, given.batch, given.segment) < 1 or given.texts < 2:
        raise SystemExit("--steps, --batch and --segment are counts of at least 1, --texts of at least 2")
    if given.length < SHORTEST:
        raise SystemExit(f"--length {given.length}: give at least {SHORTEST}, which facts and questions need")
    if given.rate is not None and not 0 < given.rate < float("inf"):
        raise SystemExit(f"--rate {given.rate}: give a number above 0")
    if given.ship and set(given.rows) - set(get_args(Variant)):
        raise SystemExit(f"--ship: give --rows of {', '.join(get_args(Variant))}; other models are not for the zoo")
    if given.read_segments and {WINDOW, "mac"} & set(given.rows):
        raise SystemExit("--read-segments: attention of mac sees its segment, and window has none; give other --rows")
    try:
        new_model(given.rows[0], given.seeds[0], given)
        for folder in (given.out, given.json.parent if given.json else given.out):
            folder.mkdir(parents=True, exist_ok=True)
    except (EvomemError, OSError) as error:
        raise SystemExit(str(error)) from None


def main() -> None:
    """Train, measure, print, and save."""
    given = parser().parse_args()
    check(given)
    torch.set_num_threads(1)  # such small products are slower with more, and the same seed would give other sums
    records = [row_of(name, given) for name in given.rows]
    add_differences(records)
    for record in records if given.read_segments else ():
        record["right_by_segment"] = reread(record["row"], given)
    for task in TASKS:
        print("\n" + table(records, task))
    if given.json is not None:
        whole = {"seeds": given.seeds, "rows": records}
        given.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    for name in given.rows if given.ship else ():
        print(f"shipped: {ship(name, given, SHIPPED)}")


if __name__ == "__main__":
    main()
