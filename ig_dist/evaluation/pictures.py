"""Pictures of samples and of scores."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ig_dist.evaluation.catalogue import best_row, lower_is_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEST_CELL: dict[str, Any] = {"markersize": 30, "markerfacecolor": "none", "markeredgecolor": "red"}
SCALES = {"ig_scale": "Internal Guidance", "cfg_scale": "CFG", "auto_scale": "autoguidance"}
SHORT = {"ig_scale": "IG", "cfg_scale": "CFG", "auto_scale": "autoguidance"}
OTHER_AXES = {"ig_interval": "IG", "cfg_interval": "CFG", "ema": "", "step": ""}
MIN_SIDE = 64  # smaller images are enlarged to at least this many pixels
TEXT_SIZE, GAP = 12, 4  # pixels


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # slow to import; no pyplot: no global state, no display

    return Figure(figsize=(width, height), layout="constrained")


def gallery(images: NDArray[np.uint8], names: Sequence[str], title: str, columns: int = 8) -> Image.Image:
    """Images (N, H, W, channels) in rows, each below its name."""
    starts = range(0, len(images), columns)
    return pictures_in_rows([("", images[i : i + columns], names[i : i + columns]) for i in starts], title)


def save_grid(rows: Sequence[tuple[str, NDArray[np.uint8]]], file: Path, title: str) -> None:
    """One row of images (N, H, W, channels) for each name, one below the other, as PNG."""
    pictures_in_rows([(name, images, ()) for name, images in rows], title).save(file)


def pictures_in_rows(rows: Sequence[tuple[str, NDArray[np.uint8], Sequence[str]]], title: str) -> Image.Image:
    """Rows of images (N, H, W, channels), each with a name at its left and one over each image (none: no names).

    No image loses a pixel: they have their own size, and small ones are enlarged by a whole number.
    """
    side = rows[0][1].shape[1]
    factor = max(1, -(-MIN_SIDE // side))
    side, font = side * factor, ImageFont.load_default(TEXT_SIZE)
    line = TEXT_SIZE + GAP
    left = max((int(font.getlength(name)) + 2 * GAP for name, *_ in rows if name), default=GAP)
    step = side + GAP
    width = left + step * max(len(images) for _, images, _ in rows)
    lines = textwrap.wrap(title, max(12, int(width / font.getlength("n")))) or [""]
    y = line * len(lines) + 2 * GAP
    whole = Image.new("RGB", (width, y + sum(step + line * bool(names) for *_, names in rows)), "white")
    draw = ImageDraw.Draw(whole)
    draw.multiline_text((GAP, GAP), "\n".join(lines), "black", font, spacing=GAP)
    for name, images, names in rows:
        for column, text in enumerate(names):
            draw.text((left + column * step, y), _fitting(text, font, side), "black", font)
        y += line * bool(names)
        draw.text((GAP, y + side // 2), name, "black", font, anchor="lm")
        for column, image in enumerate(images):
            picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert("RGB")
            whole.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left + column * step, y))
        y += step
    return whole


def _fitting(text: str, font: Any, width: int) -> str:
    while len(text) > 1 and font.getlength(text) > width:
        text = text.removesuffix("\u2026")[:-1] + "\u2026"
    return text


def save_sweep_plot(rows: Sequence[dict[str, Any]], metric: str, file: Path) -> None:
    """The score over the sweep, as PNG: a heat map where IG and CFG scales vary alone, else lines over one scale."""
    figure = _figure(5.2, 3.6)
    axes = figure.subplots()
    better = "lower is better" if lower_is_better(metric) else "higher is better"
    images = sorted({row["num"] for row in rows})
    better += f", of {images[0]:,} images" + (f" to {images[-1]:,}" if len(images) > 1 else "")
    best = best_row(rows, metric)
    varied = [key for key in (*SCALES, *OTHER_AXES) if len({_value(row, key) for row in rows}) > 1]
    if varied == ["ig_scale", "cfg_scale"]:
        _heat_map(figure, axes, rows, metric, best)
        axes.set(xlabel="Internal Guidance scale", ylabel="CFG scale", title=f"{metric} ({better})")
    else:
        axis = next((key for key in varied if key in SCALES), "ig_scale")
        lines: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        others = [key for key in varied if key != axis]
        for row in rows:
            lines.setdefault(tuple(_value(row, key) for key in others), []).append(row)
        for values, chosen in lines.items():
            chosen.sort(key=lambda row: float(row[axis]))
            names = [_named(key, value) for key, value in zip(others, values, strict=True)]
            x, y = [row[axis] for row in chosen], [row["scores"][metric] for row in chosen]
            bars = [row.get("std", {}).get(metric, 0.0) for row in chosen]
            axes.errorbar(x, y, bars, fmt="o-", label=", ".join(filter(None, names)) or f"{SCALES[axis]} alone")
        axes.plot(best[axis], best["scores"][metric], "*", markersize=14, color="black", label="best", zorder=-1)
        axes.set(xlabel=f"{SCALES[axis]} scale (1 = off)", ylabel=metric)
        axes.set_title(better, fontsize="medium")  # too long for the height of the axis
        axes.set_ylim(0, 1.08 * max(row["scores"][metric] for row in rows))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=130)


def save_tradeoff_plot(rows: Sequence[dict[str, Any]], metric: str, other: str, file: Path) -> None:
    """Two scores of every point against each other, as PNG; each is named by its scales."""
    figure = _figure(5.2, 3.6)
    axes = figure.subplots()
    axes.plot([row["scores"][other] for row in rows], [row["scores"][metric] for row in rows], "o", alpha=0.7)
    axes.margins(x=0.15, y=0.1)  # room for the names
    for row in rows:
        name = ", ".join(f"{short} {row[key]:g}" for key, short in SHORT.items() if row[key] != 1) or "unguided"
        at = (row["scores"][other], row["scores"][metric])
        axes.annotate(name, at, textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(xlabel=f"{other} (higher is better)", ylabel=f"{metric} (lower is better)")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)


def _heat_map(figure: Figure, axes: Axes, rows: Sequence[dict[str, Any]], metric: str, best: Mapping[str, Any]) -> None:
    ig_scales, cfg_scales = (sorted({row[key] for row in rows}) for key in ("ig_scale", "cfg_scale"))
    scores = np.full((len(cfg_scales), len(ig_scales)), np.nan)
    for row in rows:
        scores[cfg_scales.index(row["cfg_scale"]), ig_scales.index(row["ig_scale"])] = row["scores"][metric]
    middle, colours = np.nanmean(scores), "viridis_r" if lower_is_better(metric) else "viridis"
    figure.colorbar(axes.imshow(scores, cmap=colours, aspect="auto", origin="lower"), label=metric)
    for (y, x), score in np.ndenumerate(scores):
        dark = (score < middle) == lower_is_better(metric)
        axes.text(x, y, f"{score:.3g}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.set_xticks(range(len(ig_scales)), [f"{scale:g}" for scale in ig_scales])
    axes.set_yticks(range(len(cfg_scales)), [f"{scale:g}" for scale in cfg_scales])
    axes.plot(ig_scales.index(best["ig_scale"]), cfg_scales.index(best["cfg_scale"]), "s", **BEST_CELL)


def _value(row: Mapping[str, Any], key: str) -> Any:
    value = row.get(key)
    return tuple(value) if isinstance(value, list) else value


def _named(key: str, value: Any) -> str:
    """One value of an axis in words; nothing for a scale that is off."""
    if key in SCALES:
        return "" if value == 1 else f"{SCALES[key]} {value:g}"
    if key in ("ema", "step"):
        return f"{key} {value:g}" if value is not None else ""
    return f"{OTHER_AXES[key]} for t in [{value[0]:g}, {value[1]:g}]"
