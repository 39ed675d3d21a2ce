"""What an encoding shows: progress on a terminal, a line a minute in a log, and what was made in the end."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import PurePosixPath
from types import TracebackType
from typing import Self

import numpy as np
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ig_dist.data.index import ShardIndex
from ig_dist.terminal import console, is_main_process

LOG_EVERY_S = 60.0
_LISTED_CHANNELS = 8  # more are summed up


class Display:
    """Progress over all workers; images/s are this worker's. Used as a context.

    Args:
        total: images.
        done: of these, finished before.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total, self._began, self._made, self._first = total, time.monotonic(), 0, done
        self._logged = self._began
        self._progress = Progress(
            TextColumn("encode"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:,.0f} images/s"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not is_main_process() or not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total, completed=done, rate=0.0)

    def show(self, done: int, made: int) -> None:
        """Show where things are.

        Args:
            done: images that all workers have finished, and this one's unfinished shard.
            made: images that this worker has finished since the last call.
        """
        now = time.monotonic()
        self._made += made
        rate = self._made / max(now - self._began, 1e-9)
        self._progress.update(self._task, completed=done, rate=rate)
        if not console.is_terminal and is_main_process() and now - self._logged > LOG_EVERY_S:
            self._logged = now
            all_workers = (done - self._first) / (now - self._began)
            left = timedelta(seconds=round((self._total - done) / max(all_workers, rate, 1e-9)))
            console.print(f"{done:,} of {self._total:,} images, {rate:,.0f} images/s here, {left} left")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def summary(index: ShardIndex) -> list[str]:
    """Lines that say what an index holds, and what to type next."""
    info = index.info
    counts = np.bincount(index.table.label, minlength=len(info.classes))
    stored = sum(shard.bytes for shard in info.shards)
    shape = "x".join(map(str, info.latent.shape))
    kind = "posterior moments of " if info.latent.kind == "moments" else ""
    flips = ", and those of the mirrored images" if info.latent.flips else ""
    size = info.tokenizer.image_size
    rejected = f"{info.rejected} rejected" + (f" ({index.folder}/rejected.csv)" if info.rejected else "")
    return [
        f"{index.num_samples} images of {len(info.classes)} classes ({counts.min()} to {counts.max()} a class) ->"
        f" {len(info.shards)} shards of {kind}{shape} latents{flips} in {index.folder} ({decimal(stored)})",
        f"{rejected}, {info.upscaled} upscaled from less than {size} x {size}",
        f"latents as the model sees them, per channel: mean {_numbers(info.statistics.mean)},"
        f" std {_numbers(info.statistics.std)}",
        f"index: {index.folder}/index.json",
        f"next: ig-dist train {_config(index)}",
    ]


def _config(index: ShardIndex) -> str:
    """The config that fits the latents, with what must be said beside it."""
    info, name = index.info, PurePosixPath(index.folder).name
    run = name.removesuffix("-data") if name.endswith("-data") else f"{name}-run"
    fitting = {(4, 32, 32): "configs/sit_xl2_ig.yaml"}.get(info.latent.shape, "CONFIG")
    file = "configs/digits.yaml" if info.tokenizer.name == "pixel" else fitting
    return f"{file} data.index={index.folder} run.dir=runs/{run}"


def _numbers(values: list[float]) -> str:
    if len(values) > _LISTED_CHANNELS:
        return f"{min(values):.3f} to {max(values):.3f}"
    return " ".join(f"{value:.3f}" for value in values)
