"""Task: two gymnasium environments in which one must remember, their experts, and episodes of the experts.

`Maze`: doors of several colours, each with an arrow, are passed among distractions; at the end junctions ask for the
newest arrow of a colour. `cart`: CartPole-v1 whose velocities are hidden, so that they must be had from what was seen
before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv
from numpy.typing import NDArray

from evomem.errors import ConfigError
from evomem.tasks.base import Split
from evomem.tasks.episodes.codebook import Codebook, Episode
from evomem.tasks.splits import draw_of_split

Vector = NDArray[np.float32]
Env = gymnasium.Env[Any, Any]

COLOURS, EXITS, SIGHTS = 8, 4, 64
JUNCTION = SIGHTS + COLOURS + EXITS
"""An observation of the maze: one of the sights, a colour, an arrow, and whether this is a junction, side by side."""

DISTRACTION = 0.2
"""Share of the corridor's steps with a colour without arrow or an arrow without colour: half a cue is none."""

TILT, PLACE = 0.05, 0.5
"""Radians and metres that are 1 in an observation of the cart."""

CLOSE = 0.01
"""Less lean than that, in radians, and it hardly matters which way the cart is pushed: no question is asked there."""

STEPS = 200
"""The cart's episodes end after as many."""

DISTURBED = {"low": -0.15, "high": 0.15}
"""How far from rest place, speed, tilt and its speed are when an episode begins; farther than CartPole-v1's own."""


class Maze(gymnasium.Env[Vector, np.int64]):
    """A corridor with doors, then junctions: a T-maze (Bakker 2001) with many cues and exits.

    Action 0 walks on, action 1 + e takes exit e. At a junction the right exit is the one that the arrow on the last
    door of the junction's colour pointed to, and gives reward 1. Nothing else gives any, and every step leads on: how
    the episode looks does not depend on what is done.

    Parameters
    ----------
    steps : length of the corridor.
    cues : colours of which there are doors; as many junctions follow, one of each colour.
    visits : doors of each colour, with arrows that have nothing to do with each other.

    Attributes
    ----------
    layout : the doors in their order, ``colour-arrow`` each: what an episode is about.
    right : the action that gives the most now.
    """

    observation_space: spaces.Space[Vector]
    action_space: spaces.Space[np.int64]

    def __init__(self, steps: int = 150, cues: int = 6, visits: int = 2) -> None:
        if not 1 <= cues <= COLOURS or visits < 1 or cues * visits > steps:
            raise ConfigError(
                f"maze: {cues} colours (cues) and {visits} doors of each in {steps} steps; there can be 1 to {COLOURS} "
                "colours, and no more doors than steps"
            )
        self.steps, self.cues, self.visits = steps, cues, visits
        self.observation_space = spaces.Box(0.0, 1.0, (JUNCTION + 1,), np.float32)
        self.action_space = spaces.Discrete(1 + EXITS)
        self.layout = ""
        self._seen: list[Vector] = []
        self._exits: list[int] = []
        self._now = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Vector, dict[str, Any]]:
        """Lay out another maze."""
        super().reset(seed=seed)
        draw = self.np_random
        colours = draw.permutation(COLOURS)[: self.cues].tolist()
        doors = [(colour, int(draw.integers(EXITS))) for colour in draw.permutation(colours * self.visits).tolist()]
        places = np.sort(draw.choice(self.steps, len(doors), replace=False))
        self.layout = " ".join(f"{colour}-{arrow}" for colour, arrow in doors)
        self._seen = [self._distraction() for _ in range(self.steps)]
        for place, (colour, arrow) in zip(places, doors, strict=True):
            self._seen[place] = sight(colour=colour, arrow=arrow)
        self._seen += [sight(colour=colour, junction=True) for colour in draw.permutation(colours).tolist()]
        last = dict(doors)
        self._exits = [last[int(seen[SIGHTS : SIGHTS + COLOURS].argmax())] for seen in self._seen[self.steps :]]
        self._now = 0
        return self._seen[0].copy(), {}

    def _distraction(self) -> Vector:
        if self.np_random.random() >= DISTRACTION:
            return sight(thing=int(self.np_random.integers(SIGHTS)))
        half = int(self.np_random.integers(COLOURS + EXITS))
        return sight(colour=half) if half < COLOURS else sight(arrow=half - COLOURS)

    @property
    def right(self) -> int:
        """The action that gives the most now."""
        return 0 if self._now < self.steps else 1 + self._exits[self._now - self.steps]

    def step(self, action: np.int64 | int) -> tuple[Vector, float, bool, bool, dict[str, Any]]:
        """Go on by one step; the reward is 1 for the right exit."""
        reward = float(self._now >= self.steps and int(action) == self.right)
        self._now += 1
        over = self._now == len(self._seen)
        return (np.zeros_like(self._seen[0]) if over else self._seen[self._now].copy()), reward, over, False, {}


def sight(
    *, thing: int | None = None, colour: int | None = None, arrow: int | None = None, junction: bool = False
) -> Vector:
    """Return an observation of the maze, (`JUNCTION` + 1,)."""
    seen = np.zeros(JUNCTION + 1, np.float32)
    for value, at in ((thing, 0), (colour, SIGHTS), (arrow, SIGHTS + COLOURS)):
        if value is not None:
            seen[at + value] = 1.0
    seen[JUNCTION] = junction
    return seen


