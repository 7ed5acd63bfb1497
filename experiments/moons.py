"""Run: three moons: how much must a contextual memory have read before it can continue a series?

    OMP_NUM_THREADS=1 python -m experiments.moons --out docs/results/moons     # goes on where it was killed

A network of one contextual unit sees three moons go round and continues the series by reading its own predictions.
With one head, whose keys know all moons at once, it must have seen them return to where they all were before: after
the least common multiple of the periods. With a head for each moon it must have seen each go round once: after the
longest period (Zhang et al. 2024, arXiv 2405.06394, section 4). Both are trained on the published triples of periods
and measured on the one that is held out; beside them, the same networks with weights that are given.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evomem.files.atomic import write_atomically
from evomem.models.architectures.mosaic_cache import UnitMemory
from evomem.models.architectures.mosaic_units import ContextualUnit, per_head
from evomem.tasks.base import Split
from evomem.tasks.streams.moons import MOONS, Orbits, orbits

LENGTH = 240
"""Observations in which the slowest moons come back three times; published: 800."""
STEPS, BATCH, LESSON = 1500, 8, 144
"""Steps of a training, series a step, and their observations: twice around; published: 500, 64 and 800."""
BETAS = (50.0, 500.0)
"""β at the first and at the last step of a training, rising by the same factor a step; published: 50."""
AHEAD = 25
"""Observations that are continued at every length of the context."""


class ComplexLinear(nn.Module):
    """A complex matrix without bias, on real and imaginary parts side by side: (..., 2 * MOONS) -> the same."""

    def __init__(self) -> None:
        super().__init__()
        parts = torch.empty(MOONS, MOONS, 2)
        self.parts = nn.Parameter(nn.init.uniform_(parts, -((4 * MOONS) ** -0.5), (4 * MOONS) ** -0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of the matrix with each vector."""
        product = torch.view_as_complex(x.unflatten(-1, (MOONS, 2))) @ torch.view_as_complex(self.parts).T
        return torch.view_as_real(product).flatten(-2)


class Keys(nn.Module):
    """Keys of one observation: no average, no norm."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.projection = heads, ComplexLinear()

    def forward(self, x: Tensor, real: Tensor | None, memory: UnitMemory) -> Tensor:
        """Return keys (batch, heads, tokens, dim) of x (batch, tokens, 2 * MOONS)."""
        memory.average = x.new_zeros(len(x), self.heads, x.shape[-1] // self.heads)  # nothing is carried over
        return per_head(self.projection(x), self.heads)


class Values(nn.Module):
    """Values that are the next observation's projection."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.projection = heads, ComplexLinear()

    def projected(self, x: Tensor) -> Tensor:
        """Return the projection (batch, heads, tokens, dim) of x (batch, tokens, 2 * MOONS)."""
        return per_head(self.projection(x), self.heads)

    def values(self, now: Tensor, after: Tensor) -> Tensor:
        """Return the values of pairs: what came after."""
        return after


