"""Normalisation of latents as LightningDiT publishes it beside its weights: ``latents_stats.pt``."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ig_dist.errors import ConfigError
from ig_dist.storage.tensor_files import read_safetensors, read_torch_file


class Normalisation(NamedTuple):
    """Per channel: the model sees (latent - shift) * scale."""

    shift: list[float]
    scale: list[float]


def read_latent_stats(path: Path) -> Normalisation:
    """Shift and scale from the mean and standard deviation of latents, (1, C, 1, 1) or (C,) each; no code is run."""
    if not path.is_file():
        raise ConfigError(f"--latent-stats {path}: no such file; it is published beside the weights, or in their data")
    found = read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)
    numbers = []
    for name in ("mean", "std"):
        values = found.get(name) if isinstance(found, dict) else None
        if (
            not isinstance(values, Tensor)
            or not values.is_floating_point()
            or values.numel() != max(values.shape, default=0)
        ):
            raise ConfigError(f"--latent-stats {path} has no {name!r} of one number a channel: give latents_stats.pt")
        numbers.append(values.double().flatten())
    mean, std = numbers
    if len(mean) != len(std) or not torch.isfinite(torch.cat(numbers)).all() or (std <= 0).any():
        raise ConfigError(f"--latent-stats {path}: mean and std must be finite, std above 0, and both of equal length")
    return Normalisation(mean.tolist(), (1 / std).tolist())
