"""Evaluation: what a model writes after a prompt, greedily, while a manager decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from evomem.errors import TaskError
from evomem.evaluation.sample_tokens import Tokens, positions_needed
from evomem.memory import SlotCache
from evomem.memory.kv.policy import CachePolicy
from evomem.memory.kv.positions import beyond, position_limit

if TYPE_CHECKING:
    from evomem.evaluation.evaluator import Evaluator


def greedy_texts(
    evaluator: Evaluator, cache: SlotCache, policy: CachePolicy, tokens: Tokens, limit: int
) -> tuple[list[str], int]:
    """Return the greedy continuation of the prompt per row, and how many tokens a row was fed.

    Parameters
    ----------
    cache : what has been read; ``policy`` decides about it while the model answers.
    tokens : of the sample; its prompt is read first.
    limit : tokens that are written at most; a row ends before where it writes an end token.

    Raises
    ------
    TaskError : the model has learned positions for fewer tokens.
    """
    positions = position_limit(evaluator.loaded.model)
    if positions is not None and positions.learned and positions_needed(tokens, limit) > positions.tokens:
        raise TaskError(
            f"max_new_tokens {limit:,} after {positions_needed(tokens, 1):,} tokens: "
            f"{beyond(evaluator.loaded.model, positions)}; ask for fewer"
        )
    cache.policy = policy  # decides while it answers
    rows = len(cache.layers[0].starts)
    following = evaluator.forward_in_pieces(tokens.prompt.expand(rows, -1), cache, 1)[:, -1].argmax(-1)
    fed = tokens.prompt.shape[1]
    done = torch.zeros(rows, dtype=torch.bool, device=following.device)
    written: list[list[int]] = [[] for _ in range(rows)]
    for step in range(limit):
        for row, token in enumerate(following.tolist()):
            done[row] |= token in evaluator.end_tokens
            if not done[row]:
                written[row].append(token)
        if bool(done.all()) or step == limit - 1:
            break
        following = evaluator.forward(following[:, None], cache, 1)[:, -1].argmax(-1)
        fed += 1
    return [str(evaluator.loaded.tokenizer.decode(row, skip_special_tokens=True)) for row in written], fed
