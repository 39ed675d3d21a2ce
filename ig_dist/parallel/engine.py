"""What an engine is: all that the trainer knows of DDP, FSDP2 and DeepSpeed, and what their steps share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ig_dist.config.training import OptimizerConfig
from ig_dist.models.dit import DiT
from ig_dist.optim.optimizer import MOMENTS, moment_names, moments_of, set_learning_rate, set_state, steps_of
from ig_dist.parallel.dist import Dist, sum_over_ranks


class Piece(NamedTuple):
    """A range of the flattened elements of a global tensor."""

    shape: tuple[int, ...]  # shape of the global tensor
    start: int  # index of the first element
    data: Tensor  # the elements, of any shape


class StepResult(NamedTuple):
    """Outcome of a step; the tensors stay on the device."""

    grad_norm: Tensor  # () fp32, before clipping
    finite: Tensor  # () fp32: 1 when the step was taken, 0 when it was skipped because the gradient was not finite


class LoadedState(Protocol):
    """What an engine starts from: canonical tensors by group and name, and Adam's step count."""

    @property
    def optimizer_steps(self) -> int:
        """Updates that the optimizer had made."""

    def whole(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group, e.g. ``model``, whole, on this rank's device. COLLECTIVE."""

    def parts(self, group: str, shards: Mapping[str, Piece]) -> dict[str, Tensor]:
        """This rank's parts of a group's tensors, each like the ``data`` of its shard. COLLECTIVE."""


class Engine(ABC):
    """A model spread over the ranks. Methods marked COLLECTIVE must be called by every rank."""

    module: nn.Module  # called for the forward pass
    forward_alone: bool  # whether the forward pass has no collective in it
    held: dict[str, Piece]
    """This rank's fp32 shards of what training changes by canonical name, in stable order; no empty ones.

    The trained weights; and the table of positions, whole on every rank, where it decays.
    """
    copy: tuple[int, int] = (0, 1)
    """Which of how many ranks this is that hold the same shards: they share out who writes them."""
    optimizer: Optimizer
    parameters: dict[str, nn.Parameter]  # what the optimizer works on, each of the shape of its shard

    @abstractmethod
    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of a micro-batch; gradients are reduced over ranks in the last one only."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss`` to those of this step."""
        loss.backward()  # type: ignore[no-untyped-call]

    @abstractmethod
    def step(self, lr: float) -> StepResult:
        """Clip, update unless a gradient is not finite, clear the gradients. COLLECTIVE."""

    def masters(self) -> dict[str, Tensor]:
        """The tensors of ``held``."""
        return {name: piece.data for name, piece in self.held.items()}

    def masters_written(self) -> None:  # noqa: B027  (where forward uses the masters themselves there is nothing to do)
        """Let forward passes see what was written into ``masters()`` from outside. COLLECTIVE."""

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's moments by name (``exp_avg``), each like ``masters()`` for the weights that have it."""
        of = {name: moments_of(self.optimizer, parameter) for name, parameter in self.parameters.items()}
        return {moment: {name: of[name][moment] for name in of if moment in of[name]} for moment in MOMENTS}

    def load_moments(self, state: LoadedState) -> None:
        """Give the optimizer this rank's shards of the moments that a checkpoint has. COLLECTIVE."""
        names = {name: moment_names(self.optimizer, parameter) for name, parameter in self.parameters.items()}
        moments = {
            moment: state.parts(moment, {name: self.held[name] for name in names if moment in names[name]})
            for moment in MOMENTS
        }
        for name, parameter in self.parameters.items():
            own = {moment: moments[moment][name] for moment in names[name]}
            set_state(self.optimizer, parameter, state.optimizer_steps, own)

    def optimizer_steps(self) -> int:
        """Updates that the optimizer has made; skipped steps do not count."""
        return steps_of(self.optimizer)

    def canonical(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Piece]:
        """The pieces that this rank writes of tensors like ``masters()``, as ``group/name``."""
        pieces = {
            f"{group}/{name}": self.held[name]._replace(data=tensor.detach())
            for group, members in groups.items()
            for name, tensor in members.items()
        }
        return {name: pieces[name] for name in shared_out({n: p.data for n, p in pieces.items()}, *self.copy)}


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """Tensors that a rank holds whole."""
    return {name: Piece(tuple(tensor.shape), 0, tensor.detach()) for name, tensor in tensors.items()}


def decayed_buffers(model: DiT, config: OptimizerConfig) -> dict[str, Tensor]:
    """Buffers that the optimizer changes, by name: alike on every rank, which each holds whole."""
    return {"pos_embed": model.pos_embed} if config.decay_pos_embed else {}


def shared_out(tensors: Mapping[str, Tensor], number: int, count: int) -> list[str]:
    """Which of the tensors one of ``count`` writers writes: the largest first, each to whoever has the least so far."""
    load = [0] * count
    mine = []
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].numel(), item[0])):
        writer = load.index(min(load))
        load[writer] += tensor.numel()
        if writer == number:
            mine.append(name)
    return mine


def update(optimizer: Optimizer, grad_norm: Tensor, grad_clip: float | None, lr: float) -> StepResult:
    """Clip, step unless the gradient is not finite, and clear the gradients; arguments as for ``clip_and_gate``."""
    finite = clip_and_gate(optimizer, grad_norm, grad_clip)
    set_learning_rate(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(grad_norm, finite)


def clip_and_gate(optimizer: Optimizer, grad_norm: Tensor, grad_clip: float | None) -> Tensor:
    """Have the optimizer clip in its next step, and make that step void if the norm, () fp32, is not finite (then 0).

    The fused kernels read both on the device, as they do for a ``GradScaler``: they divide the gradient by
    ``grad_scale`` as they go, and where ``found_inf`` is 1 change nothing, Adam's step count included. So neither costs
    a pass over the gradient or a synchronisation. The norm is the same on all ranks, so all ranks decide alike.
    """
    finite = grad_norm.isfinite().float()
    scale = None if grad_clip is None else ((grad_norm + 1e-6) / grad_clip).clamp(min=1.0)
    optimizer.grad_scale, optimizer.found_inf = scale, 1.0 - finite  # type: ignore[attr-defined]
    return finite


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """Norm, () fp32, of tensors as one vector: a pass over them, and one over their norms."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads))))
    return norm


def norm_over_ranks(grads: Sequence[Tensor], dist: Dist, replicate: int = 1) -> Tensor:
    """Norm, () fp32, of a gradient of which every rank holds a part, and ``replicate`` ranks the same. COLLECTIVE.

    Summed over all ranks also where some hold the same: groups that sum by themselves might round otherwise, clip
    otherwise, and drift apart.
    """
    local = total_norm(grads)
    # squares of fp32 norms overflow from 1e19 on: such a step would be skipped that is taken on one rank
    return (sum_over_ranks(local.double().square(), dist) / replicate).sqrt().float()
