"""Grey pictures in the IDX files of MNIST and its kin: Fashion-MNIST by name, any other by its folder.

An IDX file is two zero bytes, the type of its numbers (8: uint8), the count of its dimensions, each dimension as a
big-endian uint32, and the numbers. It may be compressed by gzip: a source's name is a hash of what is inside.
"""

import gzip
import hashlib
import math
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ig_dist.data.sources.source import Found, Native, array_source
from ig_dist.errors import ConfigError

ROOT_VARIABLE = "IG_DIST_DATASETS"
DEBIAN = Path("/usr/share/datasets")
NAMED = {"fashion-mnist": "train", "fashion-mnist-test": "t10k"}
"""Data sets that are known by name, with the part that each is."""
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
"""As the authors of Fashion-MNIST name them (arXiv 1708.07747)."""
_IMAGES, _LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
_UINT8 = 8
_GZIP = b"\x1f\x8b"
_MOST_TIMES = 1100  # that gzip makes zeros smaller


class IdxPair(NamedTuple):
    """The two files of one part of a data set."""

    images: Path
    labels: Path
    what: str  # begins the source's name


def find_idx(src: str) -> IdxPair | None:
    """The files that SRC means: a data set's name, or a folder that holds a train part; None: something else.

    Raises:
        ConfigError: the files of the name are nowhere, or there are images without labels.
    """
    if src in NAMED:
        given = os.environ.get(ROOT_VARIABLE)
        roots = [*([Path(given).expanduser()] if given else []), Path.home() / ".cache/ig_dist/datasets", DEBIAN]
        places = [root / "fashion-mnist" for root in roots]
        for folder in places:
            if pair := _pair(folder, NAMED[src], src):
                return pair
        files = ", ".join(f"{part}-{kind}.gz" for part in ("train", "t10k") for kind in (_IMAGES, _LABELS))
        raise ConfigError(
            f"--source {src}: its files are in none of {', '.join(map(str, places))}: put {files} of Fashion-MNIST"
            " (or the same unpacked) into one of them, or on Debian: apt-get install dataset-fashion-mnist;"
            f" ${ROOT_VARIABLE} names another place"
        )
    folder = Path(src.removeprefix("file://"))
    return _pair(folder, "train", f"IDX files of {folder.resolve().name}") if folder.is_dir() else None


def _pair(folder: Path, part: str, what: str) -> IdxPair | None:
    images, labels = (
        next((file for name in (f"{part}-{kind}", f"{part}-{kind}.gz") if (file := folder / name).is_file()), None)
        for kind in (_IMAGES, _LABELS)
    )
    if images is None:
        return None
    if labels is None:
        raise ConfigError(f"--source: {images} has no {part}-{_LABELS} (or .gz) beside it: add it")
    return IdxPair(images, labels, what)


def idx_native(pair: IdxPair) -> Native:
    """Side and channels of the images.

    Raises:
        ConfigError: they are not square, or the file is damaged.
    """
    return Native(_images(pair).shape[1], 1)


def idx_source(pair: IdxPair) -> Found:
    """The images with their labels, read whole: they are small.

    Raises:
        ConfigError: a file is damaged, or does not fit the other.
    """
    images, labels = _images(pair), _read(pair.labels, 1)
    count, size, _ = images.shape
    if count != len(labels):
        raise ConfigError(
            f"--source: {pair.images} has {count} images, {pair.labels.name} {len(labels)} labels: these are not of"
            " one data set, fetch both again"
        )
    words = list(FASHION_CLASSES) if pair.what in NAMED else None
    classes = len(words) if words else int(labels.max()) + 1
    if labels.max() >= classes:
        raise ConfigError(f"--source: {pair.labels} has label {labels.max()}, not 0 to {classes - 1}: fetch it again")
    empty = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
    if len(empty):
        raise ConfigError(
            f"--source: {len(empty)} of the {classes} classes of {pair.labels} have no image (the first: {empty[0]}):"
            " labels must count from 0 without gaps"
        )
    digest = hashlib.sha256(b"%d %d %d\n" % images.shape)
    digest.update(images.reshape(-1).data)
    digest.update(labels.data)
    name = f"{pair.what}, 2 files, sha256 {digest.hexdigest()}"
    source = array_source(name, images[..., None], labels, classes, words)
    kind = f"{count} grey images of {size} x {size} in {classes} classes, {pair.images}"
    return Found(kind, name, lambda: source)


def _images(pair: IdxPair) -> NDArray[np.uint8]:
    images = _read(pair.images, 3)
    _, height, width = images.shape
    if height != width:
        raise ConfigError(f"--source: {pair.images} holds images of {height} x {width}: only square ones are encoded")
    return images


def _read(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The numbers in an IDX file of uint8."""
    header_bytes = 4 + 4 * dimensions
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == _GZIP  # whatever its name says: browsers unpack, and keep the name
            raw.seek(0)
            with gzip.open(raw) if packed else raw as file:
                header, data = file.read(header_bytes), b""
                if len(header) == header_bytes:  # no more than may be in it, whatever it unpacks to
                    count = math.prod(struct.unpack(f">{dimensions}I", header[4:]))
                    data = file.read(min(count + 1, _MOST_TIMES * path.stat().st_size))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"--source: {path} is damaged ({error}): fetch it again") from None
    except OSError as error:
        raise ConfigError(f"--source: {path} cannot be read ({error.strerror}): make it readable") from None
    if header[:4] != bytes((0, 0, _UINT8, dimensions)) or len(header) < header_bytes:
        what = "images (3 dimensions)" if dimensions == 3 else "labels (1 dimension)"
        raise ConfigError(f"--source: {path} is no IDX file of {what} of bytes, it begins with {header[:4].hex(' ')!r}")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    if not all(shape):
        raise ConfigError(f"--source: {path} is empty, its header says {' x '.join(map(str, shape))}: fetch it again")
    if len(data) != count:
        raise ConfigError(
            f"--source: {path} has {len(data)} bytes of numbers where its header says {count}: fetch it again"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)
