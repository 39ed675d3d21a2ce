"""From what is asked of sampling, on the command line or in Python, to the config of a plan; published ways of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from ig_dist.arithmetic import Precision
from ig_dist.config import Config
from ig_dist.config.file import config_from_tree, with_guidance
from ig_dist.config.model import ModelConfig
from ig_dist.errors import ConfigError, nearest
from ig_dist.models.presets import PRESETS

Interval = tuple[float, float]
_GUIDANCE = [f"{kind}_{what}" for kind in ("ig", "cfg", "auto") for what in ("scale", "interval")]

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


class Asked(TypedDict, total=False):
    """What sampling may be asked for. What is left out or None is as the run's config says."""

    num: int | None
    seed: int | None
    solver: str | None
    steps: int | None
    preset: str | None
    ig_scale: float | None
    cfg_scale: float | None
    auto_scale: float | None
    ig_interval: Interval | None
    cfg_interval: Interval | None
    auto_interval: Interval | None
    weak: str | Path | None
    time_shift: float | Literal["latent_dimension"] | None
    correct_last_step: bool | None
    rtol: float | None
    atol: float | None
    precision: Precision | None
    state: Literal["fp64", "fp32"] | None
    decode_precision: Precision | None
    compile: bool | Literal["auto"] | None
    batch_size: int | None
    unit_size: int | None


def sample_config(
    config: Config,
    overrides: Sequence[str] = (),
    *,
    preset: str | None = None,
    weak: str | Path | None = None,
    **asked: Any,
) -> Config:
    """A copy of a run's config that says how is sampled; what is None stays as it is.

    ``overrides`` (``a.b=c``) come on top of the ``preset``, a published way of sampling, and the other options on top
    of them: scales and intervals as of ``with_guidance``, keys of the ``sample`` group, ``weak`` for ``weak_model``.

    Raises:
        ConfigError: what is asked for does not fit.
    """
    published = [] if preset is None else recipe(preset, config.model)
    guidance = {key: asked.pop(key, None) for key in _GUIDANCE}
    sample = {**asked, "weak_model": None if weak is None else str(weak)}
    options = [f"sample.{key}={json.dumps(value)}" for key, value in sample.items() if value is not None]
    whole = config_from_tree(config.model_dump(mode="json"), "sample", [*published, *overrides, *options])
    told = with_guidance(whole, **guidance)
    if weak is not None and all(term.kind != "auto" for term in told.guidance):
        raise ConfigError(f"--weak {weak} guides nothing without a scale: give --auto-scale too, e.g. 2 (1 is off)")
    return told


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
    plain = {"time_shift": 1.0, "correct_last_step": True, "rtol": 1e-3, "atol": 1e-6, "state": "fp64"}  # of any run
    arithmetic = {"precision": "bf16" if name == "fast" else "tf32", "decode_precision": "tf32"}
    settings = {"num": 50_000, "labels": "random", **arithmetic, **plain, **sampler}
    return [*(f"sample.{key}={value}" for key, value in settings.items()), f"guidance={guidance}"]


def _size(model: ModelConfig) -> str:
    layers = ("depth", "hidden_size", "num_heads", "patch_size", "norm", "mlp", "rope")
    for name, preset in PRESETS.items():
        if all(getattr(model, layer) == getattr(preset, layer) for layer in layers):
            return name if model.aux_depth is not None else f"{name} without an auxiliary head"
    return f"{model.depth} blocks of width {model.hidden_size}"
