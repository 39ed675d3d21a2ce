"""From what is asked of sampling, on the command line or in Python, to the config of a plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ig_dist.config import Config
from ig_dist.config_file import apply_overrides, config_from_tree, with_guidance
from ig_dist.errors import ConfigError
from ig_dist.evaluation.recipes import recipe

Interval = tuple[float, float]


def sample_config(
    config: Config,
    overrides: Sequence[str] = (),
    *,
    preset: str | None = None,
    ig_scale: float | None = None,
    cfg_scale: float | None = None,
    auto_scale: float | None = None,
    ig_interval: Interval | None = None,
    cfg_interval: Interval | None = None,
    auto_interval: Interval | None = None,
    **sample: Any,
) -> Config:
    """A copy of a run's config that says how is sampled; what is None stays as it is.

    Args:
        config: of the weights, see ``find_weights``.
        overrides: ``a.b=c``; they come on top of the preset, and the other options on top of them.
        preset: a published way of sampling, see ``recipe``.
        ig_scale: Internal Guidance; 1: off.
        cfg_scale: classifier-free guidance; 1: off.
        auto_scale: autoguidance by ``weak_model``; 1: off.
        ig_interval: times (low, high) at which IG is on; t = 1 is noise.
        cfg_interval: the same of CFG.
        auto_interval: the same of autoguidance.
        sample: keys of the ``sample`` group: num, labels, seed, solver, steps, weak_model, ...

    Raises:
        ConfigError: what is asked for does not fit.
    """
    published = [] if preset is None else recipe(preset, config.model)
    options = [f"sample.{key}={json.dumps(value)}" for key, value in sample.items() if value is not None]
    tree = apply_overrides(config.model_dump(mode="json"), [*published, *overrides, *options])
    asked = with_guidance(
        config_from_tree(tree, source="sample"),
        ig_scale=ig_scale,
        cfg_scale=cfg_scale,
        auto_scale=auto_scale,
        ig_interval=ig_interval,
        cfg_interval=cfg_interval,
        auto_interval=auto_interval,
    )
    weak = sample.get("weak_model")
    if weak is not None and all(term.kind != "auto" for term in asked.guidance):
        raise ConfigError(f"--weak {weak} guides nothing without a scale: give --auto-scale too, e.g. 2 (1 is off)")
    return asked
