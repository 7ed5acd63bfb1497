"""Zoo: train a Decision Transformer on episodes and write it as a model folder, ``experiments/zoo/models/zoo-NAME``.

    OMP_NUM_THREADS=1 python -m experiments.zoo.train_decision tmaze
    OMP_NUM_THREADS=1 python -m experiments.zoo.train_decision cartpole

Minutes on one core. A killed training goes on from ``runs/zoo/NAME.pt``, where it keeps its state. All data are made by
the generators of evomem's tasks, from their train split.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evomem.models.architectures.decision_transformer import DecisionStream, DecisionStreamConfig, stream_tokenizer
from evomem.tasks import Split
from experiments.zoo.episodes import RECIPES, Batch, Recipe

HERE = Path(__file__).resolve().parent
KEPT = 50
"""Steps between two states on disk, and between two reports."""


def new_model(recipe: Recipe, seed: int) -> DecisionStream:
    """Return an untrained model with the codes of a recipe."""
    codes = recipe.codebook
    config = DecisionStreamConfig(
        return_codes=len(codes.returns), state_codes=len(codes.states), state_dim=codes.states.shape[1],
        act_dim=codes.actions, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **recipe.config,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = DecisionStream(config)
    model.set_codes(torch.tensor(codes.returns)[:, None].float(), torch.tensor(codes.states))
    return model


def judged(model: DecisionStream, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the weighted cross-entropy of a batch (nats), and which of its hard labels are right."""
    logits = model(batch.ids).logits[:, 1::3, model.config.first_action :]
    losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none", ignore_index=-100)
    right = logits.argmax(-1)[batch.hard] == batch.labels[batch.hard]
    return (losses * batch.weights.flatten()).sum(), right


def rate(recipe: Recipe, step: int) -> float:
    """Return the learning rate of a step: a short rise, a plateau, and a fall over the last third."""
    return recipe.learning_rate * min((step + 1) / 30, 1.0, 3 * (recipe.steps - step) / recipe.steps)


def train(name: str, seed: int, state_file: Path) -> tuple[DecisionStream, dict[str, Any]]:
    """Train a model, or go on training it; return it, and a record of what happened."""
    recipe = RECIPES[name]
    model = new_model(recipe, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    state: dict[str, Any] = {"step": 0, "stage": 0, "accuracy": 0.0, "wall": 0.0, "processor": 0.0, "curve": []}
    if state_file.exists():
        kept = torch.load(state_file)
        model.load_state_dict(kept.pop("model"))
        optimizer.load_state_dict(kept.pop("optimizer"))
        state = kept
    began = time.perf_counter() - state["wall"], time.process_time() - state["processor"]
    while state["step"] < recipe.steps:
        # A step's data follow from its number, so that a training that was killed sees what it would have seen.
        random = Random(f"{name}/{seed}/{state['step']}")
        longest = recipe.lengths[state["stage"]]
        batch = recipe.batch(model.config, random, Split.TRAIN, recipe.episodes, longest)
        loss, right = judged(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(recipe, state["step"])
        optimizer.step()
        state["step"] += 1
        state["accuracy"] += 0.05 * (float(right.float().mean()) - state["accuracy"])
        if state["accuracy"] > recipe.enough and state["stage"] < len(recipe.lengths) - 1:
            state["stage"] += 1
            state["accuracy"] = 0.0
        if state["step"] % KEPT == 0 or state["step"] == recipe.steps:
            state["wall"], state["processor"] = time.perf_counter() - began[0], time.process_time() - began[1]
            state["curve"].append([state["step"], longest, round(float(loss.detach()), 4), round(state["accuracy"], 4)])
            print(*state["curve"][-1], f"{state['processor']:.0f} s", flush=True)
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state_file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({**state, **parts}, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
    return model, state


@torch.no_grad()
def select_accuracy(model: DecisionStream, name: str) -> float:
    """Return the share of right actions on episodes of the select split, as long as in the last stage."""
    recipe, random = RECIPES[name], Random(f"{name}/select")
    batches = [recipe.batch(model.config, random, Split.SELECT, 16, recipe.lengths[-1]) for _ in range(8)]
    return float(torch.cat([judged(model, batch)[1] for batch in batches]).float().mean())


def main() -> None:
    """Train, and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="model folder [default: experiments/zoo/models/zoo-NAME]")
    parser.add_argument("--state", type=Path, help="where to keep the state [default: runs/zoo/NAME.pt]")
    given = parser.parse_args()
    out = given.out or HERE / "models" / f"zoo-{given.name}"
    kept = given.state or HERE.parents[1] / "runs" / "zoo" / f"{given.name}.pt"
    model, state = train(given.name, given.seed, kept)
    model.eval()
    model.save_pretrained(out)
    stream_tokenizer(model.config).save_pretrained(out)
    recipe = RECIPES[given.name]
    record = {
        "command": f"python -m experiments.zoo.train_decision {given.name} --seed {given.seed}",
        "seed": given.seed,
        "steps": recipe.steps,
        "episodes_per_step": recipe.episodes,
        "learning_rate": recipe.learning_rate,
        "lengths": recipe.lengths,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "wall_seconds": round(state["wall"]),
        "processor_seconds": round(state["processor"]),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "select_accuracy": select_accuracy(model, given.name),
        "curve: step, longest episode, loss, running accuracy": state["curve"],
    }
    (out / "recipe.json").write_text(json.dumps(record, indent=1) + "\n")
    kept.unlink()
    print(f"{out}: accuracy {record['select_accuracy']:.3f} on the select split, {record['wall_seconds']} s")


if __name__ == "__main__":
    main()
