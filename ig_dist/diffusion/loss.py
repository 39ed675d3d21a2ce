"""The training loss of Internal Guidance (arXiv 2512.24176)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ig_dist.models.dit import DiTOutput


class Losses(NamedTuple):
    """Loss of every sample, (B,) float32 each: total = final + aux_weight * aux."""

    total: Tensor
    final: Tensor
    aux: Tensor


def ig_loss(output: DiTOutput, velocity: Tensor, aux_weight: float) -> Losses:
    """Return the squared velocity errors of both heads, averaged over C, H, W in float32.

    Args:
        output: the model's predictions, (B, C, H, W); any float dtype.
        velocity: (B, C, H, W) target.
        aux_weight: lambda, the weight of the auxiliary head; without that head `aux` is zero.
    """
    final = _mean_square(output.velocity, velocity)
    if output.aux_velocity is None:
        return Losses(final, final, torch.zeros_like(final))
    aux = _mean_square(output.aux_velocity, velocity)
    return Losses(final + aux_weight * aux, final, aux)


def _mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
