"""Exponential moving averages, fp32, on the engine's own shards of the weights: no communication."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**26  # bounds the temporary to 256 MB


class EMA:
    """One average per decay: average <- average + (1 - decay) (weights - average).

    Args:
        masters: the weights, this rank's shards; the averages start as copies of them.
        decays: the decays.
        masters_written: called after an average was written into the weights, and after they were put back.
    """

    def __init__(
        self,
        masters: Mapping[str, Tensor],
        decays: Sequence[float],
        masters_written: Callable[[], None] = lambda: None,
    ) -> None:
        self._masters = dict(masters)
        self._masters_written = masters_written
        self.averages = {decay: {name: w.clone() for name, w in masters.items()} for decay in decays}

    def load(self, decay: float, shards: Mapping[str, Tensor]) -> None:
        """Replace one average."""
        for name, tensor in shards.items():
            self.averages[decay][name].copy_(tensor)

    @contextmanager
    def swapped_in(self, decay: float) -> Iterator[None]:
        """The weights are those of an average inside the context, and bitwise their own again after it."""
        self._swap(decay)
        try:
            yield
        finally:
            self._swap(decay)

    @torch.no_grad()
    def _swap(self, decay: float) -> None:
        for name, average in self.averages[decay].items():
            kept = self._masters[name].clone()
            self._masters[name].copy_(average)
            average.copy_(kept)
        self._masters_written()

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Move every average towards the weights; not at all when ``finite`` (a device scalar) is 0."""
        if finite.device.type == "cpu":  # a pass over all tensors for each operation would leave the cache each time
            for decay, average in self.averages.items():
                for name, weight in self._masters.items():
                    average[name].lerp_(weight, float(finite) * (1 - decay))
            return
        for chunk in _chunks(self._masters):
            weights = [self._masters[name] for name in chunk]
            for decay, average in self.averages.items():
                averages = [average[name] for name in chunk]
                difference = torch._foreach_sub(weights, averages)
                torch._foreach_mul_(difference, finite * (1 - decay))
                torch._foreach_add_(averages, difference)


def _chunks(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    chunks: list[list[str]] = []
    elements = CHUNK_ELEMENTS
    for name, tensor in tensors.items():
        if elements + tensor.numel() > CHUNK_ELEMENTS:
            chunks.append([])
            elements = 0
        chunks[-1].append(name)
        elements += tensor.numel()
    return chunks
