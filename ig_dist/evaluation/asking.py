"""From what is asked of sampling, on the command line or in Python, to the config of a plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from ig_dist.arithmetic import Precision
from ig_dist.config import Config
from ig_dist.config_file import apply_overrides, config_from_tree, with_guidance
from ig_dist.errors import ConfigError
from ig_dist.evaluation.recipes import recipe

Interval = tuple[float, float]
_GUIDANCE = [f"{kind}_{what}" for kind in ("ig", "cfg", "auto") for what in ("scale", "interval")]


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

    Args:
        config: of the weights, see ``find_weights``.
        overrides: ``a.b=c``; they come on top of the preset, and the other options on top of them.
        preset: a published way of sampling, see ``recipe``.
        weak: the second model of autoguidance, ``sample.weak_model``.
        asked: scales and intervals, see ``with_guidance``, and other keys of the ``sample`` group.

    Raises:
        ConfigError: what is asked for does not fit.
    """
    published = [] if preset is None else recipe(preset, config.model)
    guidance = {key: asked.pop(key, None) for key in _GUIDANCE}
    sample = {**asked, "weak_model": None if weak is None else str(weak)}
    options = [f"sample.{key}={json.dumps(value)}" for key, value in sample.items() if value is not None]
    tree = apply_overrides(config.model_dump(mode="json"), [*published, *overrides, *options])
    told = with_guidance(config_from_tree(tree, source="sample"), **guidance)
    if weak is not None and all(term.kind != "auto" for term in told.guidance):
        raise ConfigError(f"--weak {weak} guides nothing without a scale: give --auto-scale too, e.g. 2 (1 is off)")
    return told
