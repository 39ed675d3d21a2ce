"""From a stored latent to the latent that the model sees: posterior draw and normalisation."""

from typing import Literal

import torch
from torch import Tensor

from ig_dist.data.index import LatentInfo
from ig_dist.errors import ConfigError
from ig_dist.rng import Purpose, normal

Posterior = Literal["draw", "stored_sample", "mean"]
Affine = tuple[Tensor, Tensor]  # shift and scale, (1, C, 1, 1) each


def check_latents(info: LatentInfo, posterior: Posterior | None, flip: bool) -> Posterior:
    """What a run takes from the shards: the posterior that was asked for, or the one that they are made for.

    Raises:
        ConfigError: the shards do not hold it.
    """
    held: tuple[Posterior, ...] = ("draw", "mean") if info.kind == "moments" else ("stored_sample",)
    if posterior is not None and posterior not in held:
        what = "mean and std" if info.kind == "moments" else "one latent a sample"
        raise ConfigError(
            f"data.posterior is {posterior}, but the shards store {what}: use data.posterior={held[0]},"
            f" or encode with --store {'sample' if info.kind == 'moments' else 'moments'}"
        )
    if flip and not info.flips:
        raise ConfigError("data.flip is on, but the shards hold no mirrored images: encode with --flips")
    return posterior or held[0]


def model_latents(stored: Tensor, info: LatentInfo, *, posterior: Posterior, seed: int, positions: Tensor) -> Tensor:
    """Draw from the posterior (for stored moments) and normalise.

    Args:
        stored: (B, *info.stored_shape), on the device of the result.
        info: meaning of the stored array.
        posterior: a fresh draw keyed by the position, or the mean, of stored moments.
        seed: seed of the run.
        positions: (B,) int64, positions of the samples in the run.

    Returns:
        (B, C, H, W) fp32, normalised.
    """
    draw = None
    if info.kind == "moments" and posterior == "draw":
        draw = normal(seed, Purpose.POSTERIOR, positions.to(stored.device), info.shape)
    return normalised(stored, draw, info, normalisation(info, stored.device))


def normalisation(info: LatentInfo, device: torch.device) -> Affine:
    """Shift and scale of the channels on a device. It waits for a GPU: for what is done often, make it once."""
    shift, scale = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (info.shift, info.scale))
    return shift, scale


def normalised(stored: Tensor, draw: Tensor | None, info: LatentInfo, affine: Affine) -> Tensor:
    """The latents that the model sees, of a draw from the standard normal; None: of the mean, or of what is stored."""
    latents = stored.float()
    if info.kind == "moments":
        latents, std = latents.chunk(2, dim=1)
        if draw is not None:
            latents = latents + std * draw
    shift, scale = affine
    return (latents - shift) * scale


def tokenizer_latents(latents: Tensor, affine: Affine) -> Tensor:
    """The inverse of the normalisation: what the tokenizer decodes. Same shape, same dtype."""
    shift, scale = affine
    return latents / scale.to(latents.dtype) + shift.to(latents.dtype)
