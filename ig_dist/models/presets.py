"""The published model sizes, and what a forward pass of a model costs."""

from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from ig_dist.models.dit import DiT, DiTConfig


class Preset(NamedTuple):
    """The part of a `DiTConfig` that a name such as "SiT-XL/2" stands for."""

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int


_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}

PRESETS: dict[str, Preset] = {
    f"SiT-{size}/{patch_size}": Preset(*shape, patch_size) for size, shape in _SIZES.items() for patch_size in (2, 4, 8)
}


def forward_flops(config: DiTConfig) -> int:
    """Count the FLOPs of one forward of one image: 2 per multiply-accumulate of matrix products.

    Counted on the meta device, so nothing is allocated or computed.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        latents = torch.empty(1, config.in_channels, config.input_size, config.input_size)
        DiT(config)(latents, torch.empty(1), torch.empty(1, dtype=torch.int64))
    return int(counter.get_total_flops())
