"""Manager: NAMM, the neural attention memory model, which scores a slot by the attention that it received.

Source: "An Evolved Universal Transformer Memory" (arXiv 2410.13166).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from evomem.bounds import TOKENS, UNITS
from evomem.errors import CacheError, ConfigError
from evomem.managers.allocation import Allocation, Dense, Threshold, Uniform
from evomem.managers.base import MemoryManager, register
from evomem.managers.learned.bam import BAMScorer, LinearScorer, MLPScorer
from evomem.managers.options import ManagerOptions
from evomem.managers.selection import Ends
from evomem.managers.vector import load_vector, to_vector
from evomem.memory import LayerView
from evomem.memory.observations.spectrum import BINS
from evomem.modes import outside_inference_mode

OBSERVATION = "attention_spectrum"
AGE_FREQUENCIES = 4
FEATURES = 2 * AGE_FREQUENCIES + BINS
"""Numbers that describe a slot: 8 of its age, 17 of its attention spectrogram."""


class NAMMOptions(ManagerOptions):
    """Options of `NAMM`."""

    every: int | None = Field(
        default=512, ge=1, le=TOKENS, description="decide every that many tokens; none: once, after the context"
    )
    scorer: Literal["bam", "mlp", "linear"] = Field(
        default="bam", description="bam compares a slot with the later ones; mlp and linear see each slot by itself"
    )
    hidden: tuple[Annotated[int, Field(ge=1, le=UNITS)], ...] = Field(
        default=(32,), max_length=8, description="sizes of the mlp scorer's hidden layers"
    )
    selection: Literal["threshold", "capped", "dense"] = Field(
        default="capped",
        description="threshold: keep scores >= 0; capped: of these, the budget's best first (no budget: no cap); "
        "dense: as many slots in every head as the greediest head keeps (parity with the reference only). With an "
        "allocation: capped only, and slots are ranked to the budget",
    )


@register("namm")
class NAMM(MemoryManager):
    """Neural attention memory model: one small network, shared by all layers and heads, scores every slot.

    A slot is described by 25 numbers: ``[sin(a f_k), cos(a f_k)]`` of its age a in tokens, with
    ``f_k = 50000 ** (-k / 4)``, k = 0..3; then its attention spectrogram (`evomem.memory.observations.spectrum`),
    standardised by ``(x - mean) / max(sqrt(var), 1e-7)`` with the buffers ``spectrum_mean`` and ``spectrum_var`` (17
    each), which are measured with the full cache before a search (`SpectrumStatistics`) and saved with the parameters.

    All parameters zero, the initial value, give every slot the score 0: everything is kept.

    Raises
    ------
    ConfigError : invalid options; a budget with ``selection`` threshold or dense, which have no cap.
    """

    Options: ClassVar[type[ManagerOptions]] = NAMMOptions
    options: NAMMOptions
    parameter_options: ClassVar[frozenset[str]] = frozenset({"scorer"})
    calibrates: ClassVar[bool] = True
    on_view_device: ClassVar[frozenset[str]] = MemoryManager.on_view_device | {"features"}
    spectrum_mean: Tensor
    spectrum_var: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if any(size < 1 for size in self.options.hidden):
            raise ConfigError(f"manager 'namm': hidden: {self.options.hidden}; every size must be at least 1")
        self.scorer: nn.Module
        if self.options.scorer == "bam":
            self.scorer = BAMScorer(FEATURES)
        elif self.options.scorer == "mlp":
            self.scorer = MLPScorer(FEATURES, self.options.hidden)
        else:
            self.scorer = LinearScorer(FEATURES)
        self.register_buffer("spectrum_mean", torch.zeros(BINS, dtype=torch.float32))
        self.register_buffer("spectrum_var", torch.ones(BINS, dtype=torch.float32))

    @property
    def observes(self) -> frozenset[str]:
        """The attention spectrogram."""
        return frozenset({OBSERVATION})

    def make_ends(self) -> Ends:
        """The newest token."""
        return Ends(recent=1)

    def built_in_allocation(self) -> Allocation:
        """Return what ``selection`` names; with an ``allocation``, slots are ranked to the budget instead."""
        if self.options.selection == "capped":
            return Uniform() if self.options.allocation else Threshold()
        if self.options.budget is not None:
            raise ConfigError(
                f"manager 'namm': budget: {self.options.budget!r} has no effect with selection "
                f"{self.options.selection!r}; use selection 'capped'"
            )
        return Dense() if self.options.selection == "dense" else Threshold()

    def score(self, view: LayerView) -> Tensor:
        """Return scores (batch, kv_heads, slots) fp32; negative ones are evicted."""
        return cast(Tensor, self.scorer(self.features(view)))

    def features(self, view: LayerView) -> Tensor:
        """Return what the scorer sees: (batch, kv_heads, slots, 25) fp32, the age first, finite at empty slots."""
        raw = view.once(("namm features",), lambda: raw_features(view))
        # Age features are not standardised: their mean counts as 0 and their deviation as 1.
        mean = F.pad(self.spectrum_mean.float(), (2 * AGE_FREQUENCIES, 0))
        deviation = F.pad(self.spectrum_var.float().sqrt().clamp(min=1e-7), (2 * AGE_FREQUENCIES, 0), value=1.0)
        return (raw - mean) / deviation

    def set_statistics(self, mean: Tensor, var: Tensor) -> None:
        """Set the standardisation of the spectrogram: mean and variance of every bin, (17,) each.

        Raises
        ------
        ConfigError : another shape, a value that is not finite, a negative variance.
        """
        for name, values in (("spectrum_mean", mean), ("spectrum_var", var)):
            if values.shape != (BINS,) or not torch.isfinite(values).all():
                raise ConfigError(f"namm {name}: shape {tuple(values.shape)}; give {BINS} finite numbers, one a bin")
        if (var < 0).any():
            raise ConfigError(f"namm spectrum_var: {var.min().item()} is negative; a variance is at least 0")
        self.spectrum_mean.copy_(mean)
        self.spectrum_var.copy_(var)

    def calibrate(self, views: Iterable[LayerView]) -> None:
        """Set the spectrogram's statistics from contexts, see `collect_statistics`."""
        self.set_statistics(*collect_statistics((view.recorded[OBSERVATION], view.valid) for view in views))

    def to_vector(self) -> NDArray[np.float64]:
        """Return the parameters in the published flat order (see the scorers' docstrings); BAM: 4,172 numbers."""
        return to_vector(self)

    def from_vector(self, vector: ArrayLike) -> Self:
        """Set the parameters from a vector in the published flat order; return the manager itself."""
        load_vector(self, vector)
        return self


