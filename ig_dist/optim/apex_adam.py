"""NVIDIA apex's FusedAdam as an optimizer like torch's fused ones: a step is left out on the device."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ig_dist.config.training import OptimizerConfig
from ig_dist.errors import ConfigError


def check_apex() -> None:
    """Raise ConfigError unless NVIDIA's apex can be used here. Imports nothing of it."""
    spec = importlib.util.find_spec("apex")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    if spec is None:
        problem = "it is not installed"
    elif not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        problem = "the installed package called apex is another one, as PyPI has it: pip uninstall apex"
    elif importlib.util.find_spec("amp_C") is None:
        problem = "it was built without its CUDA extensions"
    elif not torch.cuda.is_available():
        problem = "there is no GPU here"
    else:
        return
    raise ConfigError(
        "optimizer.implementation=apex needs NVIDIA's apex, built from the source at https://github.com/NVIDIA/apex"
        f" with its C++ and CUDA extensions; {problem}; or use optimizer.implementation=fused"
    )


def apex_adam(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> Optimizer:
    """FusedAdam in the form that keeps learning rate and step count on the device and can leave out a step there."""
    adam: Optimizer = importlib.import_module("apex.optimizers").FusedAdam(
        parameters,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        adam_w_mode=True,
        capturable=True,
    )
    adam.step = partial(adam.step, grad_scaler=_Gate())  # type: ignore[assignment, method-assign]
    return adam


class _Gate:
    """What FusedAdam asks of a torch.amp.GradScaler: whether a gradient is not finite, and what to divide it by."""

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[torch.device, Tensor]:
        found_inf: Tensor = optimizer.found_inf  # type: ignore[attr-defined]
        scale: Tensor | None = optimizer.grad_scale  # type: ignore[attr-defined]
        self._scale = torch.ones_like(found_inf) if scale is None else scale
        return {found_inf.device: found_inf}

    def _get_scale_async(self) -> Tensor:
        return self._scale
