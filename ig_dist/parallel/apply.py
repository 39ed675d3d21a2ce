"""What is done to a built model before an engine takes it: precision, per-block compilation, checkpointing.

Blocks get another ``forward``, below their hooks: FSDP2 and DeepSpeed gather the weights in hooks of the block, which
must neither be compiled nor run again when a block is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ig_dist.arithmetic import compiled
from ig_dist.models.dit import DiT


def apply_precision(
    model: DiT, precision: Literal["fp32", "bf16"], device: torch.device, residual: Literal["fp32", "bf16"] = "fp32"
) -> None:
    """Run the forward under bf16 autocast, the tokens between blocks in fp32 or in bf16; weights stay fp32."""
    if precision == "bf16":
        model.residual = torch.bfloat16 if residual == "bf16" else None
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)  # type: ignore[method-assign]


def apply_compile(model: DiT) -> None:
    """Compile each block on its own: one graph for all of them, and no graph break is tolerated."""
    _replace_forwards(model, compiled)


def apply_activation_checkpointing(model: DiT) -> None:
    """Keep the inputs of each block only; after ``apply_compile``. Nothing in a block is random: no state is kept."""
    _replace_forwards(
        model, lambda forward: partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    )


def _replace_forwards(model: DiT, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    for block in model.blocks:
        assert isinstance(block, nn.Module)
        block.forward = wrap(block.forward)