class Beta(nn.Module):
    """A fixed β."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, pairs: Tensor) -> Tensor:
        """Return β: (1, 1, 1)."""
        return torch.full((1, 1, 1), self.beta, device=pairs.device)


class MoonsMosaic(nn.Module):
    """One contextual unit of one head, or of one for each moon, and a matrix on its output.

    Parameters
    ----------
    heads : 1 or 3.
    beta : β of the unit; 50 as published.
    """

    def __init__(self, heads: int, beta: float = 50.0) -> None:
        super().__init__()
        self.unit = ContextualUnit(Keys(heads), Values(heads), Beta(beta))  # type: ignore[arg-type]
        self.out = ComplexLinear()

    def forward(self, x: Tensor, memory: UnitMemory | None = None) -> Tensor:
        """Return the expected next observation at each of x (batch, tokens, 2 * MOONS)."""
        return self.out(self.unit(x, None, UnitMemory() if memory is None else memory))

    @classmethod
    def given(cls, heads: int, beta: float = 500.0) -> MoonsMosaic:
        """Return the network whose matrices are all the identity: it copies what followed what looks the same."""
        model = cls(heads, beta)
        with torch.no_grad():
            for part in (model.unit.keys.projection, model.unit.values.projection, model.out):  # type: ignore[union-attr]
                part.parts.copy_(torch.view_as_real(torch.eye(MOONS, dtype=torch.complex64)))  # type: ignore[union-attr,operator]
        return model


def observed(moons: Orbits, length: int, starts: Sequence[int]) -> Tensor:
    """Return series (starts, length, 2 * MOONS) of real and imaginary parts."""
    series = np.stack([moons.series(length, start) for start in starts])
    return torch.view_as_real(torch.from_numpy(series)).flatten(-2)


def train(
    heads: int, *, seed: int, steps: int = STEPS, batch: int = BATCH, length: int = LESSON
) -> tuple[MoonsMosaic, float]:
    """Return a network trained on the triples that are not sealed, and its loss (mean of the last 50 steps).

    AdamW without decay, rate 1e-2 falling linearly to 5e-6; loss: mean of clip(error, -1/2, 1/2)². As published, but
    for steps, batch and length, and for this: periods are whole numbers of observations (with so few of them, what was
    seen would else never come back closely enough); a series' loss begins where each of its moons has gone round once
    (guesses before that are noise); and β rises. With a constant 50 heads find their moons, but read more than one
    place of the orbit at once; with a constant 500 two heads may stay with the same moon.
    """
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    model = MoonsMosaic(heads)
    lessons = orbits(Split.TRAIN, LENGTH, whole=True) + orbits(Split.SELECT, LENGTH, whole=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 5e-4, steps)
    losses = []
    for step in range(steps):
        model.unit.bandwidth.beta = BETAS[0] * (BETAS[1] / BETAS[0]) ** (step / max(1, steps - 1))  # type: ignore[union-attr]
        chosen = draw.integers((len(lessons), 10_000), size=(batch, 2)).tolist()
        x = torch.cat([observed(lessons[moons], length + 1, [start]) for moons, start in chosen])
        known = torch.tensor([int(lessons[moons].longest) for moons, _ in chosen])[:, None] <= torch.arange(length)
        loss = (model(x[:, :-1]) - x[:, 1:])[known].clamp(-0.5, 0.5).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        losses.append(float(loss.detach()))
    return model.requires_grad_(False), float(np.mean(losses[-50:]))


@torch.no_grad()
def errors(model: MoonsMosaic, series: Tensor, lengths: Sequence[int], ahead: int = AHEAD) -> list[float]:
    """Return the mean absolute error of ``ahead`` observations continued from each length of the context.

    series : (starts, observations, 2 * MOONS), of which ``lengths`` (ascending) and ``ahead`` more are there.
    """
    memory, means, begin = UnitMemory(), [], 0
    for length in lengths:
        said = model(series[:, begin:length], memory)[:, -1:]
        begin, rolled, made = length, copy.copy(memory), [said]
        while len(made) < ahead:
            made.append(model(made[-1], rolled))
        truth = series[:, length : length + ahead]
        means.append(float((torch.cat(made, 1) - truth).abs().mean()))
    return means


def measure(weights: str, heads: int, seed: int, *, steps: int, starts: int) -> dict[str, Any]:
    """Return one network's errors at every length of the context, on the moons that are held out.

    weights : ``trained``, or ``given``, the identity.
    starts : contexts begin at so many places of the series.
    """
    (moons,) = orbits(Split.SEALED, LENGTH, whole=True)
    begun, loss = time.process_time(), None
    if weights == "given":
        model = MoonsMosaic.given(heads)
    else:
        model, loss = train(heads, seed=seed, steps=steps)
    seconds = time.process_time() - begun
    last = int(moons.together) + 20
    measured = errors(model, observed(moons, last + AHEAD, range(0, 311 * starts, 311)), range(1, last + 1))
    state = {name: part.tolist() for name, part in model.state_dict().items()}
    return {
        "weights": weights, "heads": heads, "seed": seed, "steps": steps, "starts": starts, "loss": loss,
        "periods": moons.periods, "rate": moons.rate, "longest": moons.longest, "together": moons.together,
        "cpu_seconds": round(seconds, 1), "beta": model.unit.bandwidth.beta, "state": state,
        "errors": [round(error, 5) for error in measured],
    }  # fmt: skip


def summary(one: Mapping[str, Any]) -> str:
    """Return the errors just before and after the longest period, and the least common multiple, have been read."""
    longest, together = int(one["longest"]), int(one["together"])
    places = {"max - 3": longest - 3, "max + 4": longest + 4, "lcm - 3": together - 3, "lcm + 4": together + 4}
    return ", ".join(f"{name} ({place}) {one['errors'][place - 1]:.3f}" for name, place in places.items())


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the error over the length of the context: one picture for trained weights, one for given ones."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    kinds = [kind for kind in ("trained", "given") if any(one["weights"] == kind for one in results)]
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(5.5 * len(kinds), 4), sharey=True, squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        chosen = [one for one in results if one["weights"] == kind]
        for one in chosen:
            heads = f"{one['heads']} head{'s' if one['heads'] > 1 else ''}"
            colour = "tab:blue" if one["heads"] == 1 else "tab:orange"
            axis.plot(
                range(1, len(one["errors"]) + 1), one["errors"], color=colour, alpha=0.8,
                label=None if one["seed"] else heads,
            )  # fmt: skip
        axis.axvline(chosen[0]["longest"], color="tab:orange", linestyle=":", label="longest period")
        axis.axvline(chosen[0]["together"], color="tab:blue", linestyle=":", label="common multiple")
        axis.set(title=f"{kind} weights", xlabel="observations read")
        axis.legend()
    axes[0][0].set(ylabel=f"mean absolute error, next {AHEAD} observations", ylim=(0, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def known(path: Path, wanted: tuple[object, ...]) -> dict[str, Any]:
    """Return a finished measurement; end the program where a file holds another one, or something else."""
    try:
        one: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        said = tuple(one[name] for name in ("weights", "heads", "seed", "steps", "starts"))
        if said != wanted or len(one["errors"]) != int(one["together"]) + 20 or not np.isfinite(one["errors"]).all():
            raise ValueError(f"is of {said}, and its errors are {len(one['errors'])}")
    except (ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"{path}: is not what this script writes ({error!r}); remove it to measure anew") from None
    return one


def main() -> None:
    """Train, measure, draw and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/moons/moons"), help="JSON and picture, without suffix")
    parser.add_argument("--runs", type=Path, default=Path("runs/moons"), help="where what is finished is kept")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=16)
    options = parser.parse_args()
    for what, least in (("steps", 1), ("seeds", 0), ("starts", 1)):
        if getattr(options, what) < least:
            parser.error(f"--{what} {getattr(options, what)}: give at least {least}")
    options.runs.mkdir(parents=True, exist_ok=True)
    wanted = [("given", heads, 0) for heads in (1, MOONS)]
    wanted += [("trained", heads, seed) for seed in range(options.seeds) for heads in (MOONS, 1)]
    results = []
    for weights, heads, seed in wanted:
        path = options.runs / f"{weights}-{heads}-{seed}-{options.steps}-{options.starts}.json"
        if not path.exists():
            one = measure(weights, heads, seed, steps=options.steps, starts=options.starts)
            write_atomically(path, json.dumps(one).encode())
        results.append(known(path, (weights, heads, seed, options.steps, options.starts)))
        print(weights, heads, seed, summary(results[-1]), f"{results[-1]['cpu_seconds']} s", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out.with_suffix(".json"), (json.dumps(results) + "\n").encode())
    draw(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