def raw_features(view: LayerView) -> Tensor:
    """Return ``[age 8 | spectrogram 17]`` (batch, kv_heads, slots, 25) fp32, zero at empty slots.

    Raises
    ------
    CacheError : the cache did not record the spectrogram.
    """
    if OBSERVATION not in view.recorded:
        raise CacheError(
            f"namm: the view of layer {view.layer} has no observation {OBSERVATION!r}; read the context through a "
            "cache that was made for this manager (manager.attach or manager.new_cache)"
        )
    spectrum = view.recorded[OBSERVATION].float()
    angle = view.age[..., None] * age_frequencies(spectrum.device)
    raw = torch.cat([angle.sin(), angle.cos(), spectrum], dim=-1)
    return torch.where(view.valid[..., None], raw, 0.0)


@cache
def age_frequencies(device: torch.device) -> Tensor:
    """Return f_k = 50000 ** (-k / 4): (4,) fp32. Made once: a decision is so short that making it anew would show."""
    with outside_inference_mode():
        return 50000.0 ** (-torch.arange(AGE_FREQUENCIES, device=device, dtype=torch.float32) / AGE_FREQUENCIES)


class SpectrumStatistics:
    """Mean and variance of every bin, pooled over layers, batch, heads and tokens, of a stream of spectrograms.

    Sums of squared deviations are merged as of Chan, Golub and LeVeque (1979), in float64: stable, and independent of
    how the stream is cut. Collect with the full cache, before a search, and freeze: `NAMM.set_statistics`.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros(BINS, dtype=torch.float64, device="cpu")
        self._deviations = torch.zeros(BINS, dtype=torch.float64, device="cpu")

    def add(self, spectrum: Tensor, valid: Tensor) -> None:
        """Take in spectrum (batch, kv_heads, slots, 17) where valid (batch, kv_heads, slots) is True."""
        rows = spectrum[valid].detach().to(device="cpu", dtype=torch.float64)
        if rows.shape[0]:
            mean = rows.mean(0)
            self._merge(rows.shape[0], mean, (rows - mean).square().sum(0))

    def merge(self, other: SpectrumStatistics) -> None:
        """Take in what ``other`` has collected."""
        if other.count:
            self._merge(other.count, other._mean, other._deviations)

    def _merge(self, count: int, mean: Tensor, deviations: Tensor) -> None:
        total = self.count + count
        delta = mean - self._mean
        self._mean = self._mean + delta * (count / total)
        self._deviations = self._deviations + deviations + delta.square() * (self.count * count / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """(17,) fp32."""
        return self._mean.float()

    @property
    def var(self) -> Tensor:
        """(17,) fp32, of the population (divided by the count)."""
        return (self._deviations / max(self.count, 1)).float()


def collect_statistics(observations: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return mean and variance (17,) each of a stream of (spectrogram, valid); see `SpectrumStatistics.add`.

    Raises
    ------
    ConfigError : no slot at all.
    """
    statistics = SpectrumStatistics()
    for spectrum, valid in observations:
        statistics.add(spectrum, valid)
    if not statistics.count:
        raise ConfigError("namm: no slot to collect spectrogram statistics from; give at least one context")
    return statistics.mean, statistics.var
