"""What ``import ig_dist`` offers: the verbs of the command line as functions with the same defaults, and ``load``."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch

from ig_dist.config import Config
from ig_dist.config.file import config_from_tree, flat, load_config
from ig_dist.errors import ConfigError
from ig_dist.evaluation.sweep import grid_points, sweep_run
from ig_dist.export import find_run, find_weights
from ig_dist.pipeline import Pipeline
from ig_dist.plans.asking import Asked, Interval, sample_config
from ig_dist.sampling.run import check_places, sample_run
from ig_dist.terminal import is_main_process, warn
from ig_dist.this_process import this_device


def load(
    source: str | Path,
    *,
    ema: float | None = None,
    raw: bool = False,
    device: str | torch.device | None = None,
    precision: str | None = None,
    tokenizer: str = "",
) -> Pipeline:
    """Weights ready to sample.

    Args:
        source: a run (its newest checkpoint), RUN@STEP, the folder of a checkpoint or of an export, or one that
            `ig-dist convert` made.
        ema: decay of the average; None: the first of ``ema.decays``.
        raw: the weights themselves instead of an average.
        device: of the model; None: the GPU, or the CPU where there is none.
        precision: arithmetic of the model, fp32 or bf16; None: as the run's config says.
        tokenizer: folder, file or name of the tokenizer where it is not found under the name in the index.

    Raises:
        ConfigError: no weights there, or the tokenizer is not found.
        DataError: they are damaged.
    """
    given = {"precision": precision, "tokenizer": tokenizer or None}
    overrides = [f"sample.{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    weights = find_weights(source, ema=ema, raw=raw, overrides=overrides)
    return Pipeline(weights, this_device() if device is None else torch.device(device))


def train(config: str | Path | Mapping[str, Any] | Config, *overrides: str, force: bool = False, **groups: Any) -> Path:
    """Train a model as `ig-dist train` does; call it again to resume.

    Args:
        config: a YAML file, the name of a config that comes with ig_dist ("digits"), groups as a dict, or a ``Config``.
        overrides: ``"a.b=c"``.
        force: go on under a changed config.
        groups: config groups by name, on top: ``train={"steps": 100}, run={"dir": "runs/short"}``.

    Returns:
        The run directory, for ``load``.

    Raises:
        ConfigError: the config does not fit the data, the run directory or the number of processes.
        DataError: damaged data, or no whole checkpoint.
        NonFiniteError: too many non-finite steps in a row.
        Preempted: asked to stop by a signal, after a save.
    """
    from ig_dist.training.trainer import train as run_training

    options = [*overrides, *(f"{key}={json.dumps(value, default=str)}" for key, value in flat(groups).items())]
    if isinstance(config, str | Path):
        loaded = load_config(config, options)
    else:
        tree = config.model_dump(mode="json") if isinstance(config, Config) else dict(config)
        loaded = config_from_tree(tree, "config", options)
        if not loaded.run.dir:
            raise ConfigError('run.dir is empty: say where the run goes, e.g. run={"dir": "runs/mine"}')
    if is_main_process():
        for line in loaded.warnings():
            warn(line)
    run_training(loaded, force=force, lives_on=True)
    return Path(loaded.run.dir)


class AskedOfFiles(Asked, total=False):
    """And which classes the images are of."""

    labels: str | None
    classes: Sequence[int | str] | None


def sample(
    source: str | Path,
    *overrides: str,
    ema: float | None = None,
    raw: bool = False,
    out: str | Path | None = None,
    **asked: Unpack[AskedOfFiles],
) -> str:
    """Make the images of a plan into files, as `ig-dist sample` does.

    Args:
        source: as of ``load``.
        overrides: ``"a.b=c"``.
        ema: decay of the average; None: the first of ``ema.decays``.
        raw: the weights themselves instead of an average.
        out: folder of these samples; None: one of the run's.
        asked: options of a ``Pipeline``'s call, but for ``labels="balanced"`` or "random" and ``classes``, by number,
            name or words: image i has ``classes[i % len(classes)]``.

    Returns:
        The folder of the samples, for ``evaluate``.

    Raises:
        ConfigError: what is asked for does not fit.
        DataError: a file cannot be written.
    """
    config = sample_config(find_run(source)[0], overrides, **asked)
    folder = None if out is None else str(out)
    check_places(config, folder)
    samples, _ = sample_run(config, find_weights(source, ema=ema, raw=raw, config=config).export, out=folder)
    return samples.url


def sweep(
    source: str | Path,
    *overrides: str,
    ig_scale: Sequence[float] = (1.0, 1.2, 1.4, 1.7, 2.0, 2.5),
    cfg_scale: Sequence[float] = (1.0,),
    auto_scale: Sequence[float] = (1.0,),
    ig_interval: Sequence[Interval | None] = (None,),
    cfg_interval: Sequence[Interval | None] = (None,),
    auto_interval: Interval | None = None,
    ema: Sequence[float | None] = (None,),
    checkpoint: Sequence[int | None] = (None,),
    seeds: int = 1,
    target: str | None = None,
    halving: bool = False,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Score a grid of guidance scales with common noise, as `ig-dist sweep` does.

    Args:
        source: a run.
        overrides: ``"a.b=c"``.
        ig_scale: scales of Internal Guidance.
        cfg_scale: of classifier-free guidance.
        auto_scale: of autoguidance by ``sample.weak_model``.
        ig_interval: times (low, high) at which IG is on; None: as the config says.
        cfg_interval: the same of CFG.
        auto_interval: times at which autoguidance is on.
        ema: decays of averages.
        checkpoint: steps of checkpoints.
        seeds: of each point.
        target: the score to search for; None: the first of ``evaluate.metrics``.
        halving: all points on few images, the better half on twice as many, and so on.
        out: folder of samples, scores and sweep; None: the run.

    Returns:
        What sweep.json holds: "rows", one for each point, and the protocol.

    Raises:
        ConfigError: what is asked for does not fit.
    """
    from ig_dist.report.sweeps import save_sweep  # slow to import

    config = find_run(source, overrides)[0]
    scales = {"ig_scale": ig_scale, "cfg_scale": cfg_scale, "auto_scale": auto_scale}
    grid = grid_points(**scales, ig_interval=ig_interval, cfg_interval=cfg_interval, ema=ema, step=checkpoint)
    found = sweep_run(
        config,
        grid,
        source=source,
        auto_interval=auto_interval,
        seeds=seeds,
        target=target,
        halving=halving,
        out=out,
    )
    if found:  # empty where another process has the result
        save_sweep(found, Path(out or config.run.dir, "sweeps", found["name"]))
    return found
