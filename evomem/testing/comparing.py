"""Testing: ways to run a model over a cache, and comparisons of what comes out, for kit and tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from evomem.errors import EvomemError
from evomem.memory import CachePolicy, SlotCache
from evomem.memory.kv.versions import passed
from evomem.testing.reference import Batch

TOLERANCE = 1e-5
"""Largest difference between two ways to the same logits in fp32, relative to the largest logit (at least 1)."""


ROUNDINGS = 8
"""The same in types of less precision, as a multiple of the type's rounding (`torch.finfo(dtype).eps`)."""


def logit_tolerance(dtype: torch.dtype) -> float:
    """Return how far logits of a model of this type may be apart: 1e-5 in fp32 and fp64, .008 in fp16, .06 in bf16.

    Relative to the largest logit (at least 1). Every layer rounds what it hands on, so two right ways to the same
    logits differ by some roundings of the type; a token that is missing from a memory moves them by more.
    """
    return max(TOLERANCE, 0.0 if is_exact(dtype) else ROUNDINGS * torch.finfo(dtype).eps)


def is_exact(dtype: torch.dtype) -> bool:
    """Whether the type is so fine (fp32, fp64) that rounding decides neither about slots nor about tokens."""
    return torch.finfo(dtype).bits >= torch.finfo(torch.float32).bits


class ConformanceError(EvomemError, AssertionError):
    """A manager, or the cache under it, breaks the contract."""


# ---- inputs and ways to run a model ----------------------------------------------------------------------------------


def context_length(manager: CachePolicy) -> int:
    """Tokens that a check reads: enough for two decisions and a remainder."""
    every = manager.schedule.every
    return 45 if every is None else max(45, 2 * every + 5)


def random_rows(model: PreTrainedModel, lengths: list[int], seed: int, tokenizer: Any = None) -> list[Tensor]:
    """Random tokens (length,) per row, without the tokenizer's special ones."""
    generator = torch.Generator().manual_seed(seed)
    special = set(tokenizer.all_special_ids) if tokenizer is not None else set(ends(model)) | {0}
    allowed = torch.tensor([i for i in range(text_config(model).vocab_size) if i not in special])
    return [allowed[torch.randint(len(allowed), (length,), generator=generator)] for length in lengths]


@torch.no_grad()
def read(model: PreTrainedModel, cache: Any, batch: Batch, pieces: list[int] | None = None, at: int = 0) -> Tensor:
    """Feed ``batch`` from token ``at`` on in pieces of those lengths (by default one); return all logits.

    What the kit compares is on the processor, wherever the model is.
    """
    outputs, device = [], model.device
    for piece in pieces or [batch.ids.shape[1] - at]:
        end = at + piece
        mask = None if bool(batch.real.all()) else batch.real[:, :end].long()
        outputs.append(
            model(
                batch.ids[:, at:end].to(device),
                attention_mask=None if mask is None else mask.to(device),
                position_ids=batch.positions[:, at:end].to(device),
                use_cache=True,
                **passed(cache, model),
            ).logits.cpu()
        )
        at = end
    # Some models hand out fp32 logits, computed from what their own type has rounded.
    return torch.cat(outputs, 1).to(model.dtype)


@torch.no_grad()
def greedy(
    model: PreTrainedModel, cache: Any, ids: Tensor, new: int, real: Tensor | None = None, **more: Any
) -> Tensor:
    """Return what ``generate`` appends to ids (batch, tokens): (batch, new), greedy unless ``more`` says otherwise."""
    mask = torch.ones_like(ids) if real is None else real.long()
    settings = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0, **more}
    make: Any = model.generate
    out = make(ids.to(model.device), attention_mask=mask.to(model.device), **passed(cache), **settings)
    appended: Tensor = out[:, ids.shape[1] :].cpu()
    return appended


def text_config(model: PreTrainedModel) -> Any:
    """Return the configuration of the decoder."""
    return model.config.get_text_config(decoder=True)


def ends(model: PreTrainedModel) -> list[int]:
    """Ids that end a generation; they are suppressed, so that all generations have the same length."""
    config = model.generation_config
    ids = None if config is None else config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def kv_heads(model: PreTrainedModel) -> int:
    """Return the number of KV heads of a layer."""
    text = text_config(model)
    parts = (text, getattr(text, "attn_config", None))
    names = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
    counts = (getattr(part, name, None) for name in names for part in parts)
    return int(next((heads for heads in counts if heads), None) or text.num_attention_heads)


# ---- comparisons -----------------------------------------------------------------------------------------------------


def same_logits(
    label: str, got: Tensor, expected: Tensor, real: Tensor | None = None, tolerance: float | None = None
) -> None:
    """Raise `ConformanceError` when logits (batch, tokens, vocabulary) differ, at tokens that are real."""
    tolerance = logit_tolerance(got.dtype) if tolerance is None else tolerance
    if real is None:
        real = torch.ones(got.shape[:2], dtype=torch.bool)
    difference = (got.float() - expected.float()).abs().amax(-1).masked_fill(~real, 0.0)
    scale = max(1.0, float(expected[real].abs().max()))
    worst = float(difference.nan_to_num(nan=torch.inf).max()) / scale
    if not worst <= tolerance:
        row, token = divmod(int(difference.nan_to_num(nan=torch.inf).argmax()), difference.shape[1])
        raise ConformanceError(
            f"{label}: logits differ by {worst:.2e} of the largest (allowed {tolerance:.0e}), "
            f"most at row {row}, token {token}"
        )


def same_tensors(label: str, got: Tensor, expected: Tensor) -> None:
    """Raise `ConformanceError` unless two tensors are equal to the bit."""
    if got.shape != expected.shape:
        raise ConformanceError(f"{label}: shape {tuple(got.shape)} instead of {tuple(expected.shape)}")
    if not torch.equal(got, expected):
        where = (got != expected).nonzero()[0].tolist()
        raise ConformanceError(
            f"{label}: first difference at {where}: {got[tuple(where)]} instead of {expected[tuple(where)]}"
        )


def kept_tokens(cache: SlotCache, row: int) -> list[list[list[int]]]:
    """Return the indices of the tokens that a row still keeps, counted from its first: [layer][kv head]."""
    return [
        [[int(slot) - int(layer.start[row]) for slot in head if slot >= 0] for head in layer.slots[row]]
        for layer in cache.layers
    ]


def same_kept_tokens(label: str, got: list[list[list[int]]], expected: list[list[list[int]]]) -> None:
    """Raise `ConformanceError` unless two rows hold the same tokens in every layer and head."""
    for layer, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        for head, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if a != b:
                raise ConformanceError(
                    f"{label}: layer {layer}, head {head} holds {len(a)} tokens instead of {len(b)}; "
                    f"too many {sorted(set(a) - set(b))[:8]}, missing {sorted(set(b) - set(a))[:8]}"
                )
