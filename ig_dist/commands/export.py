"""``ig-dist export``."""

from __future__ import annotations

from ig_dist.commands.options import Ema, Raw, Run
from ig_dist.terminal import console


def export(run: Run, ema: Ema = None, raw: Raw = False) -> None:
    """Export a checkpoint as safetensors, for sampling and for others to use: the newest one, or that of RUN@STEP."""
    from ig_dist.export import find_weights

    console.print(str(find_weights(run, ema=ema, raw=raw).export), markup=False)
