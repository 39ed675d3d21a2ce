"""Sets of images that are scored, or held against: whatever their origin, they are read unit by unit.

A plan's samples, an npz, an index of latents, a folder of pictures, tars: each becomes an ``ImageSet``.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ig_dist.autoencoders.tokenizers import index_tokenizer
from ig_dist.data.images import RejectedImage, decode_image, is_grey, is_picture, load_rgb
from ig_dist.data.index import ShardIndex, read_index
from ig_dist.data.reader import ShardReader
from ig_dist.data.sources import find_source, is_missing
from ig_dist.data.sources.source import ByteRange, Source, read_bytes
from ig_dist.errors import ConfigError, DataError
from ig_dist.features.npz import NpzFile, open_npz
from ig_dist.plans.samples import Pictures, Samples, read_unit
from ig_dist.storage.writable import cache_folder
from ig_dist.this_process import this_device

UNIT_SIZE = 512
DECODED_PIXELS = 2**20  # of the latents that are decoded at once: 16 pictures of 256 x 256
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}

T = TypeVar("T")


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
    unit = lru_cache(maxsize=1)(partial(read_unit, plan, samples.url))

    def read(rows: range) -> Pictures:
        number, first = divmod(rows.start, plan.unit_size)
        return Pictures(**{name: values[first : first + len(rows)] for name, values in unit(number)._asdict().items()})

    return ImageSet(samples.url, plan.digest, plan.num, plan.unit_size, samples.url, read)


def _other_images(name: str, identity: str, num: int, read: Callable[[range], Pictures]) -> ImageSet:
    """Images that are not a plan's: they may lie where nobody may write, and their features go into the cache."""
    folder = cache_folder() / "features" / hashlib.sha256(identity.encode()).hexdigest()[:16]
    return ImageSet(name, identity, num, UNIT_SIZE, str(folder), read)


def index_images(index: ShardIndex, tokenizer: str = "") -> ImageSet:
    """The images that an index's latents decode to, in their order; of stored moments the mean is decoded."""
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

    return _other_images(info.source, f"{index.sha256} decoded by {decoder.sha256}", index.num_samples, read)


def npz_images(file: NpzFile) -> ImageSet:
    """The images of an npz (``arr_0``: uint8 NHWC), with its labels (``arr_1``) where it has them."""
    num, labels = file.member("arr_0").shape[0], None
    if "arr_1" in file.members:
        found = file.member("arr_1")
        if found.shape != (num,) or found.dtype.kind not in "iu":
            raise ConfigError(
                f"arr_1 of {file.url} is {found.dtype} of shape {found.shape}, labels are whole numbers, one for each"
                f" of the {num} pictures"
            )
        labels = file.array("arr_1").astype(np.int64)

    def read(rows: range) -> Pictures:
        known = None if labels is None else labels[rows.start : rows.stop]
        return Pictures(file.rows("arr_0", rows.start, rows.stop), known)

    return _other_images(file.url, f"npz {file.fingerprint}", num, read)


def find_images(src: str, *, image_size: int | None = None, tokenizer: str = "") -> ImageSet:
    """Recognise a set of images that is not a plan's.

    Args:
        src: an npz, the index of latents, a folder of pictures (with class folders or without), or any other source
            that ``ig_dist.data.sources`` knows.
        image_size: pictures of files are cut to this side as ADM cuts them; None: they must be squares of one size.
        tokenizer: where that of an index is, if not under its name there.

    Raises:
        ConfigError: nothing there that can be read.
    """
    if src.endswith(".npz"):
        return npz_images(open_npz(src))
    path = Path(src)
    if is_missing(src):
        raise ConfigError(f"{src} does not exist: give an npz, an index, a folder of pictures or tars")
    if src.endswith("index.json") or (path / "index.json").is_file() or _is_remote_folder(src):
        return index_images(read_index(src), tokenizer)
    if path.is_dir() and (files := sorted(file for file in path.iterdir() if _is_picture_file(file))):
        return _pictures_of(src, _flat_source(files), None, image_size)
    try:
        source = find_source(src).open()
    except ConfigError as error:  # the encoding's option is not the one here
        raise ConfigError(str(error).removeprefix("--source ")) from None
    return _pictures_of(src, source, source.labels, image_size)


def _flat_source(files: Sequence[Path]) -> Source:
    """Pictures of a folder without classes; one that was changed makes it another source."""
    stats = [file.stat() for file in files]
    entries = (
        b"%s\0%d %d\n" % (os.fsencode(f.name), s.st_size, s.st_mtime_ns) for f, s in zip(files, stats, strict=True)
    )
    name, unknown = hashlib.sha256(b"".join(entries)).hexdigest(), np.zeros(len(files), np.int64)
    paths = [file.name for file in files]
    return Source(name, [], None, unknown, paths, lambda i: ByteRange(str(files[i]), 0, stats[i].st_size))


def _pictures_of(src: str, source: Source, labels: NDArray[np.int64] | None, image_size: int | None) -> ImageSet:
    num = len(source.labels)

    def asked(i: int, what: Callable[[bytes], T]) -> T | NDArray[np.uint8]:
        """What is asked of an encoded picture; of one that is pixels already, these."""
        try:
            where = source.item(i)
            return what(read_bytes(where)) if isinstance(where, ByteRange) else where
        except RejectedImage as problem:
            raise DataError(f"{src}: picture {source.paths[i]}: {problem}: remove it") from None

    @cache
    def grey() -> bool:
        """Whether all are grey; one in colour makes all of them RGB."""
        return all(asked(i, is_grey) is True for i in range(num))

    def decode(data: bytes) -> NDArray[np.uint8]:
        image = np.asarray(load_rgb(data)) if image_size is None else decode_image(data, image_size)
        return image[..., :1] if grey() else image

    @cache
    def side() -> int:
        height, width = asked(0, decode).shape[:2]
        if width != height:
            raise ConfigError(f"{src}: pictures of {width} x {height}: say --image-size to cut squares")
        return int(height)

    def picture(i: int) -> NDArray[np.uint8]:
        image = asked(i, decode)
        if image.shape[:2] != (side(), side()):
            raise ConfigError(
                f"{src}: picture {source.paths[i]} has {image.shape[1]} x {image.shape[0]} pixels, the first one"
                f" {side()} x {side()}: say --image-size to cut all of them to one size"
            )
        return image

    def read(rows: range) -> Pictures:
        images = np.stack([picture(i) for i in rows])
        return Pictures(images, None if labels is None else labels[rows.start : rows.stop])

    size = "own size" if image_size is None else f"cut to {image_size}"
    return _other_images(src, f"{source.name}, {size}", num, read)


def _is_picture_file(file: Path) -> bool:
    """Whether it is to be one: what is called a picture and is none must not be left out in silence."""
    if file.name.startswith(".") or not file.is_file():  # such as macOS leaves behind
        return False
    return file.suffix.lower() in PICTURE_SUFFIXES or is_picture(file)


def _is_remote_folder(src: str) -> bool:
    return "://" in src and not src.startswith("file://") and not src.endswith((".tar", ".parquet", ".npz"))
