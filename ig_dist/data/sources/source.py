"""What every source of images comes down to: labelled byte ranges of local files, read one by one."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ig_dist.data.images import PREPROCESSING, RejectedImage
from ig_dist.errors import DataError

MAX_BYTES = 1 << 30  # of one picture: what is larger is some other file, and need not go through memory
NO_FILE = -1  # size of what is no regular file


class ByteRange(NamedTuple):
    """Where an encoded image lies. A range that begins at 0 is a whole file (in a tar a header comes first)."""

    file: str
    offset: int
    size: int


Item = ByteRange | NDArray[np.uint8]
"""What a decoding process needs of an image: its place, or its pixels (H, W, channels)."""


class Listed(NamedTuple):
    """An image as a listing finds it."""

    path: str  # what the user knows it by
    label: int
    where: ByteRange


@dataclass(frozen=True)
class Source:
    """Labelled images with random access."""

    name: str  # says all that the images depend on but their size: equal names are equal images
    classes: list[str]
    class_names: list[str] | None  # in words, where known
    labels: NDArray[np.int64]  # (N,)
    paths: Sequence[str]  # what the user knows each image by
    item: Callable[[int], Item]


class Native(NamedTuple):
    """The format of images that are pixels already, which no option changes."""

    size: int  # their side
    channels: int


class Found(NamedTuple):
    """What SRC was recognised as. Opening it may take a copy of it (``spool``)."""

    kind: str  # in words: said to the user
    name: str  # the name that the opened source will have
    open: Callable[[], Source]
    open_part: Callable[[str], tuple[Source, float]] | None = None
    """Of a source that must be copied: copies a part of it into a folder; gives that and its share of the whole."""


def source_name(what: str, entries: Iterable[tuple[str, int, int]], count: int) -> str:
    """The name of a source, with a hash over (path, size, label) of each entry and over the preprocessing."""
    digest = hashlib.sha256(f"{PREPROCESSING}\n".encode())
    for path, size, label in entries:
        digest.update(b"%s\0%d\0%d\n" % (os.fsencode(path), size, label))
    return f"{what}, {count} files, sha256 {digest.hexdigest()}"


def listed_source(
    what: str, listed: Sequence[Listed], classes: list[str], class_names: list[str] | None, *, name: str | None = None
) -> Source:
    """A source of byte ranges: ``what`` begins its name, unless the whole ``name`` is known from elsewhere."""
    # Columns instead of a million tuples of tuples; the files of a tar are one string.
    files = [image.where.file for image in listed]
    offsets = np.array([image.where.offset for image in listed], np.int64)
    sizes = np.array([image.where.size for image in listed], np.int64)
    labels = np.array([image.label for image in listed], np.int64)
    paths = [image.path for image in listed]
    name = name or source_name(what, zip(paths, sizes, labels, strict=True), len(paths))
    return Source(
        name=name,
        classes=classes,
        class_names=class_names,
        labels=labels,
        paths=paths,
        item=lambda i: ByteRange(files[i], int(offsets[i]), int(sizes[i])),
    )


def array_source(
    name: str, images: NDArray[np.uint8], labels: NDArray[Any], classes: int, class_names: list[str] | None
) -> Source:
    """A source of pixels, (N, H, W, channels), with labels, (N,), below ``classes``, which their numbers name."""
    return Source(
        name=name,
        classes=[str(number) for number in range(classes)],
        class_names=class_names,
        labels=labels.astype(np.int64),
        paths=[],
        item=lambda i: images[i],
    )


DIGITS = Native(size=8, channels=1)


def digits() -> Source:
    """The 1,797 real 8 x 8 grey digits that scikit-learn carries, as uint8."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
    return array_source("scikit-learn digits", images, data.target, 10, None)


def read_bytes(where: ByteRange) -> bytes:
    """The bytes of an encoded image.

    Raises:
        RejectedImage: there is no regular file, or one that is too large for a picture.
        DataError: it cannot be read, or changed since it was listed: nothing that may be said of the image.
    """
    if where.size == NO_FILE:
        raise RejectedImage("not a regular file")  # a pipe would block, a link may lead nowhere
    if where.size > MAX_BYTES:
        raise RejectedImage(f"{where.size} bytes, more than {MAX_BYTES}")
    try:
        with Path(where.file).open("rb") as file:
            changed = where.offset == 0 and os.fstat(file.fileno()).st_size != where.size
            file.seek(where.offset)
            data = file.read(where.size)
    except PermissionError as error:
        raise RejectedImage(f"cannot be read: {error.strerror}") from None
    except OSError as error:
        raise DataError(f"{where.file} cannot be read ({error.strerror}): run the same command again") from None
    if changed or len(data) != where.size:
        raise DataError(f"{where.file} changed while it was encoded: run the same command again")
    return data


def file_size(path: str | os.PathLike[str]) -> int:
    """Bytes of a regular file (links are followed), or NO_FILE."""
    try:
        status = os.stat(path)  # noqa: PTH116  (a Path for each of a million files takes as long as the call)
    except OSError:
        return NO_FILE
    return status.st_size if stat.S_ISREG(status.st_mode) else NO_FILE
