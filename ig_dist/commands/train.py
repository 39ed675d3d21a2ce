"""``ig-dist train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ig_dist.commands.options import Overrides
from ig_dist.terminal import is_main_process, warn


def train(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG", help="YAML file, or the name of one that comes with ig_dist, e.g. digits."),
    ],
    overrides: Overrides = None,
    force_config: Annotated[
        bool, typer.Option("--force-config", help="Go on under a changed config; what changed is printed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run will take (memory, days); train nothing.")
    ] = False,
    gpus: Annotated[int, typer.Option(min=1, help="With --dry-run: GPUs.")] = 8,
    mfu: Annotated[float, typer.Option(min=0.01, max=1.0, help="With --dry-run: share of the peak reached.")] = 0.4,
    peak_tflops: Annotated[float, typer.Option(min=0.1, help="With --dry-run: peak of a GPU (H100: 989).")] = 989.0,
) -> None:
    """Train a model; run the same command again to resume."""
    from ig_dist.config_file import load_config

    loaded = load_config(config, overrides or [])
    if is_main_process():
        for line in loaded.warnings():
            warn(line)
    if dry_run:
        from ig_dist.dry_run import dry_run as tell

        return tell(loaded, gpus=gpus, mfu=mfu, peak_tflops=peak_tflops)

    from ig_dist.training.trainer import train as run_training

    run_training(loaded, force=force_config)
