"""AdamW of torch without what its first step imports."""

from __future__ import annotations

import torch
from torch.optim import Adam, AdamW, Optimizer


class FusedAdamW(AdamW):
    """Torch's, which imports the compiler, for a second, to say that it be not compiled: nobody does."""

    step = torch.no_grad()(getattr(Adam.step, "__wrapped__", Adam.step))


for _method in (Optimizer.add_param_group, Optimizer.zero_grad):
    if _plain := getattr(_method, "__wrapped__", None):
        _plain.__dict__.setdefault("__dynamo_disable", _plain)
