"""The engine protocol: all that the trainer knows of DDP and its kin."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch import Tensor, nn


class Piece(NamedTuple):
    """A range of the flattened elements of a global tensor."""

    shape: tuple[int, ...]
    """Shape of the global tensor."""
    start: int
    """Index of the first element."""
    data: Tensor
    """The elements, of any shape."""


class StepResult(NamedTuple):
    """Outcome of a step; the tensors stay on the device."""

    grad_norm: Tensor
    """() fp32, before clipping."""
    finite: Tensor
    """() fp32: 1 when the step was taken, 0 when it was skipped because the gradient was not finite."""


class LoadedState(Protocol):
    """What an engine starts from: canonical tensors by group and name, and Adam's step count."""

    @property
    def optimizer_steps(self) -> int:
        """Updates that the optimizer had made."""
        ...

    def whole(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group, e.g. ``model``, whole, on this rank's device. COLLECTIVE."""
        ...

    def parts(self, group: str, shards: Mapping[str, Piece]) -> dict[str, Tensor]:
        """This rank's parts of a group's tensors, each like the ``data`` of its shard. COLLECTIVE."""
        ...


class Engine(Protocol):
    """A model spread over the ranks. Methods marked COLLECTIVE must be called by every rank."""

    module: nn.Module
    """Called for the forward pass."""
    forward_alone: bool
    """Whether the forward pass has no collective in it."""

    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of a micro-batch; gradients are reduced over ranks in the last one only."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss`` to those of this step."""
        ...

    def step(self, lr: float) -> StepResult:
        """Clip, update unless a gradient is not finite, clear the gradients. COLLECTIVE."""
        ...

    def masters(self) -> dict[str, Tensor]:
        """This rank's fp32 shards of what training changes by canonical name, in stable order; no empty ones.

        The trained weights; and the table of positions, whole on every rank, where it decays.
        """
        ...

    def masters_written(self) -> None:
        """Let forward passes see what was written into ``masters()`` from outside. COLLECTIVE."""
        ...

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's moments by name (``exp_avg``), each like ``masters()`` for the weights that have it."""
        ...

    def optimizer_steps(self) -> int:
        """Updates that the optimizer has made; skipped steps do not count."""
        ...

    def parts(self, state: LoadedState, group: str) -> dict[str, Tensor]:
        """This rank's parts of a group whose tensors are named and shaped like the weights. COLLECTIVE."""
        ...

    def canonical(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Piece]:
        """The pieces that this rank writes of tensors like ``masters()``, as ``group/name``. COLLECTIVE."""
        ...
