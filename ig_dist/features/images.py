"""Sets of images that are scored, or held against: whatever their origin, they are read unit by unit.

A plan's samples, an npz, an index of latents, a folder of pictures, tars: each becomes an ``ImageSet``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from glob import has_magic
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ig_dist.autoencoders.tokenizers import index_tokenizer
from ig_dist.data.images import RejectedImage, decode_image, is_grey, is_picture, load_rgb
from ig_dist.data.index import ShardIndex, read_index
from ig_dist.data.reader import ShardReader
from ig_dist.data.sources import find_source, is_name
from ig_dist.data.sources.source import ByteRange, read_bytes
from ig_dist.errors import ConfigError, DataError
from ig_dist.features.npz import NpzFile, open_npz
from ig_dist.plans.units import Samples, Unit, read_unit
from ig_dist.storage.writable import cache_folder
from ig_dist.this_process import this_device

UNIT_SIZE = 512
DECODED_PIXELS = 2**20  # of the latents that are decoded at once: 16 pictures of 256 x 256
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


class Pictures(NamedTuple):
    """Images of a unit, and what is known of each."""

    images: NDArray[np.uint8]  # (N, H, W, channels)
    labels: NDArray[np.int64] | None = None  # (N,)
    work: NDArray[np.int64] | None = None  # (N, 3), see units.Work


@dataclass(frozen=True)
class ImageSet:
    """Images in units."""

    name: str  # what the user knows it by
    identity: str  # equal identities are equal images
    num: int
    unit_size: int
    features_url: str  # folder of the feature files
    read: Callable[[range], Pictures]  # images by their numbers, all of one unit

    @property
    def num_units(self) -> int:
        """The last one may be smaller."""
        return -(-self.num // self.unit_size)

    def unit(self, number: int) -> range:
        """Image numbers of a unit."""
        return range(number * self.unit_size, min((number + 1) * self.unit_size, self.num))

    def chosen(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Single images, in the order of their numbers here; read in their own: a compressed npz is read forwards."""
        found = {number: self.read(range(number, number + 1)).images[0] for number in np.unique(numbers).tolist()}
        return np.stack([found[number] for number in numbers.tolist()])


def plan_images(samples: Samples) -> ImageSet:
    """The samples of a plan; their features lie beside them."""
    plan = samples.plan

    @lru_cache(maxsize=1)
    def unit(number: int) -> Unit:
        return read_unit(plan, samples.url, number)

    def read(rows: range) -> Pictures:
        number, first = divmod(rows.start, plan.unit_size)
        images, labels, work = unit(number)
        wanted = slice(first, first + len(rows))
        return Pictures(images[wanted], labels[wanted], work[wanted])

    return ImageSet(samples.url, plan.digest, plan.num, plan.unit_size, samples.url, read)


