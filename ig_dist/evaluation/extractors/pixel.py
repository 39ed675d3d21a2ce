"""The pixels themselves as features, in [-1, 1]: for images so small that their covariance is one."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ig_dist.errors import ConfigError
from ig_dist.evaluation.extractors.extractor import Extractor

MAX_DIMENSIONS = 4096
RULE = "pixels / 127.5 - 1, flattened (H, W, C)"
BATCH_SIZE = 256


def pixel_extractor(device: torch.device) -> Extractor:
    """The extractor that needs no weights; images of any number of channels."""
    sha256 = hashlib.sha256(RULE.encode()).hexdigest()
    return Extractor("pixel", sha256, RULE, {"pool": 0}, BATCH_SIZE, device, _pixels)


def _pixels(images: Tensor) -> dict[str, Tensor]:
    dimensions = images.shape[1:].numel()
    if dimensions > MAX_DIMENSIONS:
        raise ConfigError(
            f"fd_pixel is for images of at most {MAX_DIMENSIONS} values, these have {dimensions}:"
            " encode them smaller (--image-size) to score them"
        )
    divisor = torch.tensor(127.5, device=images.device)  # by a number CUDA multiplies with its inverse: other last bits
    return {"pool": (images.to(torch.float32) / divisor - 1.0).flatten(1)}
