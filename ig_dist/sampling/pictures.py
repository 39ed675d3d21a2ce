"""Pictures for people: the images of a notebook, and rows of images with their names."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Collection, Iterable, Sequence
from typing import Any, SupportsIndex, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SMALLEST_SIDE = 48  # of a grid: smaller pictures are enlarged to about so many pixels
MOST_SHOWN = 64
LONGEST_ROW = 10
GAP = 2
MIN_SIDE = 64  # of rows with names: smaller images are enlarged to at least this many pixels
TEXT_SIZE, TEXT_GAP = 12, 4  # pixels


class Images(list[Image.Image]):
    """PIL images with the classes that were asked for. At the end of a notebook's cell they are shown as a grid."""

    def __init__(self, images: Iterable[Image.Image], labels: Sequence[int] = ()) -> None:
        super().__init__(images)
        self.labels = list(labels)
        """Number of the class of each image."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Images: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Image.Image | Images:
        found: Any = super().__getitem__(index)
        return Images(found, self.labels[index]) if isinstance(index, slice) else found

    def grid(self, columns: int | None = None, side: int | None = None) -> Image.Image:
        """All of them in one picture, see ``ig_dist.grid``."""
        return grid(self, columns, side)

    def _repr_png_(self) -> bytes | None:
        return png(grid(self[:MOST_SHOWN])) if self else None


def grid(
    images: Sequence[Image.Image] | Sequence[Sequence[Image.Image]] | NDArray[np.uint8],
    columns: int | None = None,
    side: int | None = None,
) -> Image.Image:
    """Lay images of one size out in one picture.

    Args:
        images: PIL images, or arrays (N, H, W, channels) uint8; or a list of such lists, each of which is a row.
        columns: images in a row, where no rows are given; None: eight, or one row of ten at most.
        side: pixels of an image's longer side; None: as they are, but small ones are enlarged. Pixels stay square
            and sharp where it is a multiple.

    Raises:
        ValueError: no images, or images of several sizes.
    """
    first: Any = images[0] if len(images) else None
    if isinstance(first, list | tuple) or getattr(first, "ndim", 0) == 4:
        rows = [_pictures(row) for row in images]
    else:
        pictures = _pictures(images)
        columns = columns or (8 if len(pictures) > LONGEST_ROW else max(1, len(pictures)))
        rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    sizes = {picture.size for row in rows for picture in row}
    if len(sizes) != 1:
        raise ValueError(f"images of one size are laid out in a grid, these are of {sorted(sizes) or 'none'}")
    width, height = sizes.pop()
    scale = side / max(width, height) if side else max(1, SMALLEST_SIDE // max(width, height))
    width, height = round(width * scale), round(height * scale)
    size = max(map(len, rows)) * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP
    whole = Image.new(rows[0][0].mode, size, color="white")
    sampling = Image.Resampling.NEAREST if scale == int(scale) else Image.Resampling.LANCZOS
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            whole.paste(picture.resize((width, height), sampling), (x * (width + GAP), y * (height + GAP)))
    return whole


def pil_images(images: NDArray[np.uint8]) -> list[Image.Image]:
    """Of an array (N, H, W, channels)."""
    return [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in images]


def png(picture: Image.Image) -> bytes:
    """The content of its file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _pictures(images: Any) -> list[Image.Image]:
    return list(images) if len(images) and isinstance(images[0], Image.Image) else pil_images(np.asarray(images))


def pictures_in_rows(
    rows: Sequence[tuple[str, NDArray[np.uint8], Sequence[str]]], title: str, red: Collection[str] = ()
) -> Image.Image:
    """Rows of images (N, H, W, channels), each with a name at its left and one over each image (none: no names).

    The names ``red`` have that colour. No image loses a pixel: they have their own size, and small ones are enlarged by
    a whole number.
    """
    side = rows[0][1].shape[1]
    factor = max(1, -(-MIN_SIDE // side))
    side, font = side * factor, ImageFont.load_default(TEXT_SIZE)
    line = TEXT_SIZE + TEXT_GAP
    left = max((int(font.getlength(name)) + 2 * TEXT_GAP for name, *_ in rows if name), default=TEXT_GAP)
    step = side + TEXT_GAP
    width = left + step * max(len(images) for _, images, _ in rows)
    lines = textwrap.wrap(title, max(12, int(width / font.getlength("n")))) or [""]
    y = line * len(lines) + 2 * TEXT_GAP
    whole = Image.new("RGB", (width, y + sum(step + line * bool(names) for *_, names in rows)), "white")
    draw = ImageDraw.Draw(whole)
    draw.multiline_text((TEXT_GAP, TEXT_GAP), "\n".join(lines), "black", font, spacing=TEXT_GAP)
    for name, images, names in rows:
        for column, text in enumerate(names):
            draw.text((left + column * step, y), _fitting(text, font, side), "red" if text in red else "black", font)
        y += line * bool(names)
        draw.text((TEXT_GAP, y + side // 2), name, "black", font, anchor="lm")
        for column, picture in enumerate(pil_images(images)):
            enlarged = picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
            whole.paste(enlarged, (left + column * step, y))
        y += step
    return whole


def _fitting(text: str, font: Any, width: int) -> str:
    while len(text) > 1 and font.getlength(text) > width:
        text = text.removesuffix("\u2026")[:-1] + "\u2026"
    return text
