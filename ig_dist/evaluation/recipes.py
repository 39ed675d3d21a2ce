"""Published ways of sampling, by model size: the ``--preset`` of ``ig-dist sample``."""

from __future__ import annotations

from typing import Any

from ig_dist.config.model import ModelConfig
from ig_dist.errors import ConfigError, nearest
from ig_dist.models.presets import PRESETS

_SIT: dict[str, Any] = {"solver": "euler_maruyama", "steps": 250}
_LIGHTNING: dict[str, Any] = {"solver": "heun", "steps": 124, "time_shift": 1 / 0.3, "state": "fp32"}  # 125 points

# name -> size -> (sampler, guidance): arXiv 2512.24176; of SiT without an auxiliary head arXiv 2401.08740
_RECIPES: dict[str, dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]] = {
    "paper": {
        "SiT-B/2": (_SIT, [{"kind": "ig", "scale": 1.9}]),
        "SiT-XL/2": (_SIT, [{"kind": "ig", "scale": 1.4}, {"kind": "cfg", "scale": 1.35, "interval": [0.0, 0.7]}]),
        "LightningDiT-XL/1": (
            _LIGHTNING,
            [{"kind": "ig", "scale": 1.4}, {"kind": "cfg", "scale": 1.45, "interval": [0.0, 0.81]}],
        ),
        "SiT-XL/2 without an auxiliary head": (
            {**_SIT, "state": "fp32"},
            [{"kind": "cfg", "scale": 1.5, "channels": 3}],
        ),
    },
    "paper-ig": {
        "SiT-B/2": (_SIT, [{"kind": "ig", "scale": 1.9}]),
        "SiT-XL/2": (_SIT, [{"kind": "ig", "scale": 1.4}]),
        "LightningDiT-XL/1": (_LIGHTNING, [{"kind": "ig", "scale": 1.7}]),
    },
}
_RECIPES["fast"] = _RECIPES["paper"]


def recipe(name: str, model: ModelConfig) -> list[str]:
    """The overrides that sample a model as published: 50,000 images of random classes.

    Model and autoencoder compute in TF32, and the state has the type, as in the published samplers (on GPUs: they set
    it for products, and PyTorch does for convolutions). "fast" is "paper" with the model in bf16.
    """
    if name not in _RECIPES:
        near = nearest(name, _RECIPES)[0]
        raise ConfigError(f"--preset {name!r}: did you mean {near!r}? There are {', '.join(_RECIPES)}")
    size = _size(model)
    if size not in _RECIPES[name]:
        raise ConfigError(
            f"--preset {name}: there is no published recipe for {size}, only for {', '.join(_RECIPES[name])}:"
            " give solver, steps and scales instead"
        )
    sampler, guidance = _RECIPES[name][size]
    plain = {"time_shift": 1.0, "correct_last_step": True, "state": "fp64"}  # a run's config may have others
    arithmetic = {"precision": "bf16" if name == "fast" else "tf32", "decode_precision": "tf32"}
    settings = {"num": 50_000, "labels": "random", **arithmetic, **plain, **sampler}
    return [*(f"sample.{key}={value}" for key, value in settings.items()), f"guidance={guidance}"]


def _size(model: ModelConfig) -> str:
    layers = ("depth", "hidden_size", "num_heads", "patch_size", "norm", "mlp", "rope")
    for name, preset in PRESETS.items():
        if all(getattr(model, layer) == getattr(preset, layer) for layer in layers):
            return name if model.aux_depth is not None else f"{name} without an auxiliary head"
    return f"{model.depth} blocks of width {model.hidden_size}"
