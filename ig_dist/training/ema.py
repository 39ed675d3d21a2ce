"""Exponential moving averages, fp32, on the engine's own shards of the weights: no communication."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ig_dist.optim.fused import move


class EMA:
    """One average per decay: average <- average + (1 - decay) (weights - average); it starts as a copy of them.

    ``masters_written`` is called after an average was written into the weights, and after they were put back.
    """

    def __init__(
        self, masters: Mapping[str, Tensor], decays: Sequence[float], masters_written: Callable[[], None] = lambda: None
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
        weights, void = list(self._masters.values()), 1 - finite
        for decay, average in self.averages.items():
            move([average[name] for name in self._masters], weights, 1 - decay, void)