@cache
def maze_codebook() -> Codebook:
    """Return the codes of `Maze`: everything that can be seen in it, and a return for every number of junctions."""
    states = [sight(thing=thing) for thing in range(SIGHTS)]
    states += [sight(colour=colour) for colour in range(COLOURS)]
    states += [sight(arrow=arrow) for arrow in range(EXITS)]
    states += [sight(colour=colour, arrow=arrow) for colour in range(COLOURS) for arrow in range(EXITS)]
    states += [sight(colour=colour, junction=True) for colour in range(COLOURS)]
    return Codebook(np.arange(COLOURS + 1.0), np.stack(states), 1 + EXITS)


def maze_seed(random: Random, split: Split, env: Maze) -> int:
    """Return a seed for ``env.reset``; layouts are divided over the splits."""

    def layout(seed: int) -> str:
        env.reset(seed=seed)
        return env.layout

    return draw_of_split(lambda: random.getrandbits(32), layout, split, "mazes")


def maze_episode(random: Random, split: Split, steps: int, cues: int, visits: int) -> Episode:
    """Return an episode of somebody who knows the way."""
    env = Maze(steps, cues, visits)
    return play(env, lambda: (env.right, env.right, True), maze_codebook(), maze_seed(random, split, env))


# ---- CartPole --------------------------------------------------------------------------------------------------------

_PLACES = 2.4 * np.sinh(3 * np.linspace(-1, 1, 13)) / np.sinh(3)
_TILTS = 0.21 * np.sinh(3 * np.linspace(-1, 1, 49)) / np.sinh(3)
"""Metres and radians that can be told apart: finest where a good policy keeps cart and pole."""


class Blurred(gymnasium.ObservationWrapper[Vector, np.int64, Vector], gymnasium.utils.RecordConstructorArgs):
    """CartPole seen without velocities, place and tilt rounded to a grid: (place / `PLACE`, tilt / `TILT`)."""

    def __init__(self, env: Env) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def observation(self, observation: Vector) -> Vector:
        """Return what is left of place, speed, tilt and its speed."""
        codes = cart_codebook()
        shown = np.array([observation[0] / PLACE, observation[2] / TILT], np.float32)
        seen: Vector = codes.states[codes.state_code(shown)].copy()
        return seen


@cache
def cart_codebook() -> Codebook:
    """Return the codes of the cart: a grid of places and tilts, and every tenth return."""
    places, tilts = np.meshgrid(_PLACES / PLACE, _TILTS / TILT, indexing="ij")
    states = np.stack((places.ravel(), tilts.ravel()), -1).astype(np.float32)
    return Codebook(np.arange(0.0, STEPS + 1.0, 10.0), states, 2)


def cart() -> Env:
    """Return CartPole-v1 with `STEPS` steps and without velocities."""
    return Blurred(gymnasium.make("CartPole-v1", max_episode_steps=STEPS))


def cart_lean(env: Env, *, skilled: bool = True) -> float:
    """Return how far, in radians, a controller that sees everything takes the pole to lean; it pushes to that side.

    An unskilled one looks at the tilt only, and fails.
    """
    bare = env.unwrapped
    if not isinstance(bare, CartPoleEnv) or bare.state is None:
        raise ConfigError("cart: this controller is for a CartPole that was reset")
    place, speed, tilt, turning = (float(value) for value in bare.state)
    return 0.05 * place + 0.1 * speed + tilt + 0.25 * turning if skilled else tilt


def cart_seed(random: Random, split: Split) -> int:
    """Return a seed for ``env.reset``; seeds are divided over the splits."""
    return draw_of_split(lambda: random.getrandbits(32), lambda seed: f"cart {seed}", split, "seeds")


def cart_episode(random: Random, split: Split, *, skilled: bool = True, exploring: float = 0.1) -> Episode:
    """Return an episode of a controller that acts at random in a share of the steps; it begins `DISTURBED`."""
    seed = cart_seed(random, split)
    dice, env = Random(seed), cart()

    def policy() -> tuple[int, int, bool]:
        lean = cart_lean(env, skilled=skilled)
        intended = int(lean > 0)
        return intended, dice.randrange(2) if dice.random() < exploring else intended, abs(lean) > CLOSE

    return play(env, policy, cart_codebook(), seed, DISTURBED)


def play(
    env: Env,
    policy: Callable[[], tuple[int, int, bool]],
    codes: Codebook,
    seed: int,
    options: dict[str, Any] | None = None,
) -> Episode:
    """Play one episode; the policy returns what it means to do, what it does, and whether that was no close call."""
    observation, _ = env.reset(seed=seed, options=options)
    states, choices, rewards, over = [], [], list[float](), False
    while not over:
        choices.append(policy())
        states.append(codes.state_code(observation))
        observation, reward, terminated, truncated, _ = env.step(choices[-1][1])
        rewards.append(float(reward))
        over = terminated or truncated
    to_go = np.cumsum(rewards[::-1])[::-1]
    returns = tuple(codes.return_code(float(value)) for value in to_go)
    intended, actions, clear = zip(*choices, strict=True)
    return Episode(returns, tuple(states), actions, intended, clear, float(to_go[0]))
