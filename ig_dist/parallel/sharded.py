"""What the engines share: the gate of a step, and the naming and cutting of shards that are flat ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ig_dist.checkpoint import Piece
from ig_dist.parallel.dist import Dist, sum_over_ranks
from ig_dist.parallel.engine import LoadedState

MOMENTS = ("exp_avg", "exp_avg_sq")

Shards = Mapping[str, Piece]
"""This rank's part of each weight by canonical name; weights of which it holds nothing are left out."""


def clip_and_gate(optimizer: AdamW, grad_norm: Tensor, grad_clip: float | None) -> Tensor:
    """Clip what the optimizer is about to use, and make its next step void if the norm is not finite.

    The fused kernels read ``found_inf`` on the device and then change nothing, Adam's step count included: the gate
    costs no synchronisation. The norm is the same on all ranks, so all ranks decide alike.

    Args:
        optimizer: with its gradients set.
        grad_norm: () fp32, of the whole gradient, the same on every rank.
        grad_clip: bound on the norm.

    Returns:
        () fp32: 1 when the norm is finite, else 0.
    """
    finite = grad_norm.isfinite().float()
    if grad_clip is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grads_with_norm_(parameters, grad_clip, grad_norm)
    optimizer.found_inf = 1.0 - finite  # type: ignore[attr-defined]
    return finite


def norm_over_ranks(grads: Iterable[Tensor], dist: Dist) -> Tensor:
    """Norm, () fp32, of a gradient of which every rank holds another part. COLLECTIVE."""
    local = nn.utils.get_total_norm(list(grads)).to(dist.device)
    # squares of fp32 norms overflow from 1e19 on: such a step would be skipped that is taken on one rank
    return sum_over_ranks(local.double().square(), dist).sqrt().float()


def moments_of(optimizer: AdamW, parameter: Tensor) -> dict[str, Tensor]:
    """Adam's moments of a parameter; zeros before the first step."""
    state = optimizer.state.get(parameter)
    return {moment: state[moment] if state else torch.zeros_like(parameter) for moment in MOMENTS}


def steps_of(optimizer: AdamW) -> int:
    """Updates that Adam has made."""
    return int(next((state["step"] for state in optimizer.state.values()), 0))


def set_state(optimizer: AdamW, parameter: Tensor, steps: int, moments: Mapping[str, Tensor]) -> None:
    """Give Adam the state of a parameter, of its shape and on its device."""
    step = torch.tensor(float(steps), device=parameter.device)
    optimizer.state[parameter] = {"step": step, **moments}


def cut(read: Callable[[str], Tensor], shards: Shards, prefix: str = "") -> dict[str, Tensor]:
    """This rank's parts of whole tensors, in memory of their own.

    Args:
        read: gives a whole tensor by ``prefix`` and canonical name.
        shards: what is this rank's.
        prefix: before the name.
    """
    parts = {}
    for name, (_, start, data) in shards.items():
        part = read(prefix + name).view(-1)[start : start + data.numel()]
        parts[name] = part.to(data.device, copy=True).view_as(data)
    return parts


def read_moments(state: LoadedState, shards: Shards) -> dict[str, dict[str, Tensor]]:
    """This rank's parts of the moments, by name of the moment and of the weight."""
    return {moment: cut(state.read, shards, f"{moment}/") for moment in MOMENTS}


def to_pieces(groups: Mapping[str, Mapping[str, Tensor]], shards: Shards) -> dict[str, Piece]:
    """What this rank writes of tensors that are sharded like the weights: all that it holds."""
    return {
        f"{group}/{name}": Piece(shards[name].shape, shards[name].start, tensor.detach())
        for group, members in groups.items()
        for name, tensor in members.items()
    }
