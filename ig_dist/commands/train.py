"""``ig-dist train``."""

import shlex
from typing import Annotated

from ig_dist.commands.options import ConfigPath, Overrides, flag, option, print_json
from ig_dist.terminal import console, is_first_process, is_main_process, warn


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    force_config: Annotated[
        bool, flag("--force-config", "Go on under a changed config; what changed is printed.")
    ] = False,
    dry_run: Annotated[bool, flag("--dry-run", "Say what the run will take (memory, days); train nothing.")] = False,
    gpus: Annotated[int, option("N", "With --dry-run: GPUs.", min=1)] = 8,
    mfu: Annotated[float, option("X", "With --dry-run: share of the peak reached.", min=0.01, max=1.0)] = 0.4,
    peak_tflops: Annotated[float, option("X", "With --dry-run: peak of a GPU (H100: 989).", min=0.1)] = 989.0,
    as_json: Annotated[bool, flag("--json", "With --dry-run: print JSON instead of a table.")] = False,
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
