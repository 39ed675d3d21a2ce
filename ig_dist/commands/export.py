"""``ig-dist export``."""

from __future__ import annotations

from ig_dist.commands.options import Ema, Raw, Run
from ig_dist.terminal import console


def export(run: Run, ema: Ema = None, raw: Raw = False) -> None:
    """Export the newest checkpoint as safetensors, for sampling and for others to use."""
    from ig_dist.config_file import load_run
    from ig_dist.export import export_run

    console.print(str(export_run(load_run(run), ema=ema, raw=raw)))
