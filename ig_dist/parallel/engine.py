"""The engine protocol: all that the trainer knows of DDP and its kin, and how an engine is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ig_dist.checkpoint import Piece
from ig_dist.config import Config
from ig_dist.models.dit import DiT
from ig_dist.parallel.apply import apply_compile, apply_precision
from ig_dist.parallel.dist import Dist


class StepResult(NamedTuple):
    """Outcome of a step; the tensors stay on the device."""

    grad_norm: Tensor
    """() fp32, before clipping."""
    finite: Tensor
    """() fp32: 1 when the step was taken, 0 when it was skipped because the gradient was not finite."""


class LoadedState(Protocol):
    """What an engine starts from: canonical tensors by name, and Adam's step count."""

    @property
    def optimizer_steps(self) -> int:
        """Updates that the optimizer had made."""
        ...

    def read(self, name: str) -> Tensor:
        """A whole canonical tensor, e.g. ``model/blocks.0.attn.qkv.weight`` or ``exp_avg/...``, on the CPU."""
        ...


class Engine(Protocol):
    """A model spread over the ranks. Methods marked COLLECTIVE must be called by every rank."""

    module: nn.Module
    """Called for the forward pass."""

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
        """This rank's fp32 shards of the trained weights by canonical name, in stable order."""
        ...

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's moments by name (``exp_avg``), each like ``masters()``."""
        ...

    def optimizer_steps(self) -> int:
        """Updates that the optimizer has made; skipped steps do not count."""
        ...

    def shard(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """This rank's shards of whole tensors that are named and shaped like the weights."""
        ...

    def canonical(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Piece]:
        """The pieces that this rank writes of tensors like ``masters()``, as ``group/name``. COLLECTIVE."""
        ...


def build_engine(model: DiT, config: Config, state: LoadedState | None, dist: Dist) -> Engine:
    """Apply precision and compilation, then hand the model to the configured engine. COLLECTIVE.

    Args:
        model: initialised on the CPU, the same on every rank.
        config: the run's config.
        state: checkpoint to start from; it goes in here because not every engine can take it later.
        dist: this process.
    """
    from ig_dist.parallel.ddp import DDPEngine

    if state is not None:
        model.load_state_dict({name: state.read(f"model/{name}") for name in model.state_dict()})
    model.to(dist.device)
    apply_precision(model, config.train.precision, dist.device)
    if config.train.compile:
        apply_compile(model)
    engine = DDPEngine(model, config.optimizer, state, dist)
    micro = config.train.global_batch_size // dist.world_size // config.train.accumulation
    warm_up(engine, model, micro, dist.device)
    return engine


def warm_up(engine: Engine, model: DiT, batch_size: int, device: torch.device) -> None:
    """Two forward and backward passes on zeros, gradients discarded.

    DDP orders its buckets anew after the first backward pass, and with three or more ranks the order decides how
    sums round: without this, the first step after a restart would differ from the same step without one. Compilation
    happens here too, before the first batch is waited for.
    """
    size, channels = model.config.input_size, model.config.in_channels
    x = torch.zeros(batch_size, channels, size, size, device=device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
    for _ in range(2):
        with engine.microbatch(last=True):
            output = engine.module(x, torch.zeros(batch_size, device=device), labels)
            engine.backward(
                sum((v.float().sum() for v in output if v is not None), start=torch.zeros((), device=device))
            )
        for parameter in model.parameters():
            parameter.grad = None
