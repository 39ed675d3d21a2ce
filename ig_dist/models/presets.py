"""The published model sizes, and what a forward pass of a model costs."""

from typing import Literal, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from ig_dist.models.dit import DiT, DiTConfig
from ig_dist.models.layers import MlpKind, NormKind


class Preset(NamedTuple):
    """The part of a `DiTConfig` that a name such as "SiT-XL/2" stands for."""

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    norm: NormKind = "layernorm"
    mlp: MlpKind = "gelu"
    rope: bool = False
    aux_init: Literal["zero", "xavier"] = "zero"


_SIT = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
_LIGHTNING = {size: _SIT[size] for size in ("B", "L", "XL")} | {"1p0B": (24, 1536, 24), "1p6B": (28, 1792, 28)}

PRESETS: dict[str, Preset] = {
    **{f"SiT-{size}/{patch}": Preset(*shape, patch) for size, shape in _SIT.items() for patch in (2, 4, 8)},
    **{
        f"LightningDiT-{size}/{patch}": Preset(*shape, patch, "rmsnorm", "swiglu", rope=True, aux_init="xavier")
        for size, shape in _LIGHTNING.items()
        for patch in (1, 2)
    },
}


def forward_flops(config: DiTConfig) -> int:
    """Count the FLOPs of one forward of one image: 2 per multiply-accumulate of matrix products.

    Counted on the meta device, so nothing is allocated or computed.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        latents = torch.empty(1, config.in_channels, config.input_size, config.input_size)
        DiT(config)(latents, torch.empty(1), torch.empty(1, dtype=torch.int64))
    return int(counter.get_total_flops())