def index_images(index: ShardIndex, tokenizer: str = "") -> ImageSet:
    """The images that the stored latents of an index decode to, in index order; of stored moments the mean is decoded.

    ``tokenizer``: where its tokenizer is if not under its name in the index.
    """
    info, device = index.info, this_device()
    decoder = index_tokenizer(info.tokenizer, info.latent, tokenizer, device=device)
    reader, channels = ShardReader(index), info.latent.shape[0]
    at_once = max(1, DECODED_PIXELS // info.tokenizer.image_size**2)

    def read(rows: range) -> Pictures:
        stored, _ = reader.read_ids(rows.start, rows.stop)  # a damaged one raises
        # as stored, the latents are the tokenizer's own: normalisation is for the model
        latents = torch.from_numpy(stored[:, :channels]).float()
        images = torch.cat([decoder.decode(part.to(device)).cpu() for part in torch.split(latents, at_once)])
        return Pictures(images.numpy(), index.table.label[rows.start : rows.stop].astype(np.int64))

    identity = f"{index.sha256} decoded by {decoder.sha256}"
    return ImageSet(info.source, identity, index.num_samples, UNIT_SIZE, _cache(identity), read)


def npz_images(file: NpzFile) -> ImageSet:
    """The images of an npz (``arr_0``: uint8 NHWC), with its labels (``arr_1``) where it has them."""
    num = file.member("arr_0").shape[0]
    rows_of = partial(file.rows, "arr_0") if file.member("arr_0").stored else _forward(file)
    labels = _npz_labels(file) if "arr_1" in file.members else None

    def read(rows: range) -> Pictures:
        images = rows_of(rows.start, rows.stop)
        return Pictures(images, None if labels is None else labels[rows.start : rows.stop])

    identity = f"npz {file.fingerprint}"
    return ImageSet(file.url, identity, num, UNIT_SIZE, _cache(identity), read)


def _npz_labels(file: NpzFile) -> NDArray[np.int64]:
    found, num = file.member("arr_1"), file.member("arr_0").shape[0]
    if found.shape != (num,) or found.dtype.kind not in "iu":
        raise ConfigError(
            f"arr_1 of {file.url} is {found.dtype} of shape {found.shape}, labels are whole numbers, one for each of"
            f" the {num} pictures"
        )
    return file.array("arr_1").astype(np.int64)


def _forward(file: NpzFile) -> Callable[[int, int], NDArray[np.uint8]]:
    """Rows of a compressed array, of one unit: cheap where they are asked for in order."""
    batches, number, batch = file.batches("arr_0", UNIT_SIZE), -1, np.empty(0, np.uint8)

    def rows(start: int, stop: int) -> NDArray[np.uint8]:
        nonlocal batches, number, batch
        wanted, first = divmod(start, UNIT_SIZE)
        if wanted < number:
            batches, number = file.batches("arr_0", UNIT_SIZE), -1
        while number < wanted:
            batch, number = next(batches), number + 1
        return batch[first : first + stop - start]

    return rows


def find_images(src: str, *, image_size: int | None = None, tokenizer: str = "") -> ImageSet:
    """Recognise a set of images that is not a plan's.

    Args:
        src: an npz, the index of latents, a folder of pictures (with class folders or without), or any other source
            that ``ig_dist.data.sources`` knows.
        image_size: pictures of files are cut to this side as ADM cuts them; None: they must be squares of one size.
        tokenizer: see ``index_images``.

    Raises:
        ConfigError: nothing there that can be read.
    """
    if src.endswith(".npz"):
        return npz_images(open_npz(src))
    path = Path(src)
    if not (is_name(src) or "://" in src or has_magic(src) or "{" in src or path.exists()):
        raise ConfigError(f"{src} does not exist: give an npz, an index, a folder of pictures or tars")
    if src.endswith("index.json") or (path / "index.json").is_file() or _is_remote_folder(src):
        return index_images(read_index(src), tokenizer)
    flat = sorted(file for file in path.iterdir() if _is_picture_file(file)) if path.is_dir() else []
    if flat:
        entries = ((os.fsencode(file.name), file.stat()) for file in flat)
        digest = hashlib.sha256(b"".join(b"%s\0%d %d\n" % (name, s.st_size, s.st_mtime_ns) for name, s in entries))
        return _picture_files(src, digest.hexdigest(), [file.name for file in flat], flat.__getitem__, None, image_size)
    try:
        source = find_source(src).open()
    except ConfigError as error:  # the encoding's option is not the one here
        raise ConfigError(str(error).removeprefix("--source ")) from None

    def item(i: int) -> Path | bytes | NDArray[np.uint8]:
        where = source.item(i)
        return read_bytes(where) if isinstance(where, ByteRange) else where

    paths = source.paths or range(len(source.labels))
    return _picture_files(src, source.name, paths, item, source.labels, image_size)


def _picture_files(
    src: str,
    identity: str,
    paths: Sequence[str | int],
    item: Callable[[int], Path | bytes | NDArray[np.uint8]],
    labels: NDArray[np.int64] | None,
    image_size: int | None,
) -> ImageSet:
    def loaded(i: int) -> NDArray[np.uint8]:
        try:
            found = item(i)
            if isinstance(found, np.ndarray):
                return found
            image = np.asarray(load_rgb(found)) if image_size is None else decode_image(found, image_size)
            return image[..., :1] if grey() else image
        except RejectedImage as problem:
            raise DataError(f"{src}: picture {paths[i]}: {problem}: remove it") from None

    @lru_cache(maxsize=1)
    def grey() -> bool:
        """Whether all are grey; one in colour makes all of them RGB."""
        return all(map(without_colour, range(len(paths))))

    def without_colour(i: int) -> bool:
        try:
            found = item(i)
        except RejectedImage:  # who reads its pixels says so
            return True
        return not isinstance(found, np.ndarray) and is_grey(found)

    @lru_cache(maxsize=1)
    def side() -> int:
        height, width = loaded(0).shape[:2]
        if width != height:
            raise ConfigError(f"{src}: pictures of {width} x {height}: say --image-size to cut squares")
        return int(width)

    def decoded(i: int) -> NDArray[np.uint8]:
        image = loaded(i)
        if image.shape[:2] != (side(), side()):
            raise ConfigError(
                f"{src}: picture {paths[i]} has {image.shape[1]} x {image.shape[0]} pixels, the first one {side()} x"
                f" {side()}: say --image-size to cut all of them to one size"
            )
        return image

    def read(rows: range) -> Pictures:
        images = np.stack([decoded(i) for i in rows])
        return Pictures(images, None if labels is None else labels[rows.start : rows.stop])

    identity = f"{identity}, {'own size' if image_size is None else f'cut to {image_size}'}"
    return ImageSet(src, identity, len(paths), UNIT_SIZE, _cache(identity), read)


def _is_picture_file(file: Path) -> bool:
    """Whether it is to be one: what is called a picture and is none must not be left out in silence."""
    if file.name.startswith(".") or not file.is_file():  # such as macOS leaves behind
        return False
    return file.suffix.lower() in PICTURE_SUFFIXES or is_picture(file)


def _is_remote_folder(src: str) -> bool:
    return "://" in src and not src.startswith("file://") and not src.endswith((".tar", ".parquet", ".npz"))


def _cache(identity: str) -> str:
    """Folder for the features of images that are not a plan's: they may lie where nobody may write."""
    return str(cache_folder() / "features" / hashlib.sha256(identity.encode()).hexdigest()[:16])
