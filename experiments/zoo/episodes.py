"""Zoo: batches of episodes for training Decision Transformers, made in gymnasium environments as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from evomem.models.architectures.decision_transformer import DecisionStreamConfig
from evomem.tasks import Split
from evomem.tasks.episodes.codebook import Codebook, Episode
from evomem.tasks.episodes.environments import STEPS, cart_codebook, cart_episode, maze_codebook, maze_episode

UNSKILLED = 0.25
"""Share of the cart's episodes in which the pole falls soon: what low returns look like."""


@dataclass(frozen=True)
class Batch:
    """Episodes side by side; shorter ones are filled up at the end, where a causal model does not see it.

    Attributes
    ----------
    ids : (episodes, 3 * steps) int64.
    labels : (episodes, steps) int64, the intended action after each observation; -100 = not counted.
    weights : (episodes, steps), how much each counts.
    hard : (episodes, steps) bool, the labels by which progress is judged.
    """

    ids: Tensor
    labels: Tensor
    weights: Tensor
    hard: Tensor


def as_batch(config: DecisionStreamConfig, episodes: Sequence[Episode], hard: Callable[[Episode], list[bool]]) -> Batch:
    """Return episodes as a batch; hard labels and the others have the weight of one label each on average."""
    longest = max(map(len, episodes))
    ids = torch.zeros(len(episodes), 3 * longest, dtype=torch.int64)
    labels = torch.full((len(episodes), longest), -100)
    judged = torch.zeros(len(episodes), longest, dtype=torch.bool)
    firsts = torch.tensor([config.first_return, config.first_state, config.first_action])
    for row, episode in enumerate(episodes):
        codes = torch.tensor([episode.returns, episode.states, episode.actions]).T + firsts
        ids[row, : 3 * len(episode)] = codes.flatten()
        labels[row, : len(episode)] = torch.tensor(episode.intended)
        judged[row, : len(episode)] = torch.tensor(hard(episode))
    easy = ~judged & (labels >= 0)
    weights = judged / judged.sum().clamp(min=1) + 0.1 * easy / easy.sum().clamp(min=1)
    return Batch(ids, labels, weights, judged)


def tmaze_batch(config: DecisionStreamConfig, random: Random, split: Split, count: int, longest: int) -> Batch:
    """Return mazes of one length, a corridor of up to ``longest`` steps; what counts are the junctions."""
    cues, visits = random.randint(3, 8), random.randint(1, 3)
    steps = random.randint(max(cues * visits, longest // 2), max(cues * visits, longest))
    episodes = [maze_episode(random, split, steps, cues, visits) for _ in range(count)]
    return as_batch(config, episodes, lambda episode: [step >= steps for step in range(len(episode))])


def cartpole_batch(config: DecisionStreamConfig, random: Random, split: Split, count: int, longest: int) -> Batch:
    """Return the first ``longest`` steps of carts, skilled and unskilled; every action counts."""
    episodes = []
    for _ in range(count):
        skilled = random.random() >= UNSKILLED
        episode = cart_episode(random, split, skilled=skilled, exploring=random.choice((0.0, 0.1, 0.2)))
        episodes.append(episode.first(longest))
    return as_batch(config, episodes, lambda episode: [True] * len(episode))


@dataclass(frozen=True)
class Recipe:
    """How one model is made.

    Attributes
    ----------
    codebook : of its environment.
    batch : makes batches.
    config : fields of the model's configuration.
    lengths : steps of the longest episode, stage by stage; the next begins when ``hard`` labels are right.
    """

    codebook: Codebook
    batch: Callable[[DecisionStreamConfig, Random, Split, int, int], Batch]
    config: dict[str, int | float]
    lengths: tuple[int, ...]
    steps: int
    episodes: int = 16
    learning_rate: float = 1e-3
    enough: float = 0.95


SHAPE = {"n_layer": 3, "n_head": 4}

RECIPES = {
    "tmaze": Recipe(
        maze_codebook(),
        tmaze_batch,
        {**SHAPE, "hidden_size": 96, "max_ep_len": 168, "return_scale": 8.0},
        lengths=(24, 48, 96, 160),
        steps=1300,
    ),
    "cartpole": Recipe(
        cart_codebook(),
        cartpole_batch,
        {**SHAPE, "hidden_size": 64, "max_ep_len": STEPS, "return_scale": 100.0},
        lengths=(50, STEPS),
        steps=1000,
        episodes=6,  # every step of an episode counts, and not only its end
        enough=0.75,
    ),
}
