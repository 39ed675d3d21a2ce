"""Number, mean and covariance of features, streamed in float64."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ig_dist.errors import ConfigError


@dataclass(frozen=True)
class Moments:
    """Number, mean and covariance of features; covariance with N - 1, as the published FID code has it."""

    count: int
    mean: NDArray[np.float64]  # (D,)
    covariance: NDArray[np.float64]  # (D, D)

    @property
    def sha256(self) -> str:
        """Hash of the three."""
        return hashlib.sha256(b"%d" % self.count + self.mean.tobytes() + self.covariance.tobytes()).hexdigest()


def streamed_moments(batches: Iterable[NDArray[Any]]) -> Moments:
    """Moments of all features (n, D), batch by batch (Chan, Golub and LeVeque 1979: no cancellation).

    It needs the memory of two covariances and of one batch. The result is a function of the batches in their order,
    to the bit; batches that are cut otherwise change its rounding.
    """
    count, mean, scatter, product = 0, np.zeros(0), np.zeros((0, 0)), np.zeros((0, 0))
    for batch in batches:
        if not (size := len(batch)):
            continue
        if not count:
            dimensions = batch.shape[1]
            mean, scatter, product = np.zeros(dimensions), *np.zeros((2, dimensions, dimensions))
        # the rows about their own mean; and one more, whose square is what the two means' difference adds
        centred = np.empty((size + 1, len(mean)))
        centred[:size] = batch
        batch_mean = centred[:size].mean(axis=0)
        centred[:size] -= batch_mean
        total = count + size
        centred[size] = (batch_mean - mean) * (count * size / total) ** 0.5
        scatter += np.matmul(centred.T, centred, out=product)  # of a matrix and itself: half the work, and symmetric
        mean += (batch_mean - mean) * (size / total)
        count = total
    if count < 2:
        raise ConfigError(f"a Frechet distance needs at least two images, there are {count}: use a larger sample.num")
    scatter /= count - 1
    return Moments(count, mean, scatter)
