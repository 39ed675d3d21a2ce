"""Optimizers, their state by name, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ig_dist.config.training import OptimizerConfig
from ig_dist.optim.apex_adam import apex_adam
from ig_dist.optim.fused import FusedAdamW
from ig_dist.optim.muon import Muon, orthogonalise_each

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(
    parameters: Sequence[nn.Parameter],
    config: OptimizerConfig,
    shapes: Sequence[Sequence[int]] | None = None,
    orthogonalise: Callable[[Sequence[Tensor]], None] = orthogonalise_each,
    decayed: Sequence[Tensor] = (),
) -> Optimizer:
    """AdamW with the fused kernels of torch, on CPU and GPU alike, or of apex; or ``Muon``, as the last three say."""
    if config.implementation == "apex":
        return apex_adam(parameters, config)
    if config.kind == "muon":
        adam = (config.lr, config.betas, config.eps)
        return Muon(parameters, *adam, config.weight_decay, shapes, orthogonalise, decayed)
    return FusedAdamW(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def moment_names(optimizer: Optimizer, parameter: Tensor) -> tuple[str, ...]:
    """What the optimizer keeps of a parameter: Adam both moments, Muon of a matrix its momentum, as ``exp_avg``."""
    return MOMENTS[:1] if isinstance(optimizer, Muon) and parameter.ndim >= 2 else MOMENTS


def moments_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The moments of a parameter; zeros before the first step."""
    state = optimizer.state.get(parameter)
    names = moment_names(optimizer, parameter)
    return {name: state[name] if state else torch.zeros_like(parameter) for name in names}


def steps_of(optimizer: Optimizer) -> int:
    """Updates that the optimizer has made."""
    group = optimizer.param_groups[0]
    if "step" in group:  # apex counts for the group, and takes a void step back when the next one is made
        return int(group["step"] - optimizer._dummy_overflow_buf)  # type: ignore[attr-defined]
    return int(next((state["step"] for state in optimizer.state.values()), 0))


def set_state(optimizer: Optimizer, parameter: Tensor, steps: int, moments: Mapping[str, Tensor]) -> None:
    """Give the optimizer the state of a parameter, of its shape and on its device."""
    optimizer.state[parameter] = dict(moments)
    if isinstance(optimizer, AdamW | Muon):
        optimizer.state[parameter]["step"] = torch.tensor(float(steps), device=parameter.device)
    else:
        optimizer.param_groups[0]["step"] = torch.tensor([steps], dtype=torch.int, device=parameter.device)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Of the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of the step that follows ``step`` finished ones: linear warm-up, then constant or cosine."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
