"""Torch's fused optimizers: AdamW, and updates of many tensors in one pass over memory by SGD.

A flag on the device says where a step is void, and nobody reads it but the kernel: it costs no synchronisation and no
pass of its own, and nothing that is not finite reaches what is updated. Foreach kernels take no flag.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer


class FusedAdamW(AdamW):
    """Torch's, whose first step imports the compiler, for a second, to say that it be not compiled: nobody does."""

    step = torch.no_grad()(getattr(Adam.step, "__wrapped__", Adam.step))


for _method in (Optimizer.add_param_group, Optimizer.zero_grad):
    if _plain := getattr(_method, "__wrapped__", None):
        _plain.__dict__.setdefault("__dynamo_disable", _plain)


_fused_sgd = partial(
    torch._fused_sgd_,
    momentum_buffer_list=[],
    momentum=0.0,
    dampening=0.0,
    nesterov=False,
    maximize=False,
    is_first_step=False,
)


def move(
    tensors: Sequence[Tensor],
    targets: Sequence[Tensor],
    weight: float,
    void: Tensor | None,
    divisor: Tensor | None = None,
) -> None:
    """Do tensors <- tensors + weight (targets / divisor - tensors), in place, all fp32; ``targets`` keep the quotient.

    ``void`` and ``divisor`` are () fp32 on the device: where ``void`` is 1 nothing is done; without a divisor
    ``targets`` are only read.
    """
    _fused_sgd(list(tensors), list(targets), lr=-weight, weight_decay=-1.0, grad_scale=divisor, found_inf=void)


def subtract(tensors: Sequence[Tensor], steps: Sequence[Tensor], times: float, void: Tensor | None) -> None:
    """Do tensors <- tensors - times steps, in place; ``void`` as for ``move``."""
    _fused_sgd(list(tensors), list(steps), lr=times, weight_decay=0.0, found_inf=void)
