"""``ig-dist reference``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ig_dist.commands.options import pair
from ig_dist.terminal import console


def reference(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Index, folder, npz or tars of real pictures.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The npz to write; FILE.json beside it says of what.")],
    extractors: Annotated[
        str, typer.Option(metavar="NAME,...", help="Of inception, dinov2, efficientnet_lite0.")
    ] = "inception",
    image_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Cut pictures of files to this side, as ADM.")
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(metavar="EXTRACTOR=PATH", help="Weights of an extractor that lie elsewhere.")
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(metavar="PLACE", help="Of an index, where it is not found under its name.")
    ] = "",
) -> None:
    """Make statistics of real pictures, as ADM's files have them. Any number of processes may share the work."""
    from ig_dist.evaluation.references import make_reference
    from ig_dist.launching.jobs import refuse_missing

    refuse_missing(source)
    places = dict(pair("--weights", text) for text in weights or [])
    made = make_reference(
        source, out, extractors=extractors.split(","), image_size=image_size, weights=places, tokenizer=tokenizer
    )
    if made is not None:
        console.print(made)
