"""The trained Decision Transformers: they act well with their whole memory, and worse with a badly chosen part."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from evomem.errors import ConfigError
from evomem.evaluation import EvaluationProtocol, Evaluator
from evomem.evaluation.episode_return import rollout
from evomem.evaluation.measurement import EXACT
from evomem.managers import build as manager_of
from evomem.models import LoadedModel, load
from evomem.models.sharing import assemble, dismantle
from evomem.tasks import Split, build
from evomem.tasks.episodes.codebook import Codebook
from evomem.tasks.episodes.environments import Maze, cart, cart_codebook, maze_codebook
from evomem.testing.models import tiny, tiny_tokenizer
from experiments.zoo import train_decision
from experiments.zoo.episodes import RECIPES
from tests.support.processes import elsewhere

ZOO = Path(__file__).resolve().parents[2] / "experiments" / "zoo" / "models"


@pytest.fixture(scope="module")
def maze() -> LoadedModel:
    return load("zoo-tmaze")


@pytest.fixture(scope="module")
def pole() -> LoadedModel:
    return load("zoo-cartpole")


def test_folders_are_small_and_hold_their_codebooks(maze, pole):
    for loaded, codes in ((maze, maze_codebook()), (pole, cart_codebook())):
        folder = ZOO / loaded.name
        assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6
        recipe = json.loads((folder / "recipe.json").read_text())
        assert recipe["select_accuracy"] > 0.9
        assert recipe["steps"] == RECIPES[loaded.name.removeprefix("zoo-")].steps  # the script is the one that made it
        assert torch.equal(loaded.model.state_values, torch.tensor(codes.states))
        assert loaded.model.return_values[:, 0].tolist() == codes.returns.tolist()
        assert loaded.model.config.act_dim == codes.actions


def scores(loaded: LoadedModel, spec: str, managers: list[str], count: int) -> list[list[float]]:
    """Exact scores of managers on sealed samples."""
    task, evaluator = build(spec, loaded.tokenizer), Evaluator(loaded)
    chosen = [manager_of(manager) for manager in managers]
    found = [evaluator.evaluate(chosen, sample, task, EXACT) for sample in task.samples(Split.SEALED, count, seed=0)]
    return [[row[place].exact for row in found] for place in range(len(managers))]


def test_the_maze_is_solved_with_the_whole_memory_and_lost_with_a_random_part(maze):
    full, random = scores(maze, "tmaze:length=480", ["full", "random(budget=24)"], 20)
    assert sum(full) >= 19
    assert sum(random) <= 12


def test_the_cart_needs_what_came_just_before(pole):
    full, recent, early = scores(
        pole, "cartpole:length=300", ["full", "streaming_llm(budget=32)", "random(budget=4)"], 20
    )
    assert sum(full) >= 15
    assert sum(early) < sum(full)
    assert sum(recent) >= sum(early)


@pytest.mark.parametrize("kind", ["compress_once", "streaming"])
def test_batches_of_candidates_are_what_one_candidate_is_alone(maze, kind):
    task = build("tmaze:length=150", maze.tokenizer)
    evaluator = Evaluator(maze, EvaluationProtocol(kind=kind, every=40))
    sample = task.samples(Split.SELECT, 1, seed=0)[0]
    specs = ("full", "keydiff(budget=20)", "snapkv(budget=20)", "h2o(budget=20)", "feature_scorer(budget=20)", "namm")
    managers = [manager_of(spec) for spec in specs]
    for manager in managers:
        for parameter in manager.parameters():
            parameter.data.normal_()
    for manager, fast in zip(managers, evaluator.evaluate(managers, sample, task, EXACT), strict=True):
        plain = evaluator.evaluate_plainly(manager, sample, task, EXACT)
        assert fast.loglik == pytest.approx(plain.loglik, abs=1e-4)
        assert fast.exact == plain.exact
        assert fast.slots == plain.slots
        assert manager.name == "full" or fast.slots < 147


# ---- acting ----------------------------------------------------------------------------------------------------------


def greedy_transformer(loaded: LoadedModel, codes: Codebook, env: Any, target: float, seed: int) -> tuple[float, list]:
    """Act as in the paper: transformers' forward over the whole episode before every action; no cache, no tokens."""
    model = loaded.model
    observation, _ = env.reset(seed=seed)
    returns, states, actions, total, over = [], [], [], 0.0, False
    while not over:
        returns.append(codes.returns[codes.return_code(target - total)])
        states.append(codes.states[codes.state_code(observation)])
        steps = len(states)
        done = torch.nn.functional.one_hot(torch.tensor([*actions, 0]), codes.actions).float()
        predicted = model.decision(
            returns_to_go=torch.tensor(returns).float()[None, :, None] / model.config.return_scale,
            states=torch.tensor(np.stack(states))[None],
            actions=done[None],
            timesteps=torch.arange(steps)[None],
        ).action_preds
        actions.append(int(predicted[0, -1].argmax()))
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        total += float(reward)
        over = terminated or truncated
    return total, actions


