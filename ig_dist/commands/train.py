"""``ig-dist train``."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from ig_dist.commands.options import ConfigPath, Overrides, print_json
from ig_dist.terminal import console, is_first_process, is_main_process, warn


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    force_config: Annotated[
        bool, typer.Option("--force-config", help="Go on under a changed config; what changed is printed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run will take (memory, days); train nothing.")
    ] = False,
    gpus: Annotated[int, typer.Option(min=1, metavar="N", help="With --dry-run: GPUs.")] = 8,
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1.0, metavar="X", help="With --dry-run: share of the peak reached.")
    ] = 0.4,
    peak_tflops: Annotated[
        float, typer.Option(min=0.1, metavar="X", help="With --dry-run: peak of a GPU (H100: 989).")
    ] = 989.0,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON instead of a table.")] = False,
) -> None:
    """Train a model; run the same command again to resume."""
    from ig_dist.config.file import load_config

    loaded = load_config(config, overrides or [])
    if is_main_process():
        for line in loaded.warnings():
            warn(line)
    if dry_run:
        from ig_dist.training.dry_run import dry_run as foretell
        from ig_dist.training.dry_run import print_dry_run

        told = foretell(loaded, gpus=gpus, mfu=mfu, peak_tflops=peak_tflops)
        return print_json(told) if as_json else print_dry_run(told)

    from ig_dist.training.trainer import train as run_training

    run_training(loaded, force=force_config)
    if is_first_process():
        run = shlex.quote(loaded.run.dir)
        for step in (f"ig-dist sample {run} --num 64", f"ig-dist sweep {run}", f"ig-dist report {run}"):
            console.print(f"next: {step}")
