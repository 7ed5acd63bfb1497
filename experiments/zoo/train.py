"""Run: train a model of the zoo and write it as a folder, ``experiments/zoo/models/zoo-NAME``.

    OMP_NUM_THREADS=1 python -m experiments.zoo.train gpt-neox      # or fam, mosaic, memory-matrix, forgetting, ...

A training that was killed goes on from its state, ``runs/zoo/NAME/state.pt``; ``--fresh`` begins again. The same recipe
and seed give the same weights on the same machine with the same number of threads, interrupted or not.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiments.zoo.data import POSITIONS, Batch, Lessons
from experiments.zoo.publish import MODELS, RECORD, publish
from experiments.zoo.recipes import RECIPES, Recipe, new_model

SAVED_EVERY = 60.0
"""Seconds between two states on disk."""
REMEMBERED = 0.9
"""What the running accuracy keeps of its past at each step."""
SHARES = {"wpe": 0.1}
"""Share of the learning rate that parameters get, by a part of their name.

A learned position is met in few batches; at the full rate Adam's momentum would make noise of it.
"""
REVIEW = 0.25
"""Share of the steps with the lessons of an earlier stage, so that nothing is unlearnt."""


@dataclass
class Progress:
    """Where a training is; with the state of model and optimiser, all that it takes to go on.

    Attributes
    ----------
    step, tokens : steps taken, tokens read.
    stage : index of the lessons' length.
    accuracy : running share of right answer tokens at this stage, by kind (`experiments.zoo.data.kinds_of`).
    passed : step at which the last stage was passed; -1 before.
    cpu_seconds, seconds : processor time and wall time spent, over all processes.
    history : ``(step, length, accuracies)`` whenever a stage was passed.
    """

    step: int = 0
    tokens: int = 0
    stage: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)
    passed: int = -1
    cpu_seconds: float = 0.0
    seconds: float = 0.0
    history: list[Any] = field(default_factory=list)


class Training:
    """One model on its way.

    Parameters
    ----------
    recipe : what is made, and how.
    seed : of weights and lessons.
    """

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.recipe = recipe
        self.seed = seed
        self.lessons = Lessons(seed, recipe.tasks)
        self.model = new_model(recipe, self.lessons.tokenizer, seed).train()
        groups: list[dict[str, Any]] = [{"params": [], "share": share} for share in (1.0, *SHARES.values())]
        for name, parameter in self.model.named_parameters():
            number = next((n for n, part in enumerate(SHARES, 1) if part in name), 0)
            groups[number]["params"].append(parameter)
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.98))
        self.progress = Progress(accuracy=dict.fromkeys(self.lessons.kinds, 0.0))

    @property
    def done(self) -> bool:
        """Whether the rate has fallen to zero."""
        return self.progress.step >= self._end

    @property
    def _end(self) -> int:
        """Step after which nothing is learnt: the recipe's last, or ``decay`` steps after the last stage was passed."""
        recipe, passed = self.recipe, self.progress.passed
        return recipe.steps if passed < 0 else min(recipe.steps, passed + recipe.decay)

    def rate(self) -> float:
        """Return the learning rate of the next step."""
        recipe, step = self.recipe, self.progress.step
        return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup, (self._end - step) / recipe.decay)

    def advance(self) -> float:
        """Take one step; return its loss."""
        progress, recipe = self.progress, self.recipe
        random = Random(f"zoo step {self.seed} {progress.step}")
        stage = progress.stage
        if stage and random.random() < REVIEW:
            stage = random.randrange(stage)
        length = recipe.lengths[stage]
        batch = self.lessons.batch(progress.step, length, recipe.tokens[length >= 256])
        loss, right = self._judge(batch, random)
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * self.rate()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        progress.step += 1
        progress.tokens += int(batch.real.sum())
        if stage == progress.stage:
            self._note(right)
        return float(loss.detach())

    def _judge(self, batch: Batch, random: Random) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch (nats a token) and the share of right answer tokens, by kind."""
        length = batch.ids.shape[1]
        places = torch.arange(length)[None]
        if self.recipe.anywhere:  # so that every learned position is trained by lessons of every length
            places = places + torch.tensor([[random.randrange(POSITIONS - length + 1)] for _ in batch.ids])
        logits = self.model(input_ids=batch.ids, position_ids=places, use_cache=False).logits[:, :-1]
        following, real, answers = batch.said[:, 1:], batch.real[:, 1:], batch.answers[:, 1:]
        losses = cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none").view(following.shape)
        kinds = [answers & (batch.kinds[:, 1:] == kind) for kind in range(len(self.lessons.kinds))]
        # A needle has four words of an answer, a pair has one: all kinds count the same.
        loss = sum([losses[kind].mean() for kind in kinds], self.recipe.everywhere * losses[real].mean())
        right = logits.argmax(-1) == following
        return loss, torch.stack([(right & kind).sum() / kind.sum() for kind in kinds])

    def _note(self, right: Tensor) -> None:
        """Follow the accuracies, and pass to the next stage when all are high enough."""
        progress, recipe = self.progress, self.recipe
        for kind, now in zip(self.lessons.kinds, right.tolist(), strict=True):
            progress.accuracy[kind] = REMEMBERED * progress.accuracy[kind] + (1 - REMEMBERED) * now
        if progress.passed < 0 and min(progress.accuracy.values()) >= recipe.passed:
            progress.history.append([progress.step, recipe.lengths[progress.stage], dict(progress.accuracy)])
            if progress.stage == len(recipe.lengths) - 1:
                progress.passed = progress.step
            else:
                progress.stage += 1
                progress.accuracy = dict.fromkeys(self.lessons.kinds, 0.0)

    def save(self, path: Path) -> None:
        """Write everything that `load` needs; a reader sees the old file or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": self.progress.__dict__,
        }
        torch.save(state, fresh)
        os.replace(fresh, path)

    def load(self, path: Path) -> None:
        """Go on from a state that `save` wrote, of the same recipe and seed."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])


def train(training: Training, state: Path, *, minutes: float = float("inf")) -> None:
    """Train to the end, or for ``minutes`` of wall time, reporting on the terminal and saving once a minute."""
    progress = training.progress
    cpu, wall = time.process_time() - progress.cpu_seconds, time.monotonic() - progress.seconds
    begin = saved = reported = time.monotonic()
    while not training.done and time.monotonic() - begin < 60 * minutes:
        loss = training.advance()
        progress.cpu_seconds, progress.seconds = time.process_time() - cpu, time.monotonic() - wall
        now = time.monotonic()
        if now - reported >= 10 or training.done:
            reported = now
            accuracies = " ".join(f"{kind} {share:.3f}" for kind, share in progress.accuracy.items())
            length = training.recipe.lengths[progress.stage]
            print(
                f"step {progress.step} length {length} loss {loss:.3f} {accuracies} cpu {progress.cpu_seconds:.0f} s",
                flush=True,
            )
        if now - saved >= SAVED_EVERY or training.done:
            saved = now
            training.save(state)
    training.save(state)


def main() -> None:
    """Train one model from the command line."""
    parser = argparse.ArgumentParser(description="Train a model of the zoo.")
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, help="learning rate instead of the recipe's")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many; go on later")
    parser.add_argument("--fresh", action="store_true", help="begin again")
    parser.add_argument("--runs", type=Path, default=Path("runs/zoo"), help="where states are kept")
    parser.add_argument("--out", type=Path, help="folder of the finished model instead of the one that is shipped")
    options = parser.parse_args()
    recipe = RECIPES[options.name]
    if options.rate is not None:
        recipe = replace(recipe, learning_rate=options.rate)
    training = Training(recipe, options.seed)
    if options.seed and options.out is None:
        raise SystemExit(
            f"--seed {options.seed}: the shipped model is that of seed 0; give --out FOLDER for another one"
        )
    if options.out is not None and options.out.exists() and not (options.out / RECORD).is_file():
        raise SystemExit(f"--out {options.out}: is there and is no model of the zoo; name another folder")
    state = options.runs / (options.name if not options.seed else f"{options.name}-{options.seed}") / "state.pt"
    if state.is_file() and not options.fresh:
        training.load(state)
        print(f"goes on from {state}, step {training.progress.step}", flush=True)
    train(training, state, minutes=options.minutes)
    if not training.done:
        return
    out = options.out or MODELS / f"zoo-{options.name}"
    publish(training, out.name, out.absolute().parent)


if __name__ == "__main__":
    main()
