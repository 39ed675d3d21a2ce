"""``ig-dist export``."""

from __future__ import annotations

from ig_dist.commands.options import AsJson, Ema, Raw, Run, print_json
from ig_dist.terminal import console


def export(run: Run, ema: Ema = None, raw: Raw = False, as_json: AsJson = False) -> None:
    """Export a checkpoint as safetensors, for sampling and for others to use: the newest one, or that of RUN@STEP."""
    from ig_dist.export import find_weights, read_info

    folder = find_weights(run, ema=ema, raw=raw).export
    if as_json:
        return print_json({"export": str(folder), **read_info(folder).model_dump(mode="json", include={"ema", "step"})})
    console.print(str(folder))
