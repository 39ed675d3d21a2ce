"""What a step is under every engine: the norm, clipping, and the gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ig_dist.optim.optimizer import set_learning_rate
from ig_dist.parallel.dist import Dist, sum_over_ranks
from ig_dist.parallel.engine import StepResult


def update(optimizer: Optimizer, grad_norm: Tensor, grad_clip: float | None, lr: float) -> StepResult:
    """Clip, step unless the gradient is not finite, and clear the gradients; arguments as for ``clip_and_gate``."""
    finite = clip_and_gate(optimizer, grad_norm, grad_clip)
    set_learning_rate(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(grad_norm, finite)


def clip_and_gate(optimizer: Optimizer, grad_norm: Tensor, grad_clip: float | None) -> Tensor:
    """Have the optimizer clip in its next step, and make that step void if the norm, () fp32, is not finite.

    The fused kernels read both on the device, as they do for a ``GradScaler``: they divide the gradient by
    ``grad_scale`` as they go, and where ``found_inf`` is 1 change nothing, Adam's step count included. So neither costs
    a pass over the gradient or a synchronisation. The norm is the same on all ranks, so all ranks decide alike.

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
