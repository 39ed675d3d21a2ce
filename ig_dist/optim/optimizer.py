"""Optimizers, their state by name, and the learning-rate schedule."""

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ig_dist.config.training import OptimizerConfig
from ig_dist.errors import ConfigError
from ig_dist.optim.fused import FusedAdamW
from ig_dist.optim.muon import Muon, orthogonalise_each

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(
    parameters: Sequence[nn.Parameter],
    config: OptimizerConfig,
    shapes: Sequence[Sequence[int]] | None = None,
    orthogonalise: Callable[[Sequence[Tensor]], None] = orthogonalise_each,
    decayed: Sequence[Tensor] = (),
) -> Optimizer:
    """AdamW with the fused kernels of torch, on CPU and GPU alike, or of apex; or ``Muon``, as the last three say."""
    if config.implementation == "apex":
        return apex_adam(parameters, config)
    if config.kind == "muon":
        adam = (config.lr, config.betas, config.eps)
        return Muon(parameters, *adam, config.weight_decay, shapes, orthogonalise, decayed)
    return FusedAdamW(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def moment_names(optimizer: Optimizer, parameter: Tensor) -> tuple[str, ...]:
    """What the optimizer keeps of a parameter: Adam both moments, Muon of a matrix its momentum, as ``exp_avg``."""
    return MOMENTS[:1] if isinstance(optimizer, Muon) and parameter.ndim >= 2 else MOMENTS


def moments_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The moments of a parameter; zeros before the first step."""
    state = optimizer.state.get(parameter)
    names = moment_names(optimizer, parameter)
    return {name: state[name] if state else torch.zeros_like(parameter) for name in names}


def steps_of(optimizer: Optimizer) -> int:
    """Updates that the optimizer has made."""
    group = optimizer.param_groups[0]
    if "step" in group:  # apex counts for the group, and takes a void step back when the next one is made
        return int(group["step"] - optimizer._dummy_overflow_buf)  # type: ignore[attr-defined]
    return int(next((state["step"] for state in optimizer.state.values()), 0))


def set_state(optimizer: Optimizer, parameter: Tensor, steps: int, moments: Mapping[str, Tensor]) -> None:
    """Give the optimizer the state of a parameter, of its shape and on its device."""
    optimizer.state[parameter] = dict(moments)
    if isinstance(optimizer, AdamW | Muon):
        optimizer.state[parameter]["step"] = torch.tensor(float(steps), device=parameter.device)
    else:
        optimizer.param_groups[0]["step"] = torch.tensor([steps], dtype=torch.int, device=parameter.device)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Of the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of the step that follows ``step`` finished ones: linear warm-up, then constant or cosine."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


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
