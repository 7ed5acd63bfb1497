"""Decision Transformers: the adaptor against transformers' own forward, the tasks against what their text says."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from evomem.errors import ConfigError, ModelError, TaskError
from evomem.managers import build as manager_of
from evomem.memory import SlotCache, attached
from evomem.models.architectures.decision_transformer import (
    SPECIAL,
    DecisionStream,
    DecisionStreamConfig,
    stream_tokenizer,
)
from evomem.tasks import Split, build
from evomem.tasks.episodes.codebook import Codebook
from evomem.tasks.episodes.environments import (
    COLOURS,
    EXITS,
    JUNCTION,
    SIGHTS,
    Maze,
    cart,
    cart_codebook,
    cart_episode,
    maze_codebook,
    maze_episode,
    play,
)
from evomem.testing.conformance import CHECKS, run_check

STATES, ACTIONS, RETURNS = 20, 3, 5


def tiny_decision(*, seed: int = 0) -> DecisionStream:
    """A random model in eval mode whose attention has preferences and whose logits are as large as `NEVER`."""
    torch.manual_seed(seed)
    sizes = {"return_codes": RETURNS, "state_codes": STATES, "state_dim": 4, "act_dim": ACTIONS, "max_ep_len": 40}
    model = DecisionStream(
        DecisionStreamConfig(**sizes, hidden_size=64, n_layer=3, n_head=4, initializer_range=0.2, return_scale=3.0)
    ).eval()
    model.set_codes(torch.randn(RETURNS, 1), torch.randn(STATES, 4))
    with torch.no_grad():
        for parameter in model.decision.predict_action.parameters():
            parameter.mul_(30)  # logits are compared relative to the largest one, which would else be `NEVER`
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def tiny() -> DecisionStream:
    return tiny_decision()


def trajectory(model: DecisionStream, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random token ids (2, 3 * steps), and transformers' own action predictions (2, steps, actions) for them."""
    draw = np.random.default_rng(seed)
    returns, states, actions = (
        torch.tensor(draw.integers(count, size=(2, steps))) for count in (RETURNS, STATES, ACTIONS)
    )
    own = model.decision(
        returns_to_go=model.return_values[returns] / model.config.return_scale,
        states=model.state_values[states],
        actions=model.action_values[actions],
        timesteps=torch.arange(steps).expand(2, -1),
    ).action_preds
    firsts = (len(SPECIAL), len(SPECIAL) + RETURNS, len(SPECIAL) + RETURNS + STATES)
    ids = torch.stack([codes + first for codes, first in zip((returns, states, actions), firsts, strict=True)], -1)
    return ids.flatten(1), own


