"""Pictures of samples."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

MIN_SIDE = 64  # smaller images are enlarged to at least this many pixels
TEXT_SIZE, GAP = 12, 4  # pixels


def gallery(images: NDArray[np.uint8], names: Sequence[str], title: str, columns: int = 8) -> Image.Image:
    """Images (N, H, W, channels) in rows, each below its name."""
    starts = range(0, len(images), columns)
    return pictures_in_rows([("", images[i : i + columns], names[i : i + columns]) for i in starts], title)


def save_grid(rows: Sequence[tuple[str, NDArray[np.uint8]]], file: Path, title: str) -> None:
    """One row of images (N, H, W, channels) for each name, one below the other, as PNG."""
    pictures_in_rows([(name, images, ()) for name, images in rows], title).save(file)


def pictures_in_rows(
    rows: Sequence[tuple[str, NDArray[np.uint8], Sequence[str]]], title: str, red: Collection[str] = ()
) -> Image.Image:
    """Rows of images (N, H, W, channels), each with a name at its left and one over each image (none: no names).

    The names ``red`` are drawn in that colour.

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
            draw.text((left + column * step, y), _fitting(text, font, side), "red" if text in red else "black", font)
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
