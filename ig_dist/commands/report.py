"""``ig-dist report``."""

from pathlib import Path
from typing import Annotated

from ig_dist.commands.options import Run, option
from ig_dist.terminal import console


def report(
    run: Run, out: Annotated[Path | None, option("FILE", "The HTML file; default: RUN/report.html.")] = None
) -> None:
    """Write one HTML file of a run: curves, pictures and scores."""
    from ig_dist.report.page import write_report

    console.print(f"written: {write_report(run, out)}")
