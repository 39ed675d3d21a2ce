"""Tokenizers: images to latents and back.

A tokenizer is a pair of pure functions and a description. ``pixel`` is the identity up to scale: small images are
their own latents.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ig_dist.errors import ConfigError


@dataclass(frozen=True)
class Tokenizer:
    """Images (B, H, W, 3 or 1) uint8 <-> latents (B, C, h, w) fp32."""

    name: str
    sha256: str
    """Hash of weights and settings."""
    downsample: int
    """Pixels of the image side per latent position; image sizes are multiples of it."""
    image_channels: int | None
    """Channels of the images that it takes; None: any number."""
    stochastic: bool
    """Whether ``encode`` gives a posterior: mean and std stacked, (B, 2C, h, w)."""
    scale: float | None
    """The model sees latent * scale; None: (latent - mean) / std by the statistics of the data set, per channel."""
    uint8_rule: str
    """How decoded values become uint8; part of every score's protocol."""
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    """Latents to uint8 images (B, H, W, channels)."""


def _pixel_encode(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _pixel_decode(latents: Tensor) -> Tensor:
    values = (127.5 * (latents.double() + 1.0)).round().clamp(0, 255)
    return values.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


_PIXEL_RULE = "clip(round(127.5 (x + 1)), 0, 255) of [-1, 1]"
_TOKENIZERS = {
    "pixel": Tokenizer(
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
}


def get_tokenizer(
    name: str, *, device: torch.device | str = "cpu", precision: Literal["fp32", "bf16", "fp16"] = "fp32"
) -> Tokenizer:
    """A tokenizer by name.

    Args:
        name: which one.
        device: where its weights lie; it takes and gives tensors there.
        precision: arithmetic of its networks.

    Raises:
        ConfigError: unknown name.
    """
    if name not in _TOKENIZERS:
        near = difflib.get_close_matches(name, _TOKENIZERS, n=1, cutoff=0.0)
        raise ConfigError(f"unknown tokenizer {name!r}; did you mean {near[0]!r}?")
    return _TOKENIZERS[name]
