"""The training losses of Internal Guidance (arXiv 2512.24176) and LightningDiT (arXiv 2501.01423)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ig_dist.models.dit import DiTOutput


class Losses(NamedTuple):
    """Loss of every sample, (B,) float32 each: total = final + aux_weight * aux + cosine_weight * cosine."""

    total: Tensor
    final: Tensor
    aux: Tensor
    cosine: Tensor


def ig_loss(
    output: DiTOutput,
    velocity: Tensor,
    aux_weight: float,
    *,
    cosine_weight: float = 0.0,
    final_target: Tensor | None = None,
) -> Losses:
    """Return the squared velocity errors of both heads, averaged over C, H, W in float32, and the cosine loss.

    The target is `velocity`, for the final head `final_target` where there is one, see `accelerated_target`. Without
    an auxiliary head `aux` is zero; with a `cosine_weight` of 0 `cosine` is not computed, and zero.
    """
    target = velocity if final_target is None else final_target
    final = _mean_square(output.velocity, target)
    nothing = torch.zeros_like(final)
    aux = nothing if output.aux_velocity is None else _mean_square(output.aux_velocity, velocity)
    cosine = _cosine(output.velocity, target) if cosine_weight else nothing
    return Losses(final + aux_weight * aux + cosine_weight * cosine, final, aux, cosine)


def head_difference(output: DiTOutput) -> Tensor:
    """Return v_final - v_aux, (B, C, H, W) float32, cut off from the gradient; ValueError where there is no v_aux."""
    if output.aux_velocity is None:
        raise ValueError("the difference of the heads needs an auxiliary head; train with model.aux_depth")
    return output.velocity.detach().float() - output.aux_velocity.detach().float()


def accelerated_target(velocity: Tensor, difference: Tensor, weight: Tensor) -> Tensor:
    """Return v + w sg(v_final - v_aux), the final head's target of arXiv 2512.24176, section 6.

    The difference is that of the same forward, or of an average of the weights; weight (B,) has the w of each sample.
    """
    return velocity + weight.to(velocity.dtype).reshape(-1, *[1] * (velocity.dim() - 1)) * difference.detach()


def _mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


def _cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - cos over channels, averaged over H, W."""
    similarity = torch.nn.functional.cosine_similarity(prediction.float(), target.float(), dim=1)
    return (1.0 - similarity).flatten(1).mean(dim=1)
