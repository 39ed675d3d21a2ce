"""Sources of labelled images: the digits of scikit-learn, and folders of pictures."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from ig_dist.data.images import PREPROCESSING, RejectedImage, center_crop, decode_image, is_picture, load_rgb
from ig_dist.errors import ConfigError
from ig_dist.terminal import console

DROPPINGS = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx"}
_CHUNK = 256  # files handed to the threads at a time: a million futures would take a gigabyte


@dataclass(frozen=True)
class ImageSource:
    """Labelled images of one size, read one by one."""

    name: str
    """Says all that the images depend on: equal names are equal images."""
    classes: list[str]
    labels: NDArray[np.int64]  # (N,)
    read: Callable[[int], NDArray[np.uint8]]
    """Image i, (H, W, channels). Called from several threads. Raises RejectedImage."""


class Listing(NamedTuple):
    """The files of a folder of class folders."""

    folder: Path
    classes: list[str]
    paths: list[str]
    """Relative to the folder, with slashes, sorted within each class."""
    labels: NDArray[np.int64]  # (N,)


class Checked(NamedTuple):
    """Which files of a listing hold pictures."""

    accepted: list[int]
    rejected: list[tuple[str, str]]
    """(relative path, reason)."""
    upscaled: int
    """Accepted pictures that are smaller than the size asked for."""


def digits() -> ImageSource:
    """The 1,797 real 8 x 8 grey digits that scikit-learn carries, as uint8."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
    classes = [str(digit) for digit in range(10)]
    return ImageSource("scikit-learn digits", classes, data.target.astype(np.int64), lambda i: images[i])


def list_folder(folder: Path) -> Listing:
    """The files of a folder whose sub-folders are the classes, numbered by sorted name; nested files count.

    Hidden files and what desktops leave behind are passed over. Nothing is opened but what lies beside the class
    folders: a picture there has no label.

    Raises:
        ConfigError: no class folders, pictures beside them, a class without files, or a folder that cannot be read.
    """
    layout = f"put the pictures into one sub-folder per class ({folder / 'CLASS' / 'picture.png'})"
    try:
        entries = sorted(path for path in folder.iterdir() if not _is_dropping(path.name))
    except OSError as error:
        raise _unreadable(error) from None
    stray = next((path for path in entries if path.is_file() and is_picture(path)), None)
    if stray is not None:
        raise ConfigError(f"--source {folder} holds pictures without a class ({stray.name}): {layout}")
    class_folders = [path for path in entries if path.is_dir()]
    if not class_folders:
        what = "holds no class folders" if entries else "is empty"
        raise ConfigError(f"--source {folder} {what}: {layout}")
    paths: list[str] = []
    labels: list[int] = []
    for label, class_folder in enumerate(class_folders):
        try:
            class_folder.name.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"--source {folder}: class folder {class_folder.name!r} is not UTF-8: rename it"
            ) from None
        found = sorted(file.relative_to(folder).as_posix() for file in _files(class_folder))
        if not found:
            raise ConfigError(f"--source {folder}: class {class_folder.name!r} has no files: add some, or remove it")
        paths.extend(found)
        labels.extend([label] * len(found))
    return Listing(folder, [path.name for path in class_folders], paths, np.asarray(labels, np.int64))


def check_pictures(listing: Listing, size: int, workers: int) -> Checked:
    """Decode every file once and keep the verdicts only.

    Encoding decodes the accepted files a second time. That is the plain way: which files count must be known before
    the first of them gets its place in the shuffle, and decoded pictures need neither memory nor a cache on disk.
    """

    def check(path: str) -> tuple[str | None, bool]:
        try:
            image = load_rgb(listing.folder / path)
            center_crop(image, size)
        except RejectedImage as rejection:
            return str(rejection), False
        return None, min(image.size) < size

    accepted: list[int] = []
    rejected: list[tuple[str, str]] = []
    upscaled = 0
    # Threads: Pillow decodes, converts and resizes without the GIL.
    with ThreadPoolExecutor(workers) as pool:
        chunks = (listing.paths[start : start + _CHUNK] for start in range(0, len(listing.paths), _CHUNK))
        verdicts = (verdict for chunk in chunks for verdict in pool.map(check, chunk))
        for i, (reason, small) in enumerate(track(verdicts, "check", total=len(listing.paths), console=console)):
            if reason is None:
                accepted.append(i)
                upscaled += small
            else:
                rejected.append((listing.paths[i], reason))
    return Checked(accepted, rejected, upscaled)


def folder_source(listing: Listing, accepted: Sequence[int], size: int) -> ImageSource:
    """The accepted pictures of a listing, (size, size, 3) RGB.

    The name holds a hash over path, bytes and label of each and over the preprocessing. A file that was replaced by
    one of the same length is not noticed.

    Raises:
        ConfigError: a class has no accepted picture.
    """
    labels = listing.labels[list(accepted)]
    for label, name in enumerate(listing.classes):
        if label not in labels:
            path = listing.paths[int(np.flatnonzero(listing.labels == label)[0])]
            raise ConfigError(
                f"--source {listing.folder}: class {name!r} has no usable picture (the first: {path}):"
                " add PNG, JPEG or WebP files, or remove the folder"
            )
    paths = [listing.paths[i] for i in accepted]
    digest = hashlib.sha256(f"{PREPROCESSING}, {size} x {size}\n".encode())
    try:
        for path, label in zip(paths, labels, strict=True):
            digest.update(b"%s\0%d\0%d\n" % (os.fsencode(path), (listing.folder / path).stat().st_size, label))
    except OSError as error:
        raise _unreadable(error) from None

    def read(i: int) -> NDArray[np.uint8]:
        try:
            return decode_image(listing.folder / paths[i], size)
        except RejectedImage as rejection:
            raise RejectedImage(f"{paths[i]}: {rejection}") from None

    folder = listing.folder.resolve().name.encode(errors="backslashreplace").decode()
    name = f"folder {folder}, {len(paths)} images, sha256 {digest.hexdigest()}"
    return ImageSource(name, listing.classes, labels, read)


def rejected_csv(rejected: Sequence[tuple[str, str]]) -> bytes:
    """The rejected files as CSV: path, reason."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("path", "reason"), *rejected])
    return text.getvalue().encode(errors="backslashreplace")


def _files(class_folder: Path) -> Iterator[Path]:
    """All files below a class folder. Links to folders are followed, but never into a circle."""
    seen: set[str] = set()

    def fail(error: OSError) -> None:
        raise _unreadable(error)

    for current, folders, names in os.walk(class_folder, onerror=fail, followlinks=True):
        real = os.path.realpath(current)
        if real in seen:
            raise ConfigError(f"--source: {current} leads to {real}, which is counted already: remove the link")
        seen.add(real)
        folders[:] = [name for name in folders if not _is_dropping(name)]
        yield from (Path(current, name) for name in names if not _is_dropping(name))


def _is_dropping(name: str) -> bool:
    return name.startswith(".") or name.lower() in DROPPINGS


def _unreadable(error: OSError) -> ConfigError:
    return ConfigError(f"--source: {error.filename} cannot be read ({error.strerror}): make it readable")
