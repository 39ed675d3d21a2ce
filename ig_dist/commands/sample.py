"""``ig-dist sample``."""

import shlex
from typing import Annotated

import typer

from ig_dist.commands.evaluate import evaluate
from ig_dist.commands.options import AutoInterval, Ema, Overrides, Raw, Run, Weak, flag, interval, option
from ig_dist.errors import ConfigError
from ig_dist.terminal import console, is_main_process


def sample(
    run: Run,
    overrides: Overrides = None,
    preset: Annotated[
        str | None, option("NAME", "As published: paper, paper-ig (no CFG), or fast (bf16). Other options come on top.")
    ] = None,
    num: Annotated[int | None, option("N", "Number of images (sample.num).", min=1)] = None,
    classes: Annotated[
        str | None, option("CLASS,...", "Only these classes, e.g. 207,golden_retriever (sample.classes).", "--class")
    ] = None,
    labels: Annotated[str | None, option("KIND", "balanced or random (sample.labels).")] = None,
    seed: Annotated[int | None, option("SEED", "Image i depends on (seed, i) only (sample.seed).", min=0)] = None,
    solver: Annotated[str | None, option("KIND", "euler, heun, euler_maruyama or dopri5 (sample.solver).")] = None,
    steps: Annotated[int | None, option("N", "Steps of the solver (sample.steps).", min=1)] = None,
    ig_scale: Annotated[float | None, option("X", "Internal Guidance scale; 1: off.")] = None,
    cfg_scale: Annotated[float | None, option("X", "Classifier-free guidance scale; 1: off.")] = None,
    ig_interval: Annotated[str | None, option("LOW,HIGH", "Times LOW,HIGH at which IG is on (t = 1 is noise).")] = None,
    cfg_interval: Annotated[str | None, option("LOW,HIGH", "Times LOW,HIGH at which CFG is on.")] = None,
    weak: Weak = None,
    auto_scale: Annotated[float | None, option("X", "Scale of autoguidance by --weak; 1: off.")] = None,
    auto_interval: AutoInterval = None,
    ema: Ema = None,
    raw: Raw = False,
    png: Annotated[int | None, option("N", "Write the first so many as PNG files too (sample.png).", min=0)] = None,
    drop_images: Annotated[
        bool, flag("--drop-images", "With --evaluate: keep features only (sample.keep_images=false).")
    ] = False,
    score: Annotated[bool, flag("--evaluate", "Score them too, as `ig-dist evaluate` does.")] = False,
    score_if_fit: Annotated[bool, typer.Option("--evaluate-if-fit", hidden=True)] = False,
    out: Annotated[str | None, option("FOLDER", "Folder of these samples. Default: one of RUN/samples.")] = None,
) -> None:
    """Make images: an npz, and a picture of some of them. Any number of processes may share the work."""
    from ig_dist.evaluation.evaluate import refuse_unfit
    from ig_dist.export import find_run, find_weights
    from ig_dist.plans.asking import sample_config
    from ig_dist.sampling.run import check_places, sample_run

    config = sample_config(
        find_run(run)[0],
        overrides or (),
        preset=preset,
        num=num,
        classes=None if classes is None else [name.strip() for name in classes.split(",")],
        labels=labels,
        seed=seed,
        solver=solver,
        steps=steps,
        weak=weak,
        png=png,
        keep_images=False if drop_images else None,
        ig_scale=ig_scale,
        cfg_scale=cfg_scale,
        auto_scale=auto_scale,
        ig_interval=interval("--ig-interval", ig_interval),
        cfg_interval=interval("--cfg-interval", cfg_interval),
        auto_interval=interval("--auto-interval", auto_interval),
    )
    check_places(config, out)
    export = find_weights(run, ema=ema, raw=raw, config=config).export
    metrics = config.evaluate.metrics if score or score_if_fit else []
    if metrics:
        try:
            refuse_unfit(config, export, metrics)
        except ConfigError as error:
            if not score_if_fit:
                raise
            console.print(f"no scores: {error}")
            metrics = []
    samples, _ = sample_run(config, export, metrics, out=out)
    if metrics:
        evaluate(samples.url)
    elif is_main_process():
        console.print(f"next: ig-dist evaluate {shlex.quote(samples.url)}")
