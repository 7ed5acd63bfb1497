"""Base: torch's modes, which a caller may be in and which must not stick to what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave `torch.inference_mode` for a block, or a function that this decorates; everywhere else nothing changes.

    Tensors made in inference mode can neither be written to nor serve a gradient once it has ended. What outlives the
    caller's block (readings, parameters, constants) is therefore made outside. No gradients are recorded, as before.
    """
    if torch.is_inference_mode_enabled():
        # This alone would switch the recording of gradients on.
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for a block, and every part of it back into its own mode."""
    training = [module for module in model.modules() if module.training]
    model.train(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
