"""Pictures of samples and of scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIN_SIDE = 48  # smaller images are enlarged to about this many pixels


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # slow to import; no pyplot: no global state, no display

    return Figure(figsize=(width, height), layout="constrained")


def save_grid(rows: Sequence[tuple[str, NDArray[np.uint8]]], file: Path, title: str) -> None:
    """One row of images (N, H, W, channels) for each name, one below the other, as PNG."""
    longest = max(len(images) for _, images in rows)
    figure = _figure(1.6 + 0.62 * longest, 0.5 + 0.62 * len(rows))
    figure.suptitle(title, fontsize=10)
    for axes, (name, images) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        factor = max(1, MIN_SIDE // images.shape[1])
        large = images.repeat(factor, axis=1).repeat(factor, axis=2)
        padded = np.pad(large, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255)
        strip = np.concatenate(list(padded), axis=1)
        axes.imshow(strip.squeeze(-1) if strip.shape[-1] == 1 else strip, cmap="gray", vmin=0, vmax=255)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    figure.savefig(file, dpi=130)


def save_scale_plot(rows: Sequence[dict[str, Any]], metric: str, file: Path) -> None:
    """The score against the IG scale, one line per CFG scale, as PNG; the best point is marked."""
    figure = _figure(5.2, 3.6)
    axes = figure.subplots()
    for cfg_scale in sorted({row["cfg_scale"] for row in rows}):
        line = sorted((row["ig_scale"], row["scores"][metric]) for row in rows if row["cfg_scale"] == cfg_scale)
        axes.plot(*zip(*line, strict=True), "o-", label=f"CFG {cfg_scale:g}" if cfg_scale != 1 else "no CFG")
    best = min(rows, key=lambda row: row["scores"][metric])
    axes.plot(best["ig_scale"], best["scores"][metric], "*", markersize=14, color="black", label="best", zorder=-1)
    axes.set(xlabel="Internal Guidance scale (1 = unguided)", ylabel=f"{metric} (lower is better)")
    axes.set_ylim(0, 1.08 * max(row["scores"][metric] for row in rows))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=130)
