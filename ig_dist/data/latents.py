"""From a stored latent to the latent that the model sees: posterior draw and normalisation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ig_dist.data.index import LatentInfo
from ig_dist.rng import Purpose, normal


def model_latents(
    stored: Tensor, info: LatentInfo, *, posterior: Literal["draw", "mean"], seed: int, positions: Tensor
) -> Tensor:
    """Draw from the posterior (for stored moments) and normalise.

    Args:
        stored: (B, *info.stored_shape), on the device of the result.
        info: meaning of the stored array.
        posterior: a fresh draw keyed by the position, or the mean. Without meaning for stored samples.
        seed: seed of the run.
        positions: (B,) int64, positions of the samples in the run.

    Returns:
        (B, C, H, W) fp32, normalised.
    """
    latents = stored.float()
    if info.kind == "moments":
        mean, std = latents.chunk(2, dim=1)
        latents = mean
        if posterior == "draw":
            latents = mean + std * normal(seed, Purpose.POSTERIOR, positions.to(stored.device), info.shape)
    shift, scale = (torch.tensor(v, device=stored.device).view(1, -1, 1, 1) for v in (info.shift, info.scale))
    return (latents - shift) * scale


def tokenizer_latents(latents: Tensor, info: LatentInfo) -> Tensor:
    """The inverse of the normalisation: what the tokenizer decodes. Same shape, same dtype."""
    shift, scale = (torch.tensor(v, device=latents.device).view(1, -1, 1, 1) for v in (info.shift, info.scale))
    return latents / scale.to(latents.dtype) + shift.to(latents.dtype)
