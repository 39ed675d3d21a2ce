"""Autoencoders in the layout of latent diffusion (LDM): a checkpoint, its settings and names, statistics beside it.

VA-VAE is published so (``encoder.down.0.block.0.conv1.weight``). The network is that of diffusers' AutoencoderKL under
other names: the decoder's levels are counted from the image instead of the latent, and the projections of an attention
are 1 x 1 convolutions.
"""

import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ig_dist.errors import ConfigError
from ig_dist.storage.tensor_files import read_safetensors, read_torch_file

# Of the training around the autoencoder.
OTHER_PARTS = ("loss.", "discriminator.", "foundation_model.", "linear_proj.")

# diffusers' name -> LDM's, in this order; the decoder's levels come before (ldm_name)
_RENAMES = [
    (r"^encoder\.down_blocks\.", "encoder.down."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
]


def ldm_name(name: str, levels: int) -> str:
    """LDM's name of a diffusers tensor, for an autoencoder of that many levels."""
    name = re.sub(r"^decoder\.up_blocks\.(\d+)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", name)
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def ldm_settings(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Any]:
    """The arguments of diffusers' AutoencoderKL, from the names and shapes of a checkpoint."""

    def channels(name: str) -> tuple[int, int]:
        """Output and input channels of a convolution."""
        if name not in tensors:
            other = " (these are diffusers' names: give the folder)" if any("_blocks." in n for n in tensors) else ""
            raise ConfigError(f"{where} holds no autoencoder in the LDM layout: {name} is missing{other}")
        if tensors[name].ndim != 4:
            raise ConfigError(f"{where}: {name} has shape {tuple(tensors[name].shape)}, it should be a convolution's")
        return tensors[name].shape[0], tensors[name].shape[1]

    levels = next(i for i in count(1) if f"encoder.down.{i}.block.0.conv1.weight" not in tensors)
    layers = next(i for i in count(1) if f"encoder.down.0.block.{i}.conv1.weight" not in tensors)
    widths = [channels(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)]
    down = ["Attn" * (f"encoder.down.{i}.attn.0.q.weight" in tensors) + "DownEncoderBlock2D" for i in range(levels)]
    up = ["Attn" * (f"decoder.up.{i}.attn.0.q.weight" in tensors) + "UpDecoderBlock2D" for i in range(levels)]
    return {
        "in_channels": channels("encoder.conv_in.weight")[1],
        "out_channels": channels("decoder.conv_out.weight")[0],
        "latent_channels": channels("decoder.conv_in.weight")[1],
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "down_block_types": tuple(down),
        "up_block_types": tuple(reversed(up)),
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in tensors,
        "norm_num_groups": 32,
    }


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The autoencoder's tensors in a checkpoint (.safetensors, or PyTorch's format without any object in it)."""
    found: Any = read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no state_dict: save the autoencoder's state_dict in it")
    tensors = {name: tensor for name, tensor in found.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(OTHER_PARTS)}


class Normalisation(NamedTuple):
    """Per channel: the model sees (latent - shift) * scale."""

    shift: list[float]
    scale: list[float]


def read_latent_stats(path: Path) -> Normalisation:
    """Shift and scale from LightningDiT's ``latents_stats.pt``: mean and std, (1, C, 1, 1) or (C,); no code is run."""
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
