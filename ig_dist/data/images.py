"""Pictures from files: decoding into RGB, and the published preprocessing that makes them square."""

import io
import re
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
KINDS = "PNG, JPEG, WebP, GIF or BMP"
MAX_PIXELS = 89_478_485  # Pillow's own threshold for a decompression bomb: 256 MiB of RGB
PREPROCESSING = "first frame, EXIF rotation, alpha on white, RGB, ADM centre crop"

# Pillow warns of bombs and odd metadata; here a picture is either taken or rejected with a reason.
warnings.filterwarnings("ignore", module=r"PIL\.")


class RejectedImage(Exception):  # noqa: N818  (a verdict on one file; whoever reads many of them goes on)
    """A file that gives no picture; the text is the reason, in one line."""


def decode_image(file: Path | bytes, size: int) -> NDArray[np.uint8]:
    """The picture in a file, (size, size, 3) RGB. See ``load_rgb`` and ``center_crop``."""
    return center_crop(load_rgb(file), size)


def load_rgb(file: Path | bytes) -> Image.Image:
    """The picture in a file, of its own size: the first frame, turned as its EXIF says, without alpha, in RGB.

    The format is told by the content, not by the name. Colour profiles are not applied.

    Args:
        file: where it is, or what is in it.

    Raises:
        RejectedImage: no picture, damaged, truncated, or of more than ``MAX_PIXELS`` pixels.
    """
    if isinstance(file, Path) and not file.is_file():
        raise RejectedImage("not a regular file")  # a pipe would block, a link may lead nowhere
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise RejectedImage(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except (RejectedImage, MemoryError):  # want of memory is no verdict on the picture
        raise
    except UnidentifiedImageError:
        raise RejectedImage(f"not a {KINDS} picture") from None
    except Image.DecompressionBombError:
        raise RejectedImage(f"more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # damaged files raise almost anything in the decoders: SyntaxError, struct.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(file, Path):
            reason = reason.removesuffix(f": {str(file)!r}")
        reason = re.sub(r" ?<_io\.BytesIO[^>]*>", "", reason)  # an address would make two reports differ
        raise RejectedImage(f"cannot be decoded: {reason}") from None


def center_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The ADM centre crop: (size, size, channels) of any picture; smaller ones are enlarged.

    Halved with a box filter while the smaller side is at least 2 size, then bicubic until it is size, then the middle.
    Dhariwal and Nichol 2021 (``center_crop_arr``); the FID references of the field are made this way.

    Raises:
        RejectedImage: so long and narrow that it would pass ``MAX_PIXELS`` when enlarged.
    """
    # columns, then rows, rounded between, as the published files; Pillow 13 begins with the rows of tall pictures
    while min(image.size) >= 2 * size:
        columns = image.resize((image.width // 2, image.height), Image.Resampling.BOX)
        image = columns.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise RejectedImage(f"{image.width} x {image.height} pixels: too narrow for size {size}")
    left, top = (width - size) // 2, (height - size) // 2
    # columns that are cut off need not be computed again
    image = image.resize((width, image.height), Image.Resampling.BICUBIC).crop((left, 0, left + size, image.height))
    return np.asarray(image.resize((size, height), Image.Resampling.BICUBIC).crop((0, top, size, top + size)))


def is_picture(file: Path) -> bool:
    """Whether a file begins like a picture; its pixels are not read."""
    try:
        with Image.open(file, formats=FORMATS):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:
        return False


def is_grey(file: Path | bytes) -> bool:
    """Whether a file is a picture in shades of grey, without colour; its pixels are not read."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
            return image.mode in ("1", "L") or image.mode.startswith("I")
    except Exception:  # whoever reads its pixels says what is wrong
        return False


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip at 255; of 16-bit colour it keeps the high byte too
        values, transparent = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray((values >> 8).astype(np.uint8))
        if transparent is not None:
            image.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
