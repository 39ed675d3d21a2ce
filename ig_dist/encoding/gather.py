"""The end of an encoding: all records become the index. Any worker may do it, and writes the same bytes."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from ig_dist.autoencoders.tokenizers import Tokenizer
from ig_dist.data.images import KINDS
from ig_dist.data.index import LatentInfo, SampleTable, write_index
from ig_dist.data.sources import Source
from ig_dist.data.statistics import normalised, of_sums
from ig_dist.data.table import Spool
from ig_dist.encoding.records import Dest, Rejected, ShardRecord, Superseded, TooManyRejected, record_name
from ig_dist.encoding.settings import Settings
from ig_dist.errors import ConfigError
from ig_dist.storage.background import in_parallel
from ig_dist.storage.files import read_range
from ig_dist.storage.urls import is_local

_THREADS = 8
_AT_ONCE = 64  # records in memory
_CHECKED_SAMPLES = 4  # of each shard


def gather(
    dest: Dest, source: Source, where: str, tokenizer: Tokenizer, shape: tuple[int, int, int], shards: int
) -> bool:
    """Write ``rejected.csv``, the side table and the index, when all shards (with the empty ones) are finished.

    False: a shard is not as its record says, which is removed, and must be made again.
    """
    sizes, damaged = dest.sizes(), []
    totals = _Totals(len(source.classes), dest.path if is_local(dest.fs) else None)
    try:
        for first in range(0, shards, _AT_ONCE):
            numbers = range(first, min(first + _AT_ONCE, shards))
            sound = in_parallel(partial(_sound_record, dest, shape, sizes), numbers, _THREADS, dest.patience.stop)
            damaged += [number for number, record in zip(numbers, sound, strict=True) if record is None]
            for record in sound:
                if record is not None and not damaged:
                    totals.add(record)
        if damaged:
            for number in damaged:
                dest.remove(record_name(number))
            return False
        dest.write_rejected(totals.rejected)
        refuse_empty_classes(source, totals.class_counts, totals.rejected, where)
        if not dest.has_index():  # one that is there stays
            with dest.writing("index.json"):
                write_index(dest.url, _index(source, tokenizer, shape, totals), totals.table, dest.patience)
    except Superseded:
        pass
    return True


class _Totals:
    """What all records say together, but for their rows, which are in files on the disk of ``folder``."""

    def __init__(self, classes: int, folder: str | None) -> None:
        self.class_counts = np.zeros(classes, np.int64)
        self.settings: Settings | None = None
        """Of the first record: a tokenizer may have another name (a path) for each worker."""
        self.shards: list[dict[str, Any]] = []
        self.rejected: list[Rejected] = []
        self.samples = self.upscaled = 0
        self.sums: Any = 0.0  # per channel, of the latents and of their squares
        self._spool = Spool(folder)

    def add(self, record: ShardRecord) -> None:
        """Take the next record."""
        self.settings = self.settings or record.settings
        self.rejected += record.rejected
        self.upscaled += record.upscaled
        if not record.samples:
            return
        self.samples += record.samples
        self.class_counts += record.rows.class_counts(len(self.class_counts))
        self.sums = self.sums + np.array([record.sums, record.square_sums])
        self.shards.append(record.model_dump(include={"name", "bytes", "samples", "sha256"}))
        self._spool.add(record.rows.columns)

    @property
    def table(self) -> SampleTable:
        """The rows of all records."""
        return SampleTable(**self._spool.columns) if self.samples else SampleTable.from_rows([])


def too_many(rejected: Sequence[Rejected], total: int, max_rejected: float) -> bool:
    """Whether more files are rejected than may be."""
    return len(rejected) > max_rejected * total + 1e-6  # 0.29 of 100 files are 29


def refuse(
    rejected: Sequence[Rejected], looked_at: int, total: int, max_rejected: float, dest: Dest, where: str
) -> NoReturn:
    """Say how many files are rejected and what would allow them, and list them in ``rejected.csv``."""
    dest.write_rejected(rejected)
    first = min(rejected)
    so_far = "" if looked_at >= total else f" so far, with {looked_at} looked at"
    enough = math.ceil(1000 * len(rejected) / looked_at) / 1000
    raise TooManyRejected(
        f"--source {where}: {len(rejected)} of {total} files are rejected{so_far}, the first is {first.path}:"
        f" {first.reason} (all in {dest.url}/rejected.csv); mend or remove them, or allow them with --max-rejected"
        f" {enough:g} (it was {max_rejected:g})"
    )


def refuse_empty_classes(source: Source, counts: NDArray[np.int64], rejected: Sequence[Rejected], where: str) -> None:
    """Every class must have a picture; ``counts`` of each."""
    if counts.all():
        return
    label = int(np.argmin(counts))
    numbers = range(len(source.labels))
    ours = (row for row in sorted(rejected) if row.number in numbers and source.labels[row.number] == label)
    first = next((f" (the first: {row.path}: {row.reason})" for row in ours), "")
    raise ConfigError(
        f"--source {where}: class {source.classes[label]!r} has no usable picture{first}: add {KINDS} files, or"
        " remove the class, and encode to another --dest"
    )


def _sound_record(dest: Dest, shape: tuple[int, int, int], sizes: dict[str, int], number: int) -> ShardRecord | None:
    """The record of a shard, if its tar is as it says: its size, and the CRCs of a few samples."""
    record = dest.read_record(number)
    if record is None or record.samples == 0:
        return record
    count = int(np.prod(shape)) * (2 if record.settings.store == "moments" else 1) * np.dtype(np.float16).itemsize
    path, rows = f"{dest.path}/{record.name}", record.rows
    offsets = np.concatenate([column for name, column in rows.columns.items() if name.endswith("offset")])
    if not (
        sizes.get(record.name) == record.bytes
        and len(rows) == record.samples
        and record.settings.flips == (rows.flip_offset is not None)
        and {len(record.sums), len(record.square_sums)} == {shape[0]}
        and np.isfinite(record.sums + record.square_sums).all()
        and 0 <= offsets.min() <= offsets.max() <= record.bytes - count
    ):
        return None
    for place in np.linspace(0, record.samples - 1, min(_CHECKED_SAMPLES, record.samples)).astype(int):
        begin = int(rows.offset[place])
        if zlib_ng.crc32(read_range(dest.fs, path, begin, begin + count)) != rows.crc32[place]:
            return None
    return record


def _index(source: Source, tokenizer: Tokenizer, shape: tuple[int, int, int], totals: _Totals) -> dict[str, Any]:
    """The contents of ``index.json``."""
    settings = totals.settings
    assert settings is not None  # there is a shard, and each has a record
    channels, height, width = shape
    arrays = totals.samples * (2 if settings.flips else 1)
    raw = of_sums(totals.sums, arrays * height * width)
    shift, scale = [0.0] * channels, [tokenizer.scale or 1.0] * channels
    if tokenizer.scale is None:
        shift, scale = raw.mean, [1 / (std or 1.0) for std in raw.std]
    latent = LatentInfo(
        kind=settings.store, shape=shape, dtype="float16", flips=settings.flips, shift=shift, scale=scale
    )
    return {
        "source": settings.source,
        "seed": settings.seed,
        "samples_per_shard": settings.samples_per_shard,
        "tokenizer": {
            "name": settings.tokenizer,
            "sha256": settings.tokenizer_sha256,
            "image_size": settings.image_size,
            "image_channels": settings.image_channels,
            "precision": settings.precision,
        },
        "latent": latent,
        "classes": source.classes,
        "class_names": source.class_names,
        "rejected": len(totals.rejected),
        "upscaled": totals.upscaled,
        "statistics": normalised(raw, latent),
        "shards": totals.shards,
    }
