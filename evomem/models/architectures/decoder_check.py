"""Model: whether feedback memory around a decoder computes what it says, tried on the decoder itself."""

from __future__ import annotations

import torch
from torch import Tensor

from evomem.errors import UnsupportedModelError
from evomem.models.architectures.fam_passes import AlonePass
from evomem.models.architectures.frozen_decoder import FrozenDecoder


@torch.no_grad()
def require_additive(decoder: FrozenDecoder) -> None:
    """Raise `UnsupportedModelError` for a decoder of which feedback memory would make something else than it says.

    Layers must add what attention reads to their residual path as it is, so that a residual can be left out; and what
    base model and head make of tokens must be the model's own logits.
    """
    name = type(decoder.model).__name__
    device, dtype = decoder.model.device, decoder.dtype
    ids = torch.arange(3, device=device)[None]
    embedded = decoder.embedded(ids)
    draw = torch.Generator().manual_seed(0)
    hidden, read = (torch.randn(embedded.shape, generator=draw).to(device, dtype) for _ in range(2))

    def made(hidden: Tensor, read: Tensor) -> list[Tensor]:
        probe = ProbePass(hidden, read)
        decoder.run(embedded, ids, probe)
        return probe.outputs

    without, added, alone = made(hidden, read - hidden), made(hidden, read), made(torch.zeros_like(hidden), read)
    for one, two, three in zip(without, added, alone, strict=True):
        # Layers that feed what attention read forward; layers whose feed-forward part stands beside attention.
        if not (close(one, three) or close(one, two - hidden)):
            raise UnsupportedModelError(
                f"{name} scales or norms what attention reads before it is added, so the residual of the first "
                "feedback cannot be left out; feedback memory goes around decoders like Llama, Qwen3, GPT-NeoX"
            )
    causal = CausalPass(embedded)
    if not close(decoder.head(decoder.run(embedded, ids, causal)), decoder.logits(ids)):
        raise UnsupportedModelError(
            f"{name} makes its logits of more than its last layer and head (a scale, a cap), or attends by more than "
            "distances; feedback memory goes around decoders like Llama, Qwen3, GPT-NeoX"
        )


class ProbePass(AlonePass):
    """A pass in which every layer is given the same, and its attention reads the same."""

    def __init__(self, hidden: Tensor, read: Tensor) -> None:
        super().__init__(hidden)
        self._hidden, self._read = hidden, read
        self.outputs: list[Tensor] = []

    def enter(self, index: int, hidden: Tensor) -> Tensor:
        """Return what every layer is given."""
        return self._hidden

    def attended(self, index: int, output: Tensor) -> Tensor:
        """Return what every attention reads."""
        return self._read

    def leave(self, index: int, output: Tensor) -> None:
        """Note what the layer makes of it."""
        self.outputs.append(output)


class CausalPass(AlonePass):
    """A pass of tokens as the decoder itself reads them."""

    def __init__(self, embedded: Tensor) -> None:
        super().__init__(embedded)
        least = torch.finfo(embedded.dtype).min
        self._mask = torch.full_like(self._mask, least).triu(1)


def close(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    bound = 1e-3 if one.element_size() >= 4 else 5e-2
    return bool((one - two).float().norm() <= bound * two.float().norm())