def test_with_the_whole_memory_it_acts_as_the_plain_transformer(maze, pole):
    short = gymnasium.wrappers.TimeLimit(cart(), 40)
    for loaded, codes, env, target in (
        (maze, maze_codebook(), Maze(20, 4), 4.0),
        (pole, cart_codebook(), short, 200.0),
    ):
        for seed in range(2):
            found = rollout(loaded, manager_of("full"), env, target=target, seed=seed)
            assert (found.total, list(found.actions)) == greedy_transformer(loaded, codes, env, target, seed)


def test_eviction_costs_return_in_the_maze(maze):
    env = Maze(100, 6)
    full = [rollout(maze, manager_of("full"), env, target=6.0, seed=seed) for seed in range(3)]
    less = [rollout(maze, manager_of("random(budget=16)"), env, target=6.0, seed=seed) for seed in range(3)]
    assert sum(one.total for one in full) >= 15
    assert sum(one.total for one in less) <= 11
    assert all(len(one.actions) == 106 for one in full + less)
    assert max(one.bytes_peak for one in less) < 0.25 * full[0].bytes_peak
    assert full[0].slots == 3 * 106 - 1  # the last action is not read


def test_who_cannot_act_is_told(maze):
    with pytest.raises(ConfigError, match="5 actions"):
        rollout(maze, manager_of("full"), cart(), target=1.0)
    with pytest.raises(ConfigError, match="reads no episodes"):
        rollout(
            LoadedModel("a language model", tiny("gpt2"), tiny_tokenizer(), ""), manager_of("full"), cart(), target=1.0
        )


# ---- elsewhere -------------------------------------------------------------------------------------------------------


def described(folder: Path) -> list[tuple[str, str, str]]:
    """Both models of a process that has only the parts and the alias: class, digest, sum of logits."""
    with (folder / "parts").open("rb") as file:
        parts, ids = pickle.load(file)
    return [
        (type(one.model).__name__, one.digest, one.model(ids).logits.double().sum().item().hex())
        for one in (assemble(parts), load("zoo-tmaze"))
    ]


def test_other_processes_get_the_same_model_by_alias_and_by_its_parts(maze, tmp_path):
    ids = torch.randint(2, maze.model.config.vocab_size, (1, 60))
    with (tmp_path / "parts").open("wb") as file:
        pickle.dump((dismantle(maze), ids), file)
    logits = maze.model(ids).logits.double().sum().item().hex()
    assert elsewhere(described, tmp_path) == [("DecisionStream", maze.digest, logits)] * 2


def test_a_killed_training_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    short = replace(RECIPES["tmaze"], steps=4, lengths=(24,), episodes=2)
    monkeypatch.setitem(RECIPES, "tmaze", short)
    monkeypatch.setattr(train_decision, "KEPT", 2)
    whole, _ = train_decision.train("tmaze", 0, tmp_path / "whole.pt")

    def killed(recipe, step):
        if step == 3:
            raise KeyboardInterrupt
        return rate(recipe, step)

    rate = train_decision.rate
    monkeypatch.setattr(train_decision, "rate", killed)
    with pytest.raises(KeyboardInterrupt):
        train_decision.train("tmaze", 0, tmp_path / "parts.pt")
    monkeypatch.setattr(train_decision, "rate", rate)
    again, state = train_decision.train("tmaze", 0, tmp_path / "parts.pt")
    assert [step for step, *_ in state["curve"]] == [2, 4]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ZOO.parents[2] / "docs" / "decision.md").read_text()
    snippets = text.split("```python\n")[1:]
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet.partition("```")[0], {})
    load("my-model")
