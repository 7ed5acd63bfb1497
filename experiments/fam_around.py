"""Run: feedback memory around a frozen decoder: its embeddings learned by gradients and by evolution, and a pass key.

    OMP_NUM_THREADS=1 python -m experiments.fam_around --model zoo-qwen3 --json runs/fam_around_qwen3.json
    OMP_NUM_THREADS=1 python -m experiments.fam_around --model zoo-qwen3 --only stock,blocks,gradients --seeds 0

A text is made-up prose with one needle (``magic fox 4 7 1 3.``) at a random place, cut to whole blocks, and ends in the
question and the four digits, which are to be predicted. The decoder is frozen; the embeddings that feedback begins as,
``--feedback`` times its width, are all that is learned, on texts of the train split whose needles are all behind what
the last block sees; what is measured is of the sealed split, needles anywhere. Rows:

    stock       the decoder itself, which sees the whole text
    blocks      block sliding-window attention, no feedback (feedback 0)
    random      feedback whose embeddings are drawn like token embeddings, and not learned
    gradients   ... learned by Adam through all blocks
    evolution   ... learned by a separable CMA-ES, a population a batch

Cells are the share of right digits (nats a digit; flow). Flow says how much of the needle reaches the answer: the
divergence, in nats, of what is predicted from what it is where the needle has other digits. ``behind`` counts the texts
whose needle no token of the last block can see through segments. Everything is deterministic by seed. Intervals are of
95 %, over texts; the mean over seeds is taken text by text.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from random import Random
from statistics import fmean as mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

import evomem
from evomem.errors import EvomemError
from evomem.models.architectures.fam_around import FamAround
from evomem.statistics import bootstrap_mean
from evomem.tasks import Split
from evomem.tasks.text.zoo import Fact, needle_facts, sentence
from evomem.tasks.text.zoo_words import DIGITS
from experiments.arguments import numbers, some_of

LEARNED = ("random", "gradients", "evolution")
ROWS = ("stock", "blocks", *LEARNED)


@dataclass(frozen=True)
class Texts:
    """Texts of one length.

    Attributes
    ----------
    ids : (texts, tokens) int64, the last tokens are the answer.
    answer : tokens of an answer.
    digits : which of them are its digits, and no space between two.
    behind : of every text, whether its needle ends before the first token that the last block sees.
    changed : as ``ids``, with a needle that states four other digits; question and answer are the same.
    """

    ids: Tensor
    answer: int
    digits: list[int]
    behind: list[bool]
    changed: Tensor


def texts(
    tokenizer: Any, count: int, length: int, field: int, split: Split, seed: int, *, only_behind: bool = False
) -> Texts:
    """Return ``count`` texts of ``length`` tokens; ``field`` tokens at the end are seen without feedback.

    only_behind : whether all needles end before these tokens.
    """
    random = Random(f"{split.value} {length} {seed}")

    def encoded(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    rows, others, behind = list[list[int]](), list[list[int]](), list[bool]()
    answers = set[tuple[bool, ...]]()  # which tokens of an answer are digits
    while len(rows) < count:
        fact = needle_facts(random, split, 1)[0]
        asked, said = encoded(f" magic {fact.key}"), encoded(f" {fact.value}")
        needle, room = encoded(f" {fact.needle}"), length - len(asked) - len(said)
        prose = list[list[int]]()
        while sum(map(len, prose)) + len(needle) < room:
            prose.append(encoded(" " + sentence(random)))
        place = random.randint(0, len(prose))
        before, after = (list(chain.from_iterable(part)) for part in (prose[:place], prose[place:]))
        context = (before + needle + after)[-room:]
        if room - len(after) < len(needle):
            continue  # cut off with the beginning
        is_behind = room - len(after) <= length - field
        if only_behind and not is_behind:
            continue
        digits, other = fact.value.split(), Random(fact.needle)
        lie = Fact(fact.key, " ".join(other.choice([digit for digit in DIGITS if digit != one]) for one in digits))
        changed = (before + encoded(f" {lie.needle}") + after)[-room:]
        rows.append(context + asked + said)
        others.append(changed + asked + said)
        behind.append(is_behind)
        answers.add(tuple(bool(tokenizer.decode([token]).strip()) for token in said))
    if len(answers) > 1:
        raise SystemExit("answers have differently many tokens with this tokenizer; take another model")
    if {len(row) for row in others} != {length}:
        raise SystemExit("digits have differently many tokens with this tokenizer; take another model")
    shown = answers.pop()
    digits = [at for at, is_digit in enumerate(shown) if is_digit]
    return Texts(torch.tensor(rows), len(shown), digits, behind, torch.tensor(others))


def answer_nats(logits: Tensor, given: Texts, rows: slice) -> tuple[Tensor, Tensor]:
    """Return log-likelihood and rightness of digits: (rows, digits) each. logits : of the last answer + 1 tokens."""
    wanted = given.ids[rows, -given.answer :][:, given.digits]
    chances = logits[:, given.digits].float().log_softmax(-1)
    return chances.gather(-1, wanted[..., None])[..., 0], chances.argmax(-1) == wanted


@torch.no_grad()
def measure(answer: Callable[[Tensor, int], Tensor], given: Texts, batch: int) -> list[tuple[float, ...]]:
    """Return nats a token, share of right tokens and flow, text by text.

    Flow is the divergence KL(as it is || the needle's digits changed) of what is predicted, in nats a token.

    answer : gives logits of so many last tokens.
    """
    measured = list[tuple[float, ...]]()
    for at in range(0, len(given.ids), batch):
        rows = slice(at, at + batch)
        logits, changed = (answer(ids[rows], given.answer + 1) for ids in (given.ids, given.changed))
        nats, right = answer_nats(logits, given, rows)
        here, there = (part[:, given.digits].float().log_softmax(-1) for part in (logits, changed))
        flow = (here.exp() * (here - there)).sum(-1)
        measured += zip(*(part.float().mean(1).tolist() for part in (nats, right, flow)), strict=True)
    return measured


def training(tokenizer: Any, seed: int, options: argparse.Namespace) -> Iterator[Texts]:
    """Yield batches to learn from, of ``--train-blocks`` many blocks in turn; every needle is behind the field."""
    step = 0
    while True:
        blocks = options.train_blocks[step % len(options.train_blocks)]
        length = blocks * options.block
        draw = 1_000_003 * (seed + 1) + step
        yield texts(tokenizer, options.batch, length, field(options), Split.TRAIN, draw, only_behind=True)
        step += 1


def field(options: argparse.Namespace) -> int:
    """Return how many of the last tokens of a text of whole blocks the last block sees."""
    seen: int = (options.segments + 1) * options.block
    return seen


def by_gradients(model: FamAround, tokenizer: Any, seed: int, options: argparse.Namespace) -> list[float]:
    """Learn the embeddings of a model by gradients; return the loss of every step."""
    assert model.summary is not None
    scale = float(model.get_input_embeddings().weight.std())  # type: ignore[arg-type]
    optimizer, losses = torch.optim.Adam(model.summary.parameters()), list[float]()
    batches = training(tokenizer, seed, options)
    for step in range(options.steps):
        optimizer.param_groups[0]["lr"] = options.rate * scale * min(1, (step + 1) / 10, 3 * (1 - step / options.steps))
        given = next(batches)
        logits = model(given.ids, use_cache=False, logits_to_keep=given.answer + 1).logits
        loss = -answer_nats(logits, given, slice(None))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.summary.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 20 == 19:
            print(f"  step {step + 1} loss {mean(losses[-20:]):.3f}", flush=True)
    return losses


@torch.no_grad()
def by_evolution(model: FamAround, tokenizer: Any, seed: int, options: argparse.Namespace) -> list[float]:
    """Learn the embeddings of a model by separable CMA-ES; return the population's mean loss of every generation."""
    from cmaes import SepCMA

    assert model.summary is not None
    weight, losses = model.summary.weight, list[float]()
    scale = float(model.get_input_embeddings().weight.std())  # type: ignore[arg-type]
    search = SepCMA(weight.flatten().double().numpy() / scale, 0.5, population_size=options.population, seed=seed + 1)
    batches = training(tokenizer, seed, options)
    mean_of = weight.flatten().double().numpy() / scale
    for generation in range(options.generations):
        candidates, given = [search.ask() for _ in range(options.population)], next(batches)
        ids = given.ids[: options.evolution_batch]
        some = replace(given, ids=ids.repeat(options.population, 1))
        rows = (
            torch.from_numpy(np.stack(candidates))
            .float()
            .mul(scale)
            .view(-1, *weight.shape)
            .repeat_interleave(len(ids), 0)
        )
        logits = model(some.ids, past_key_values=model.new_cache(rows), logits_to_keep=given.answer + 1).logits
        values = -answer_nats(logits, some, slice(None))[0].view(options.population, -1).mean(1)
        search.tell([(one, float(value)) for one, value in zip(candidates, values, strict=True)])
        mean_of = search.mean
        losses.append(float(values.mean()))
        if generation % 20 == 19:
            print(f"  generation {generation + 1} loss {mean(losses[-20:]):.3f}", flush=True)
    weight.copy_(torch.from_numpy(mean_of).mul(scale).view_as(weight))
    return losses


def row_of(name: str, loaded: Any, tests: dict[int, Texts], options: argparse.Namespace) -> dict[str, Any]:
    """Return what one row of the table measures at every length."""
    began, seeds = time.process_time(), options.seeds if name in LEARNED else [0]
    measured: dict[int, list[list[tuple[float, ...]]]] = {blocks: [] for blocks in tests}
    record: dict[str, Any] = {"row": name, "losses": {}}
    for seed in seeds:
        print(f"{name}, seed {seed}", flush=True)
        torch.manual_seed(seed)
        slots = options.feedback if name in LEARNED else 0
        model = None if name == "stock" else new_model(loaded, slots, options)
        if model is not None and name in ("gradients", "evolution"):
            learn = by_gradients if name == "gradients" else by_evolution
            losses = learn(model, loaded.tokenizer, seed, options)
            record["losses"][seed] = [mean(losses[at : at + 10]) for at in range(0, len(losses), 10)]
        reader = loaded.model if model is None else model

        def answer(ids: Tensor, last: int, reader: Any = reader) -> Tensor:
            logits: Tensor = reader(ids, use_cache=False, logits_to_keep=last).logits
            return logits

        for blocks, given in tests.items():
            measured[blocks].append(measure(answer, given, options.measure_batch))
    record["cpu_seconds"] = time.process_time() - began
    for blocks, given in tests.items():
        by_seed = measured[blocks]
        record[str(blocks)] = {
            part: summary([[one for one, is_behind in zip(seed, given.behind, strict=True) if is_behind or not only]
                           for seed in by_seed])
            for part, only in (("all", False), ("behind", True))
        }  # fmt: skip
    return record


def summary(by_seed: Sequence[Sequence[tuple[float, ...]]]) -> dict[str, Any] | None:
    """Return means over texts and seeds, with intervals over texts; None: there are no texts."""
    if not by_seed[0]:
        return None
    nats, right, flow = ([mean(texts) for texts in zip(*[[one[k] for one in seed] for seed in by_seed], strict=True)]
                   for k in range(3))  # fmt: skip
    return {
        "texts": len(right), "right": mean(right), "interval": bootstrap_mean(right).bounds(), "nats": mean(nats),
        "nats_interval": bootstrap_mean(nats).bounds(), "by_seed": [mean(one[1] for one in seed) for seed in by_seed],
        "nats_by_seed": [mean(one[0] for one in seed) for seed in by_seed], "text_right": right, "text_nats": nats,
        "flow": mean(flow), "flow_interval": bootstrap_mean(flow).bounds(),
    }  # fmt: skip


def compared(records: Sequence[dict[str, Any]], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Return paired differences of every row with feedback to blocks alone, over the texts behind the field."""
    plain, made = next((one for one in records if one["row"] == "blocks"), None), list[dict[str, Any]]()
    for one in records:
        for blocks in lengths if plain is not None and one["row"] in LEARNED else ():
            mine, theirs = one[str(blocks)]["behind"], plain[str(blocks)]["behind"] if plain else None
            if mine is None or theirs is None:
                continue
            line: dict[str, Any] = {"row": one["row"], "blocks": blocks}
            for what, key in (("right", "text_right"), ("nats", "text_nats")):
                both = bootstrap_mean([a - b for a, b in zip(mine[key], theirs[key], strict=True)])
                line[what], line[f"{what}_interval"] = both.mean, both.bounds()
            made.append(line)
    return made


def table(records: Sequence[dict[str, Any]], lengths: Sequence[int], part: str) -> str:
    """Return shares of right digits (nats; flow) by row and length, in Markdown."""
    lines = [f"| {part} | {' | '.join(f'{n} blocks' for n in lengths)} |", "|" + "---|" * (1 + len(lengths))]
    for record in records:
        cells = [record[str(n)][part] for n in lengths]
        shown = [
            "-" if cell is None else f"{cell['right']:.2f} ({cell['nats']:.2f}; {cell['flow']:.3f})" for cell in cells
        ]
        lines.append(f"| {record['row']} | {' | '.join(shown)} |")
    return "\n".join(lines)


def new_model(loaded: Any, slots: int, options: argparse.Namespace) -> FamAround:
    """Return feedback memory around the decoder."""
    return FamAround(loaded.model, block=options.block, segments=options.segments, feedback=slots).eval()


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    root = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root.add_argument("--model", default="zoo-qwen3", help="alias or folder of the decoder")
    root.add_argument("--only", type=some_of(ROWS), default=list(ROWS), help=f"rows: some of {','.join(ROWS)}; all")
    root.add_argument("--seeds", type=numbers(0), default=[0, 1, 2], help="embeddings drawn and learned for each")
    root.add_argument("--block", type=int, default=24, help="tokens of a block")
    root.add_argument("--segments", type=int, default=1, help="blocks before a token's own that it sees")
    root.add_argument("--feedback", type=int, default=4, help="slots of the feedback memory")
    root.add_argument("--train-blocks", type=numbers(1), default=[3, 4], help="blocks of texts to learn from")
    root.add_argument("--blocks", type=numbers(1), default=[1, 2, 4, 8, 16], help="blocks of texts that are measured")
    root.add_argument("--texts", type=int, default=48, help="texts of each length that are measured")
    root.add_argument("--steps", type=int, default=100, help="steps of gradients")
    root.add_argument("--batch", type=int, default=16, help="texts of a step")
    root.add_argument("--rate", type=float, default=0.3, help="learning rate, in deviations of token embeddings")
    root.add_argument("--generations", type=int, default=40, help="generations of evolution")
    root.add_argument("--population", type=int, default=12, help="candidates of a generation")
    root.add_argument("--evolution-batch", type=int, default=4, help="texts that a candidate reads in a generation")
    root.add_argument("--measure-batch", type=int, default=16, help="texts that are measured at once")
    root.add_argument("--json", type=Path, help="file for the rows")
    return root


def check(options: argparse.Namespace) -> None:
    """Raise `SystemExit` for numbers that nothing can be measured with."""
    counts = ("steps", "batch", "generations", "evolution_batch", "measure_batch", "feedback")
    for name in counts:
        if getattr(options, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} is {getattr(options, name)}; give at least 1")
    if options.texts < 2 or options.population < 4:
        raise SystemExit("--texts is a count of at least 2, and --population of at least 4")
    if options.block < 24 or options.segments < 0:
        raise SystemExit(
            "--block holds a needle, its question and its answer: at least 24 tokens; --segments at least 0"
        )
    if {"gradients", "evolution"} & set(options.only) and min(options.train_blocks) < options.segments + 2:
        raise SystemExit(
            f"--train-blocks: with {options.segments} segments the last block sees {options.segments + 1} blocks, and "
            f"needles to learn from are behind them; give at least {options.segments + 2}"
        )
    if not 0 < options.rate < float("inf"):
        raise SystemExit(f"--rate {options.rate}: give a number above 0")


def main() -> None:
    """Learn, measure, print, and save."""
    options = parser().parse_args()
    check(options)
    try:
        loaded = evomem.load_model(options.model)
        new_model(loaded, options.feedback, options)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
    except (EvomemError, OSError) as error:
        raise SystemExit(str(error)) from None
    tests = {
        blocks: texts(loaded.tokenizer, options.texts, blocks * options.block, field(options), Split.SEALED, 0)
        for blocks in options.blocks
    }
    records = [row_of(name, loaded, tests, options) for name in options.only]
    print("\n" + table(records, options.blocks, "all") + "\n\n" + table(records, options.blocks, "behind"))
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        said = {"settings": settings, "rows": records, "against_blocks": compared(records, options.blocks)}
        options.json.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
