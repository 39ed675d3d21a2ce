"""``ig-dist reference``."""

from pathlib import Path
from typing import Annotated

from ig_dist.commands.options import ImageSize, Weights, argument, option, places
from ig_dist.terminal import console


def reference(
    source: Annotated[str, argument("SRC", "Index, folder, npz or tars of real pictures.")],
    out: Annotated[Path, option("FILE", "The npz to write; FILE.json beside it says of what.")],
    extractors: Annotated[str, option("NAME,...", "Of inception, dinov2, efficientnet_lite0.")] = "inception",
    image_size: ImageSize = None,
    weights: Weights = None,
    tokenizer: Annotated[str, option("PLACE", "Of an index, where it is not found under its name.")] = "",
) -> None:
    """Make statistics of real pictures, as ADM's files have them. Any number of processes may share the work."""
    from ig_dist.evaluation.references import make_reference
    from ig_dist.launching.jobs import refuse_missing

    refuse_missing(source)
    made = make_reference(
        source,
        out,
        extractors=extractors.split(","),
        image_size=image_size,
        weights=places(weights),
        tokenizer=tokenizer,
    )
    if made is not None:
        console.print(made)
