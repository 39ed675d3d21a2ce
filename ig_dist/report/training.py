"""The training in the report: curves of the metrics, its saves, and where the time went."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ig_dist.report.plots import Chart, Curve, curve_chart, event_chart
from ig_dist.report.results import Row
from ig_dist.report.text import number
from ig_dist.training.goodput import KINDS, LEAST_PERCENT, duration, read_goodput, read_saves


def training_charts(run: Path, lines: Sequence[Row]) -> list[Chart]:
    """A chart for each thing that was measured; lines of steps have a loss, those of a validation ``val_loss``."""
    steps = [line for line in lines if "images_seen" in line]
    validated = [line for line in lines if "val_loss" in line]
    if not steps:
        return []
    batch = steps[-1]["images_seen"] / steps[-1]["step"]

    def curve(key: str, factor: float = 1.0, of: Sequence[Row] = steps) -> Curve:
        values = [line.get(key) for line in of]
        return [line["step"] for line in of], [None if value is None else value * factor for value in values]

    losses = {"total": curve("loss"), "final head": curve("loss_final"), "auxiliary head": curve("loss_aux")}
    held_out = {"total": curve("val_loss", of=validated), "final head": curve("val_loss_final", of=validated)}
    waited = [
        None if line.get("data_wait_s") is None else 100 * line["data_wait_s"] * line["images_per_s"] / batch
        for line in steps
    ]
    charts = [
        curve_chart("Loss", "of the logged step's batch", losses, smoothed=True),
        curve_chart("Validation loss", "of the average, held-out shards", held_out),
        curve_chart("Learning rate", "", {"rate": curve("lr")}, from_zero=True),
        curve_chart("Gradient norm", "before clipping", {"norm": curve("grad_norm")}, from_zero=True, smoothed=True),
        curve_chart("Throughput", "images/s", {"images/s": curve("images_per_s")}, from_zero=True, smoothed=True),
        curve_chart(
            "Waiting for data", "% of the time", {"%": (curve("lr")[0], waited)}, from_zero=True, smoothed=True
        ),
        curve_chart(
            "Model FLOPs utilisation", "% of the peak", {"%": curve("mfu", 100)}, from_zero=True, smoothed=True
        ),
        curve_chart(
            "Peak memory",
            "GiB, of the rank that took most",
            {"GiB": curve("peak_memory_bytes", 2**-30)},
            from_zero=True,
        ),
        event_chart("Saving a checkpoint", "s, each save", _saves(run, steps)),
    ]
    return [chart for chart in charts if chart is not None]


def _saves(run: Path, steps: Sequence[Row]) -> dict[str, Curve]:
    """How long the loop stood still for each save, and how long it was written in the background.

    A line of metrics has the newest save's time of writing: a new value is of the save before that line.
    """
    saves = read_saves(run)
    written: dict[int, float] = {}
    for before, line in pairwise([{}, *steps]):
        value = line.get("checkpoint_write_s")
        if value is not None and value != before.get("checkpoint_write_s"):
            written[max((step for step in saves if step < line["step"]), default=line["step"])] = value
    return {
        "the loop stands still": (list(saves), list(saves.values())),
        "written meanwhile": (list(written), list(written.values())),
    }


def goodput_section(run: Path) -> dict[str, Any] | None:
    """Where the time went: (name, time, percent) of what took any, and what lies outside of it."""
    found = read_goodput(run)
    if found is None:
        return None
    return {
        "shares": [
            (name, duration(found.seconds[kind]), round(found.percent(kind), 1))
            for kind, name in KINDS.items()
            if found.percent(kind) >= LEAST_PERCENT
        ],
        "unit": f"{duration(found.running_s)} in {found.starts} start{'s' if found.starts > 1 else ''}",
        "note": f"{number(found.lost_steps)} steps were done again; {duration(found.between_s)} lie between the starts."
        if found.starts > 1
        else "",
    }
