"""What a tokenizer is: a pair of functions and a description. ``PIXEL``: small images are their own latents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "tf32", "bf16", "fp16"]  # tf32 is of GPUs, see `ig_dist.arithmetic`, and fp32 elsewhere


@dataclass(frozen=True)
class Tokenizer:
    """Images (B, H, W, channels) uint8 <-> latents (B, C, h, w). Results lie on the device of what was given."""

    name: str
    sha256: str  # hash of weights and settings, whatever file they came in and whatever they are run on
    downsample: int  # side of the image over the side of its latent
    image_channels: int | None  # None: any
    stochastic: bool  # whether `encode` gives mean and std of a posterior
    scale: float | None
    """The model sees latent * scale; None: (latent - mean) / std by the data set's statistics per channel."""
    uint8_rule: str  # how decoded values become uint8; part of every score's protocol
    encode: Callable[[Tensor], Tensor]  # to fp32 latents, or to mean and std stacked, (B, 2C, h, w), if stochastic
    decode: Callable[[Tensor], Tensor]
    """Latents of any float type, without the model's normalisation, to uint8 images (B, H, W, channels)."""
    latent_channels: int | None = None  # None: those of the image

    def latent_shape(self, image_size: int, image_channels: int) -> tuple[int, int, int]:
        """Shape of the latent that a model sees of such images, (C, h, w)."""
        side = image_size // self.downsample
        return self.latent_channels or image_channels, side, side


_PIXEL_RULE = "clip(round(127.5 (x + 1)), 0, 255) of [-1, 1]"


def _pixel_encode(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)  # in place: large batches are slow to allocate


def _pixel_decode(latents: Tensor) -> Tensor:
    values = (127.5 * (latents.double() + 1.0)).round().clamp(0, 255)
    return values.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


PIXEL = Tokenizer(
    name="pixel",
    sha256=hashlib.sha256(f"pixel: x / 127.5 - 1; {_PIXEL_RULE}".encode()).hexdigest(),
    downsample=1,
    image_channels=None,
    stochastic=False,
    scale=1.0,
    uint8_rule=_PIXEL_RULE,
    encode=_pixel_encode,
    decode=_pixel_decode,
)
