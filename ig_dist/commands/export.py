"""``ig-dist export``."""

from ig_dist.commands.options import AsJson, Ema, Raw, Run, print_json
from ig_dist.terminal import console


def export(run: Run, ema: Ema = None, raw: Raw = False, as_json: AsJson = False) -> None:
    """Export the weights of a checkpoint: the newest, or RUN@STEP."""
    from ig_dist.export import find_weights, read_info

    folder = find_weights(run, ema=ema, raw=raw).export
    if as_json:
        return print_json({"export": str(folder), **read_info(folder).model_dump(mode="json", include={"ema", "step"})})
    console.print(str(folder))
