"""Driver: where a search begins that follows an earlier one: the region in which that one's best candidates lie.

WS-CMA-ES: Nomura, Watanabe, Akimoto, Ozaki, Onishi, "Warm starting CMA-ES for hyperparameter optimization", AAAI 2021
(arXiv 2012.06932).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evomem.drivers.base import Array
from evomem.errors import ConfigError


@dataclass(frozen=True)
class WarmStart:
    """The Gaussian that fits the best candidates of an earlier search (section 3.2 of the paper).

    Attributes
    ----------
    vectors : (candidates, dim) the best share of what the earlier search evaluated.
    alpha : standard deviation, in units of the vector, that is added in every direction.
    """

    vectors: Array
    alpha: float

    def check(self, dim: int, driver: str) -> None:
        """Raise `ConfigError` unless the vectors are of a search in as many dimensions."""
        if self.vectors.ndim != 2 or not len(self.vectors) or self.vectors.shape[1] != dim:
            raise ConfigError(
                f"driver {driver!r}: warm_start: the other run's vectors have {self.vectors.shape[-1]} dimensions, "
                f"those of this search {dim}; only a run in the same search space can be followed"
            )

    @property
    def mean(self) -> Array:
        """Mean of the vectors (dim,)."""
        mean: Array = self.vectors.mean(axis=0)
        return mean

    def diagonal(self) -> tuple[float, Array]:
        """Return step size and standard deviations (dim,) in units of it, whose geometric mean is 1."""
        deviations = np.sqrt(self.alpha**2 + self.vectors.var(axis=0))
        sigma = float(np.exp(np.log(deviations).mean()))
        return sigma, deviations / sigma

    def full(self) -> tuple[float, Array]:
        """Return step size and covariance (dim, dim) in units of its square, with determinant 1.

        The same as `cmaes.get_warm_start_mgd`, through the logarithm of the determinant: from some 150 dimensions on
        the determinant itself is 0 in double precision.
        """
        dim = self.vectors.shape[1]
        centred = self.vectors - self.mean
        covariance = self.alpha**2 * np.eye(dim) + centred.T @ centred / len(self.vectors)
        sigma = float(np.exp(np.linalg.slogdet(covariance)[1] / (2 * dim)))
        return sigma, covariance / sigma**2
