"""``ig-dist sweep``."""

from typing import Annotated

from ig_dist.commands.options import (
    AsJson,
    AutoInterval,
    Metrics,
    Overrides,
    Run,
    Weak,
    flag,
    interval,
    numbers,
    option,
    print_json,
)
from ig_dist.errors import ConfigError
from ig_dist.terminal import console


def sweep(
    run: Run,
    overrides: Overrides = None,
    ig_scale: Annotated[str, option("X,...", "IG scales, comma separated.")] = "1.0,1.2,1.4,1.7,2.0,2.5",
    cfg_scale: Annotated[str, option("X,...", "CFG scales, comma separated.")] = "1.0",
    ig_interval: Annotated[
        list[str] | None, option("LOW,HIGH", "Times LOW,HIGH at which IG is on; give it again for more.")
    ] = None,
    cfg_interval: Annotated[
        list[str] | None, option("LOW,HIGH", "Times LOW,HIGH at which CFG is on; give it again for more.")
    ] = None,
    weak: Weak = None,
    auto_scale: Annotated[str, option("X,...", "Scales of autoguidance by --weak, comma separated.")] = "1.0",
    auto_interval: AutoInterval = None,
    emas: Annotated[str | None, option("DECAY,...", "Decays of averages, comma separated.", "--ema")] = None,
    steps: Annotated[str | None, option("STEP,...", "Steps of checkpoints, comma separated.", "--checkpoint")] = None,
    metrics: Metrics = None,
    target: Annotated[str | None, option("NAME", "The score to search for. Default: the first one.")] = None,
    halving: Annotated[
        bool, flag("--halving", "All points on few images, the better half on twice as many, and so on.")
    ] = False,
    seeds: Annotated[int, option("N", "Seeds per point; scores become means with deviations.", min=1)] = 1,
    out: Annotated[str | None, option("FOLDER", "Folder of samples, scores and sweep. Default: the run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score a grid of guidance scales with common noise. Result: a table, sweep.json, a plot and a picture grid."""
    from ig_dist import api
    from ig_dist.evaluation.tables import print_sweep
    from ig_dist.export import find_run

    console.stderr = as_json  # stdout is the JSON alone
    given = {"sample.weak_model": weak, "evaluate.metrics": metrics and f"[{metrics}]"}
    options = [*(overrides or []), *(f"{key}={value}" for key, value in given.items() if value)]
    auto_scales = numbers("--auto-scale", auto_scale)
    config = find_run(run, options)[0]
    guided = any(term.kind == "auto" and term.scale != 1 for term in config.guidance)
    if weak is not None and not guided and all(scale == 1 for scale in auto_scales):
        raise ConfigError(
            f"--weak {weak} guides nothing without a scale: give --auto-scale too, e.g. 1,1.5,2 (1 is off)"
        )
    result = api.sweep(
        run,
        *options,
        ig_scale=numbers("--ig-scale", ig_scale),
        cfg_scale=numbers("--cfg-scale", cfg_scale),
        auto_scale=auto_scales,
        ig_interval=[interval("--ig-interval", text) for text in ig_interval or []] or [None],
        cfg_interval=[interval("--cfg-interval", text) for text in cfg_interval or []] or [None],
        auto_interval=interval("--auto-interval", auto_interval),
        ema=[None] if emas is None else numbers("--ema", emas),
        checkpoint=[None] if steps is None else [int(step) for step in numbers("--checkpoint", steps)],
        seeds=seeds,
        target=target,
        halving=halving,
        out=out,
    )
    if not result:  # not the first of several processes
        return
    if as_json:
        return print_json(result)
    print_sweep(result)
    console.print(f"written: {out or config.run.dir}/sweeps/{result['name']}/sweep.json, sweep.png and grid.png")