@examples(max_examples=15)
@given(steps=st.integers(1, 40), seed=st.integers(0, 1000), pieces=st.lists(st.integers(1, 50), max_size=4))
def test_logits_are_those_of_transformers(tiny, steps, seed, pieces):
    ids, own = trajectory(tiny, steps, seed)
    logits = tiny(ids).logits
    scale = max(1.0, float(own.abs().max()))
    assert float((logits[:, 1::3, -ACTIONS:] - own).abs().max()) <= 1e-5 * scale
    assert bool((logits.argmax(-1) >= tiny.config.first_action).all())
    cuts = sorted({min(cut, 3 * steps) for cut in np.cumsum(pieces)} | {3 * steps})
    with attached(tiny):
        cache = SlotCache.for_model(tiny, manager_of("full"))
        parts = [
            tiny(ids[:, begin:end], past_key_values=cache, use_cache=True).logits
            for begin, end in zip([0, *cuts[:-1]], cuts, strict=True)
        ]
    assert float((torch.cat(parts, 1)[:, 1::3, -ACTIONS:] - own).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("spec", ["h2o(budget=14, every=16)"])
@pytest.mark.parametrize("check", CHECKS)
def test_the_slot_cache_keeps_its_contract(tiny, check, spec):
    run_check(check, manager_of(spec), tiny)


def test_an_episode_longer_than_the_timesteps_is_refused(tiny):
    tiny(torch.zeros(1, 120, dtype=torch.int64))
    with pytest.raises(ModelError, match="40 steps"):
        tiny(torch.zeros(1, 121, dtype=torch.int64))
    with pytest.raises(ConfigError, match="state_values"):
        tiny_decision().set_codes(torch.zeros(RETURNS, 1), torch.zeros(STATES, 5))


# ---- tasks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words():
    """The stream's tokenizer for both environments: every word that they can say is a token."""
    codes = cart_codebook()
    return stream_tokenizer(
        DecisionStreamConfig(return_codes=len(codes.returns), state_codes=len(codes.states), act_dim=1 + EXITS)
    )


def meaning(word: str, codes: Codebook) -> tuple[int | None, int | None, bool]:
    """Colour, arrow, and whether it is a junction: what a word of the maze says."""
    seen = codes.states[int(word[1:])]
    colour, arrow = seen[SIGHTS : SIGHTS + COLOURS], seen[SIGHTS + COLOURS : JUNCTION]
    return (
        int(colour.argmax()) if colour.any() else None,
        int(arrow.argmax()) if arrow.any() else None,
        bool(seen[JUNCTION]),
    )


@examples(max_examples=20)
@given(
    spare=st.integers(0, 400), cues=st.integers(1, 8), visits=st.integers(1, 3), seed=st.integers(0, 50),
    split=st.sampled_from(Split),
)  # fmt: skip
def test_the_maze_asks_for_the_newest_arrow_of_a_colour(words, spare, cues, visits, seed, split):
    length = 3 * (cues * visits + 1) + spare
    sample = build("tmaze", words, length, cues=cues, visits=visits).samples(split, 1, seed)[0]
    text = (sample.context + sample.question + sample.answer).split()
    assert len(words.encode(sample.context + sample.question + sample.answer, add_special_tokens=False)) == len(text)
    assert length - 3 < len(text) <= length
    assert [word[0] for word in text] == ["r", "s", "a"] * (len(text) // 3)
    seen = [meaning(word, maze_codebook()) for word in text[1::3]]
    # A later entry replaces an earlier one.
    told = {colour: arrow for colour, arrow, _ in seen if colour is not None and arrow is not None}
    *corridor, (asked, _, junction) = seen
    assert junction
    assert not any(at_junction for *_, at_junction in corridor)
    assert len(told) == cues
    assert sum(colour is not None and arrow is not None for colour, arrow, _ in seen) == cues * visits
    assert sample.answer.split() == [f"a{1 + told[asked]}"] == list(sample.references)


def test_the_maze_pays_for_right_exits_only():
    env = Maze(steps=9, cues=4, visits=2)
    dice = Random(0)
    for seed in range(20):
        env.reset(seed=seed)
        total, wanted, over = 0.0, 0, False
        while not over:
            action, junction = dice.randrange(1 + EXITS), env.right > 0
            wanted += junction and action == env.right
            _, reward, over, _, _ = env.step(action)
            total += reward
        assert total == wanted
    right = play(env, lambda: (env.right, env.right, True), maze_codebook(), 3)
    assert right.total == 4
    assert right.returns == (4,) * 9 + (4, 3, 2, 1)


@pytest.mark.parametrize("spec", ["tmaze:length=60", "cartpole:length=60"])
def test_samples_are_repeatable_and_their_splits_disjoint(words, spec):
    task = build(spec, words)
    found = {split: task.samples(split, 12, 0) for split in Split}
    assert build(spec, words).samples(Split.TRAIN, 5, 0) == found[Split.TRAIN][:5]
    assert task.samples(Split.TRAIN, 5, 1) != found[Split.TRAIN][:5]
    texts = {split: {sample.context for sample in samples} for split, samples in found.items()}
    assert len(set.union(*texts.values())) == 36
    sample = found[Split.SEALED][0]
    assert task.score(sample, sample.answer + " a0") == 1
    assert task.score(sample, "") == 0


def test_layouts_are_divided_over_the_splits_whatever_the_length():
    layouts: dict[Split, set[str]] = {}
    for split in Split:
        for number in range(60):
            episode = maze_episode(Random(number), split, 6 + number % 9, 3, 2)
            doors = [meaning(f"s{code}", maze_codebook())[:2] for code in episode.states]
            layouts.setdefault(split, set()).add(str([door for door in doors if None not in door]))
    assert not set.intersection(*layouts.values())
    assert sum(map(len, layouts.values())) == len(set.union(*layouts.values()))


def test_no_close_call_is_asked_about():
    tokenizer = stream_tokenizer(DecisionStreamConfig(return_codes=21, state_codes=637, act_dim=2))
    task = build("cartpole:length=90", tokenizer)
    for number, sample in enumerate(task.samples(Split.TRAIN, 12, seed=0)):
        episode = task.episode(task._random(Split.TRAIN, 0, number), Split.TRAIN)
        step = len(sample.context.split()) // 3
        assert episode.clear[step]
        assert not any(episode.clear[step + 1 : 30])
        assert sample.references == (f"a{episode.intended[step]}",)


def test_the_controller_sees_what_the_episode_does_not_show():
    lengths = [len(cart_episode(Random(number), Split.TRAIN)) for number in range(5)]
    assert lengths == [200] * 5
    assert max(len(cart_episode(Random(number), Split.TRAIN, skilled=False)) for number in range(5)) < 120
    env, codes = cart(), cart_codebook()
    shown, _ = env.reset(seed=0)
    assert shown.shape == (2,)
    assert shown in codes.states
    place, _, tilt, _ = env.unwrapped.state
    assert abs(shown - [place / 0.5, tilt / 0.05]).max() < 0.2


def test_what_cannot_be_is_refused(words):
    with pytest.raises(TaskError, match="at least 51"):
        build("tmaze", words, 20, cues=8).samples(Split.TRAIN, 1, 0)
    with pytest.raises(ConfigError, match="600"):
        build("cartpole", words, 601)
    with pytest.raises(ConfigError, match="cues"):
        Maze(steps=5, cues=6)
