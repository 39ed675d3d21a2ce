"""What is done to a built model before an engine takes it: precision and per-block compilation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ig_dist.models.dit import DiT


def apply_precision(model: DiT, precision: Literal["fp32", "bf16"], device: torch.device) -> None:
    """Run the forward under bf16 autocast; weights stay fp32."""
    if precision == "bf16":
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)  # type: ignore[method-assign]


def apply_compile(model: DiT) -> None:
    """Compile each block on its own: one graph for all of them, and no graph break is tolerated."""
    for block in model.blocks:
        assert isinstance(block, nn.Module)
        block.compile(fullgraph=True)
