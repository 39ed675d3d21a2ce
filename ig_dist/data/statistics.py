"""Per-channel statistics of latents, and what no latent may be: not finite, or of a negative standard deviation."""

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ig_dist.data.index import LatentInfo, Statistics

_HELD, _HELD_BYTES = 64, 2**20  # arrays that are summed at once; few enough for the processor's cache


class ChannelSums:
    """Sums over stored latents, per channel of the model's: of x and of x^2. Of moments, of a posterior draw."""

    def __init__(self, kind: Literal["sample", "moments"], channels: int) -> None:
        self.sums: NDArray[np.float64] = np.zeros((2, channels))
        """Of x and of x^2, (2, C); not finite if a latent is not."""
        self.values = 0  # summed up in each channel
        self.not_finite: list[str] = []  # keys of samples with NaN or infinity
        self.negative_std: list[str] = []  # keys of samples with moments that cannot be
        self._kind = kind
        self._held: list[tuple[str, NDArray[Any]]] = []

    def add(self, key: str, array: NDArray[Any]) -> None:
        """Take a sample's array, (C, H, W), or (2C, H, W): mean and std stacked."""
        self._held.append((key, array))
        if len(self._held) == _HELD or len(self._held) * array.nbytes >= _HELD_BYTES:
            self.close()

    def close(self) -> None:
        """Sum what was only held so far. Call it before reading a result."""
        if not self._held:
            return
        arrays = np.stack([array for _, array in self._held], dtype=np.float64)
        mean, std = np.split(arrays, 2, axis=1) if self._kind == "moments" else (arrays, None)
        squares = mean**2 if std is None else mean**2 + std**2
        with np.errstate(invalid="ignore"):
            sums = np.stack([mean.sum((0, 2, 3)), squares.sum((0, 2, 3))])
        if not np.isfinite(sums).all():
            self.not_finite += [key for key, array in self._held if not np.isfinite(array).all()]
        if std is not None and std.min() < 0:
            self.negative_std += [key for (key, _), values in zip(self._held, std, strict=True) if values.min() < 0]
        self.sums = self.sums + sums
        self.values += mean.size // mean.shape[1]
        self._held = []


def raw_statistics(parts: Iterable[ChannelSums]) -> Statistics:
    """Mean and standard deviation per channel of the latents as stored, over all parts."""
    whole = list(parts)
    return of_sums(np.sum([part.sums for part in whole], axis=0), sum(part.values for part in whole))


def of_sums(sums: NDArray[np.float64], values: int) -> Statistics:
    """The same from sums of x and of x^2, (2, C), over so many values of each channel."""
    mean, square = sums / values
    return Statistics(mean=mean.tolist(), std=np.sqrt(np.maximum(square - mean**2, 0)).tolist())


def as_stored(seen: Statistics, latent: LatentInfo) -> Statistics:
    """The inverse of ``normalised``."""
    mean, std, shift, scale = (np.array(v) for v in (seen.mean, seen.std, latent.shift, latent.scale))
    return Statistics(mean=(mean / scale + shift).tolist(), std=(std / np.abs(scale)).tolist())


def normalised(raw: Statistics, latent: LatentInfo) -> Statistics:
    """Statistics of the latents as the model sees them."""
    mean, std, shift, scale = (np.array(v) for v in (raw.mean, raw.std, latent.shift, latent.scale))
    return Statistics(mean=((mean - shift) * scale).tolist(), std=(std * np.abs(scale)).tolist())
