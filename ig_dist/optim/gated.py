"""Updates of many tensors in one pass over memory, void where a flag on the device says so: torch's fused SGD.

Nobody reads the flag but the kernel: it costs no synchronisation and no pass of its own, and where a step is void
nothing that is not finite reaches what is updated. Foreach kernels take no flag.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


def move(tensors: Tensors, targets: Tensors, weight: float, void: Tensor | None, divisor: Tensor | None = None) -> None:
    """Do tensors <- tensors + weight (targets / divisor - tensors), in place; ``targets`` keep the quotient.

    Args:
        tensors: fp32, what moves.
        targets: fp32, where to.
        weight: how far.
        void: () fp32 on the device: where it is 1 nothing is done; None: something is.
        divisor: () fp32 on the device; None: 1, and ``targets`` are only read.
    """
    _fused(tensors, targets, -weight, -1.0, void, divisor)


def subtract(tensors: Tensors, steps: Tensors, times: float, void: Tensor | None) -> None:
    """Do tensors <- tensors - times steps, in place; ``void`` as for ``move``."""
    _fused(tensors, steps, times, 0.0, void, None)


def _fused(
    tensors: Tensors, steps: Tensors, lr: float, decay: float, void: Tensor | None, divisor: Tensor | None
) -> None:
    torch._fused_sgd_(
        list(tensors),
        list(steps),
        [],
        weight_decay=decay,
        momentum=0.0,
        lr=lr,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        grad_scale=divisor,
        found_inf=void,
    )
