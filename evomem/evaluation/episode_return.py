"""Evaluation: a model of episodes acts in its environment with managed memory; what eviction costs in return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from evomem.devices import stacked
from evomem.errors import ConfigError
from evomem.managers.base import MemoryManager
from evomem.memory.kv.versions import passed
from evomem.models.loading import LoadedModel
from evomem.tasks.episodes.codebook import Codebook

if TYPE_CHECKING:  # an extra
    from gymnasium import Env


@dataclass(frozen=True)
class Rollout:
    """One episode that a model acted in.

    Attributes
    ----------
    total : the return: sum of the rewards.
    actions : what it did, step by step.
    bytes_peak, bytes_mean : measured bytes of the cache, observations included, as in ``streaming``.
    slots : per KV head at the end, mean over layers and heads.
    """

    total: float
    actions: tuple[int, ...]
    bytes_peak: int
    bytes_mean: float
    slots: float


@torch.no_grad()
def rollout(
    loaded: LoadedModel,
    manager: MemoryManager,
    env: Env[Any, Any],
    *,
    target: float,
    seed: int | None = None,
    every: int = 32,
    options: dict[str, Any] | None = None,
) -> Rollout:
    """Let a Decision Transformer act, greedily, in a gymnasium environment until the episode ends.

    Parameters
    ----------
    loaded : a model of episodes (`evomem.models.architectures.decision_transformer.DecisionStream`) that was trained
    for this environment.
    manager : decides every ``every`` tokens (three a step) while the model acts; its own schedule does not count.
    env : with the observations and actions of the model's codebook.
    target : the return that the model is asked for; rewards that were received are subtracted from it.
    seed, options : for ``env.reset``.

    Raises
    ------
    ConfigError : the model does not read episodes, or the environment has another shape of observations or number of
        actions than it.
    ModelError : the episode is longer than the model has timesteps for.
    """
    model: Any = loaded.model
    codes = _codebook(loaded, env)
    with manager.with_options(every=every).attach(loaded.model) as cache:
        observation, _ = env.reset(seed=seed, options=options)
        unread, actions, total, over = [], list[int](), 0.0, False
        while not over:
            unread += [
                model.config.first_return + codes.return_code(target - total),
                model.config.first_state + codes.state_code(observation),
            ]
            fed = torch.tensor([unread], device=model.device)
            logits = model(input_ids=fed, use_cache=True, logits_to_keep=1, **passed(cache, model)).logits[0, -1]
            actions.append(int(logits[model.config.first_action :].argmax()))
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            unread = [model.config.first_action + actions[-1]]
            total += float(reward)
            over = terminated or truncated
    slots = float(stacked([counts.float().mean() for counts in cache.slots_held()]).mean())
    return Rollout(total, tuple(actions), cache.bytes_peak, cache.bytes_mean, slots)


def _codebook(loaded: LoadedModel, env: Env[Any, Any]) -> Codebook:
    """Return what the model's tokens stand for."""
    model: Any = loaded.model
    if getattr(model, "state_values", None) is None:
        raise ConfigError(f"model {loaded.name!r} reads no episodes, so it cannot act in an environment")
    returns, states = model.return_values[:, 0].cpu().double().numpy(), model.state_values.cpu().numpy()
    wanted, offered = ((states.shape[1],), model.config.act_dim), (env.observation_space.shape, _actions(env))
    if wanted != offered:
        raise ConfigError(
            f"model {loaded.name!r} was made for observations of shape {wanted[0]} and {wanted[1]} actions; "
            f"{env} has {offered[0]} and {offered[1]}"
        )
    return Codebook(returns, states, model.config.act_dim)


def _actions(env: Env[Any, Any]) -> int | None:
    return getattr(env.action_space, "n", None)
