"""The end of an encoding: all records become the index. Any worker may do it, and writes the same bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
from zlib_ng import zlib_ng

from ig_dist.background import in_parallel
from ig_dist.data.images import KINDS
from ig_dist.data.index import LatentInfo, SampleTable, write_index
from ig_dist.data.shards import SampleRow
from ig_dist.data.sources import Source
from ig_dist.encoding.records import Dest, Rejected, ShardRecord, Superseded, TooManyRejected
from ig_dist.encoding.settings import Settings
from ig_dist.errors import ConfigError
from ig_dist.latents.tokenizer import Tokenizer
from ig_dist.storage.files import read_range

_THREADS = 8
_CHECKED_SAMPLES = 4  # of each shard


def gather(
    dest: Dest,
    source: Source,
    where: str,
    tokenizer: Tokenizer,
    shape: tuple[int, int, int],
    shards: int,
) -> bool:
    """Write ``rejected.csv``, the side table and the index.

    Args:
        dest: where all shards are finished.
        source: what was encoded.
        where: the same as the user gave it.
        tokenizer: what encoded it.
        shape: of a latent that the model sees, (C, h, w).
        shards: how many, with those that turned out empty.

    Returns:
        False if a shard is not as its record says, which is removed: the shard must be made again.

    Raises:
        ConfigError: a class without a picture.
    """
    records = in_parallel(dest.read_record, range(shards), _THREADS, dest.patience.stop)
    sound = in_parallel(partial(_is_sound, dest, shape, dest.sizes()), records, _THREADS, dest.patience.stop)
    if not all(sound):
        for number, good in enumerate(sound):
            if not good:
                dest.remove_record(number)
        return False
    whole = [record for record in records if record is not None]
    rows = [row for record in whole for row in record.rows]
    rejected = [row for record in whole for row in record.rejected]
    labels = np.array([row.label for row in rows], np.int64)
    try:
        dest.write_rejected(rejected)
        refuse_empty_classes(source, labels, rejected, where)
        # the first record's settings: a tokenizer may have another name (a path) for each worker
        info = _index(whole[0].settings, source, tokenizer, shape, whole)
        if not dest.has_index():  # one that is there stays
            with dest.writing("index.json"):
                write_index(dest.url, info, SampleTable.from_rows(rows), dest.patience)
    except Superseded:
        pass
    return True


def too_many(rejected: Sequence[Rejected], total: int, max_rejected: float) -> bool:
    """Whether more files are rejected than may be."""
    return len(rejected) > max_rejected * total + 1e-6  # 0.29 of 100 files are 29


def refuse(
    rejected: Sequence[Rejected], looked_at: int, total: int, max_rejected: float, dest: Dest, where: str
) -> NoReturn:
    """Say how many files are rejected and what would allow them, and list them in ``rejected.csv``.

    Raises:
        TooManyRejected: always.
    """
    dest.write_rejected(rejected)
    first = min(rejected)
    so_far = "" if looked_at >= total else f" so far, with {looked_at} looked at"
    enough = math.ceil(1000 * len(rejected) / looked_at) / 1000
    raise TooManyRejected(
        f"--source {where}: {len(rejected)} of {total} files are rejected{so_far}, the first is {first.path}:"
        f" {first.reason} (all in {dest.url}/rejected.csv); mend or remove them, or allow them with --max-rejected"
        f" {enough:g} (it was {max_rejected:g})"
    )


def refuse_empty_classes(source: Source, labels: Any, rejected: Sequence[Rejected], where: str) -> None:
    """Every class must have a picture.

    Raises:
        ConfigError: one has none.
    """
    counts = np.bincount(labels, minlength=len(source.classes))
    if counts.all():
        return
    label = int(np.argmin(counts))
    first = next(row for row in sorted(rejected) if source.labels[row.number] == label)
    raise ConfigError(
        f"--source {where}: class {source.classes[label]!r} has no usable picture"
        f" (the first: {first.path}: {first.reason}): add {KINDS} files, or remove the class, and encode to"
        " another --dest"
    )


def _is_sound(dest: Dest, shape: tuple[int, int, int], sizes: dict[str, int], record: ShardRecord | None) -> bool:
    """Whether there is a record, and its tar is as it says: its size, and the CRCs of a few samples."""
    if record is None or record.samples == 0:
        return record is not None
    if sizes.get(record.name) != record.bytes:
        return False
    count = int(np.prod(shape)) * (2 if record.settings.store == "moments" else 1) * np.dtype(np.float16).itemsize
    chosen = np.linspace(0, record.samples - 1, min(_CHECKED_SAMPLES, record.samples)).astype(int)
    return all(_crc(dest, record.name, row, count) == row.crc32 for row in (record.rows[i] for i in chosen))


def _crc(dest: Dest, name: str, row: SampleRow, count: int) -> int:
    return zlib_ng.crc32(read_range(dest.fs, f"{dest.path}/{name}", row.offset, row.offset + count, dest.patience))


def _index(
    settings: Settings,
    source: Source,
    tokenizer: Tokenizer,
    shape: tuple[int, int, int],
    records: Sequence[ShardRecord],
) -> dict[str, Any]:
    """The contents of ``index.json``."""
    channels, height, width = shape
    full = [record for record in records if record.samples]
    arrays = sum(record.samples for record in full) * (2 if settings.flips else 1)
    sums = np.sum([[record.sums, record.square_sums] for record in full], axis=0)
    mean, square = sums / (arrays * height * width)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    shift, scale = np.zeros(channels), np.full(channels, tokenizer.scale or 1.0)
    if tokenizer.scale is None:
        shift, scale = mean, 1 / np.where(std > 0, std, 1)
    latent = LatentInfo(
        kind=settings.store,
        shape=shape,
        dtype="float16",
        flips=settings.flips,
        shift=shift.tolist(),
        scale=scale.tolist(),
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
        "rejected": sum(len(record.rejected) for record in records),
        "upscaled": sum(record.upscaled for record in records),
        "statistics": {"mean": ((mean - shift) * scale).tolist(), "std": (std * scale).tolist()},
        "shards": [record.model_dump(include={"name", "bytes", "samples", "sha256"}) for record in full],
    }
