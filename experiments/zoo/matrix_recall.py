"""Zoo: recall of the memory matrix beyond its window, written by the model itself and decided by managers: a table.

    OMP_NUM_THREADS=1 python -m experiments.zoo.matrix_recall --pairs 8,16,24 --length 128
    OMP_NUM_THREADS=1 python -m experiments.zoo.matrix_recall knorm runs/matrix/winner/plugin --budgets 16

``emptied`` is the model whose matrix is emptied between context and question: what the window alone can do. ``slots/2``
is the model with the first half of its slots. Managers decide every ``--every`` tokens.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch

from evomem import plugins
from evomem.evaluation import Evaluator
from evomem.evaluation.measurement import EXACT, EvaluationProtocol
from evomem.managers import MemoryManager, build
from evomem.models import LoadedModel, load
from evomem.statistics import bootstrap_mean
from evomem.tasks import Sample, Split
from evomem.tasks import build as build_task

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
    """Return (right, log-likelihood) of every sample's answer, the matrix written by the model itself.

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


def manager_of(source: str, budget: int | None) -> MemoryManager:
    """Return the manager of a plug-in folder or a spec."""
    manager = plugins.load(source) if "/" in source else build(source)
    return manager if budget is None else manager.with_options(budget=budget)


def line(name: str, results: Sequence[Sequence[float]]) -> str:
    """Return a row of the table, with 95 % intervals."""
    right, logs = ([one[column] for one in results] for column in (0, 1))
    low, high = bootstrap_mean(right).bounds()
    return f"| {name} | {sum(right) / len(right):.2f} [{low:.2f}, {high:.2f}] | {sum(logs) / len(logs):.3f} |"


def measure(loaded: LoadedModel, pairs: int, given: argparse.Namespace) -> None:
    """Print the table of one number of pairs."""
    task = build_task("zoo_recall", loaded.tokenizer, given.length, pairs=pairs)
    samples = task.samples(Split.SEALED, given.samples, given.seed)
    evaluator = Evaluator(loaded, EvaluationProtocol(kind="streaming", every=given.every))
    model: Any = loaded.model
    slots = int(model.config.matrix_slots)
    print(
        f"\n{pairs} pairs, {given.length} tokens\n\n| memory | right (95 % interval) | nats |\n|---|---|---|",
        flush=True,
    )
    print(line("emptied", own_recall(evaluator, model, samples, empties=True)), flush=True)
    for number in (slots, slots // 2):
        print(
            line(f"own writing, {number} slots", own_recall(evaluator, with_slots(model, number), samples)), flush=True
        )
    budgets = [int(budget) for budget in given.budgets.split(",")]
    entrants: list[tuple[str, int | None]] = [("full", None)]
    entrants += [(name, budget) for budget in budgets for name in given.managers]
    managers = [manager_of(name, budget) for name, budget in entrants]
    results = [evaluator.evaluate(managers, sample, task, EXACT) for sample in samples]
    for number, (name, budget) in enumerate(entrants):
        values = [[one[number].exact or 0.0, one[number].loglik] for one in results]
        print(line(name if budget is None else f"{name}, {budget} slots", values), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("managers", nargs="*", default=list(FIELD))
    parser.add_argument("--model", default="zoo-memory-matrix")
    parser.add_argument("--pairs", default="8,16,24")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--budgets", default="32,16")
    parser.add_argument("--every", type=int, default=4, help="tokens between decisions")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    loaded = load(given.model)
    for pairs in given.pairs.split(","):
        measure(loaded, int(pairs), given)


if __name__ == "__main__":
    main()
