"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn
from torch.optim import AdamW

from ig_dist.config import OptimizerConfig


def build_optimizer(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> AdamW:
    """AdamW with the fused kernels, on CPU and GPU alike. The learning rate is set at every step."""
    return AdamW(
        parameters,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of the step that follows ``step`` finished ones: linear warm-up, then constant or cosine."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
