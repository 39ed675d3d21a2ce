"""Pictures of samples and of scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEST_CELL: dict[str, Any] = {"markersize": 30, "markerfacecolor": "none", "markeredgecolor": "red"}
SCALES = {"ig_scale": "Internal Guidance", "cfg_scale": "CFG", "auto_scale": "autoguidance"}
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


def save_sweep_plot(rows: Sequence[dict[str, Any]], metric: str, file: Path) -> None:
    """The score over the sweep, as PNG: a heat map where IG and CFG scales vary alone, else lines over one scale."""
    figure = _figure(5.2, 3.6)
    axes = figure.subplots()
    ig_scales, cfg_scales = (sorted({row[key] for row in rows}) for key in ("ig_scale", "cfg_scale"))
    intervals = sorted({tuple(row["ig_interval"]) for row in rows})
    best = min(rows, key=lambda row: row["scores"][metric])
    auto_scales = sorted({row["auto_scale"] for row in rows})
    if len(ig_scales) > 1 and len(cfg_scales) > 1 and len(intervals) == len(auto_scales) == 1:
        scores = np.full((len(cfg_scales), len(ig_scales)), np.nan)
        for row in rows:
            scores[cfg_scales.index(row["cfg_scale"]), ig_scales.index(row["ig_scale"])] = row["scores"][metric]
        middle = np.nanmean(scores)
        figure.colorbar(axes.imshow(scores, cmap="viridis_r", aspect="auto", origin="lower"), label=metric)
        for (y, x), score in np.ndenumerate(scores):
            colour = "white" if score < middle else "black"
            axes.text(x, y, f"{score:.3g}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(ig_scales)), [f"{scale:g}" for scale in ig_scales])
        axes.set_yticks(range(len(cfg_scales)), [f"{scale:g}" for scale in cfg_scales])
        axes.plot(ig_scales.index(best["ig_scale"]), cfg_scales.index(best["cfg_scale"]), "s", **BEST_CELL)
        axes.set(xlabel="Internal Guidance scale", ylabel="CFG scale", title=f"{metric} (lower is better)")
    else:
        varied = [axis for axis in SCALES if len({row[axis] for row in rows}) > 1]
        axis, *others = [*varied, *(axis for axis in SCALES if axis not in varied)]
        lines: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in rows:
            lines.setdefault((*(row[other] for other in others), tuple(row["ig_interval"])), []).append(row)
        for (*scales, interval), chosen in sorted(lines.items()):
            chosen.sort(key=lambda row: float(row[axis]))
            name = ", ".join(f"{SCALES[o]} {s:g}" for o, s in zip(others, scales, strict=True) if s != 1)
            name = name or f"{SCALES[axis]} alone"
            name += f", IG for t in [{interval[0]:g}, {interval[1]:g}]" if len(intervals) > 1 else ""
            x, y = [row[axis] for row in chosen], [row["scores"][metric] for row in chosen]
            axes.errorbar(x, y, [row.get("std", {}).get(metric, 0.0) for row in chosen], fmt="o-", label=name)
        axes.plot(best[axis], best["scores"][metric], "*", markersize=14, color="black", label="best", zorder=-1)
        axes.set(xlabel=f"{SCALES[axis]} scale (1 = off)", ylabel=f"{metric} (lower is better)")
        axes.set_ylim(0, 1.08 * max(row["scores"][metric] for row in rows))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=130)
