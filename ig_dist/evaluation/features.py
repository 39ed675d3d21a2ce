"""Feature extractors, and the moments of features, streamed in float64."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ig_dist.errors import ConfigError

MAX_PIXEL_DIMENSIONS = 4096
_PIXEL_RULE = "pixels / 127.5 - 1, flattened (H, W, C)"


@dataclass(frozen=True)
class Extractor:
    """Images (B, H, W, C) uint8 to features (B, D) float64."""

    name: str
    sha256: str
    extract: Callable[[NDArray[np.uint8]], NDArray[np.float64]]


def pixel_extractor() -> Extractor:
    """The pixels themselves, in [-1, 1]: for images so small that their covariance is one."""

    def extract(images: NDArray[np.uint8]) -> NDArray[np.float64]:
        dimensions = int(np.prod(images.shape[1:]))
        if dimensions > MAX_PIXEL_DIMENSIONS:
            raise ConfigError(
                f"fd_pixel is for images of at most {MAX_PIXEL_DIMENSIONS} values, these have {dimensions}:"
                " encode them smaller (--image-size) to score them"
            )
        return images.reshape(len(images), -1) / 127.5 - 1.0

    return Extractor("pixel", hashlib.sha256(_PIXEL_RULE.encode()).hexdigest(), extract)


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


def streamed_moments(batches: Iterable[NDArray[Any]], extractor: Extractor) -> Moments:
    """Moments of the features of all images, batch by batch (Chan, Golub and LeVeque 1979: no cancellation).

    Raises:
        ConfigError: fewer than two images.
    """
    count, mean, scatter = 0, np.zeros(()), np.zeros(())
    for images in batches:
        features = extractor.extract(images)
        batch_mean = features.mean(axis=0)
        centred = features - batch_mean
        delta = batch_mean - mean
        total = count + len(features)
        scatter = scatter + centred.T @ centred + np.outer(delta, delta) * (count * len(features) / total)
        mean = mean + delta * (len(features) / total)
        count = total
    if count < 2:
        raise ConfigError(f"a Frechet distance needs at least two images, there are {count}: use a larger sample.num")
    return Moments(count, mean, scatter / (count - 1))
