"""What the engines share: the update with its gate, and the naming and cutting of shards that are flat ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ig_dist.config.training import OptimizerConfig
from ig_dist.models.dit import DiT
from ig_dist.optim.optimizer import MOMENTS, moment_names, moments_of, set_learning_rate, set_state
from ig_dist.parallel.dist import Dist, sum_over_ranks
from ig_dist.parallel.engine import LoadedState, Piece, StepResult

Shards = Mapping[str, Piece]
"""This rank's part of each weight by canonical name; weights of which it holds nothing are left out."""

Parameters = Mapping[str, nn.Parameter]
"""What the optimizer works on, each of the shape of its shard."""


def decayed_buffers(model: DiT, config: OptimizerConfig) -> dict[str, Tensor]:
    """Buffers that the optimizer changes, by name: alike on every rank, which each holds whole."""
    return {"pos_embed": model.pos_embed} if config.decay_pos_embed else {}


def update(optimizer: Optimizer, grad_norm: Tensor, grad_clip: float | None, lr: float) -> StepResult:
    """Clip, step unless the gradient is not finite, and clear the gradients; arguments as for ``clip_and_gate``."""
    finite = clip_and_gate(optimizer, grad_norm, grad_clip)
    set_learning_rate(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(grad_norm, finite)


def clip_and_gate(optimizer: Optimizer, grad_norm: Tensor, grad_clip: float | None) -> Tensor:
    """Have the optimizer clip in its next step, and make that step void if the norm is not finite.

    The fused kernels read both on the device, as they do for a ``GradScaler``: they divide the gradient by
    ``grad_scale`` as they go, and where ``found_inf`` is 1 change nothing, Adam's step count included. So neither costs
    a pass over the gradient or a synchronisation. The norm is the same on all ranks, so all ranks decide alike.

    Args:
        optimizer: with its gradients set.
        grad_norm: () fp32, of the whole gradient, the same on every rank.
        grad_clip: bound on the norm.

    Returns:
        () fp32: 1 when the norm is finite, else 0.
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


def load_moments(optimizer: Optimizer, parameters: Parameters, shards: Shards, state: LoadedState | None) -> None:
    """Give the optimizer the moments that a checkpoint has of this rank's shards, if it has any. COLLECTIVE."""
    if state is None or not state.optimizer_steps:
        return
    names = {name: moment_names(optimizer, parameter) for name, parameter in parameters.items()}
    moments = {
        moment: state.parts(moment, {name: shards[name] for name in parameters if moment in names[name]})
        for moment in MOMENTS
    }
    for name, parameter in parameters.items():
        own = {moment: moments[moment][name] for moment in names[name]}
        set_state(optimizer, parameter, state.optimizer_steps, own)


def moments_by_name(optimizer: Optimizer, parameters: Parameters) -> dict[str, dict[str, Tensor]]:
    """The moments by their name and the parameter's."""
    moments: dict[str, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        for moment, tensor in moments_of(optimizer, parameter).items():
            moments.setdefault(moment, {})[name] = tensor
    return moments


def to_pieces(groups: Mapping[str, Mapping[str, Tensor]], shards: Shards) -> dict[str, Piece]:
    """What this rank writes of tensors that are sharded like the weights: all that it holds."""
    return {
        f"{group}/{name}": Piece(shards[name].shape, shards[name].start, tensor.detach())
        for group, members in groups.items()
        for name, tensor in members.items()
    }


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
