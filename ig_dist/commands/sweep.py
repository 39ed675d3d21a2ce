"""``ig-dist sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ig_dist.commands.options import AsJson, Overrides, Run, Weak, interval, numbers, print_json
from ig_dist.errors import ConfigError
from ig_dist.terminal import console


def sweep(
    run: Run,
    overrides: Overrides = None,
    ig_scale: Annotated[
        str, typer.Option(metavar="X,...", help="IG scales, comma separated.")
    ] = "1.0,1.2,1.4,1.7,2.0,2.5",
    cfg_scale: Annotated[str, typer.Option(metavar="X,...", help="CFG scales, comma separated.")] = "1.0",
    ig_interval: Annotated[
        list[str] | None,
        typer.Option(metavar="LOW,HIGH", help="Times LOW,HIGH at which IG is on; give it again for more."),
    ] = None,
    cfg_interval: Annotated[
        list[str] | None,
        typer.Option(metavar="LOW,HIGH", help="Times LOW,HIGH at which CFG is on; give it again for more."),
    ] = None,
    weak: Weak = None,
    auto_scale: Annotated[
        str, typer.Option(metavar="X,...", help="Scales of autoguidance by --weak, comma separated.")
    ] = "1.0",
    auto_interval: Annotated[
        str | None, typer.Option(metavar="LOW,HIGH", help="Times LOW,HIGH at which autoguidance is on.")
    ] = None,
    emas: Annotated[
        str | None, typer.Option("--ema", metavar="DECAY,...", help="Decays of averages, comma separated.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option("--checkpoint", metavar="STEP,...", help="Steps of checkpoints, comma separated.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Scores, comma separated (evaluate.metrics).")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="NAME", help="The score to search for. Default: the first one.")
    ] = None,
    halving: Annotated[
        bool, typer.Option("--halving", help="All points on few images, the better half on twice as many, and so on.")
    ] = False,
    seeds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Seeds per point; scores become means with deviations.")
    ] = 1,
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder of samples, scores and sweep. Default: the run.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a grid of guidance scales with common noise: table, sweep.json, plot and picture grid."""
    from ig_dist.evaluation.sweep import Axes, sweep_run
    from ig_dist.evaluation.tables import print_sweep
    from ig_dist.export import find_run, find_weights
    from ig_dist.report.plots import save_sweep

    console.stderr = as_json  # stdout is the JSON alone
    given = {"sample.weak_model": weak, "evaluate.metrics": metrics and f"[{metrics}]"}
    axes = Axes(
        numbers("--ig-scale", ig_scale),
        numbers("--cfg-scale", cfg_scale),
        numbers("--auto-scale", auto_scale),
        [interval("--ig-interval", text) for text in ig_interval or []] or [None],
        [interval("--cfg-interval", text) for text in cfg_interval or []] or [None],
        [None] if emas is None else numbers("--ema", emas),
        [None] if steps is None else [int(step) for step in numbers("--checkpoint", steps)],
    )
    options = [*(overrides or []), *(f"{key}={value}" for key, value in given.items() if value)]
    config, _, _ = find_run(run, options)
    guided = any(term.kind == "auto" and term.scale != 1 for term in config.guidance)
    if weak is not None and not guided and all(scale == 1 for scale in axes.auto_scales):
        raise ConfigError(
            f"--weak {weak} guides nothing without a scale: give --auto-scale too, e.g. 1,1.5,2 (1 is off)"
        )
    result = sweep_run(
        config,
        axes,
        auto_interval=interval("--auto-interval", auto_interval),
        seeds=seeds,
        target=target,
        halving=halving,
        weights=lambda ema, step: find_weights(run, ema=ema, step=step, config=config).export,
        out=out,
    )
    if not result:  # not the first of several processes
        return
    folder = Path(out or config.run.dir, "sweeps", result["name"])
    save_sweep(result, folder)
    if as_json:
        return print_json(result)
    print_sweep(result)
    console.print(f"written: {folder}/sweep.json, sweep.png and grid.png")
