"""From latents to a finished shard: the tar, then its record."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ig_dist.data.shards import FLIP_SUFFIX, pack_shard, scan_shard
from ig_dist.data.sources import Source
from ig_dist.encoding.encoder import LatentBatch
from ig_dist.encoding.records import Dest, Rejected, ShardRecord, Superseded, record_name
from ig_dist.encoding.settings import Settings, shard_name
from ig_dist.errors import DataError

_CHUNK = 16  # samples that are summed at a time, as float64; a constant, because it decides the last bits


@dataclass
class OpenShard:
    """A shard that is being made."""

    number: int
    images: list[int] = field(default_factory=list)
    """Numbers of the images in the source."""
    latents: list[NDArray[np.float16]] = field(default_factory=list)
    flipped: list[NDArray[np.float16]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    upscaled: int = 0
    places: int = 0

    def add(self, encoded: LatentBatch, source: Source) -> None:
        """Take the next batch."""
        batch = encoded.batch
        self.places += batch.places
        self.upscaled += batch.upscaled
        # a name in another encoding than UTF-8 could not be written down
        paths = (source.paths[number].encode(errors="backslashreplace").decode() for number, _ in batch.rejected)
        rows = zip(batch.rejected, paths, strict=True)
        self.rejected += [Rejected(number, path, reason) for (number, reason), path in rows]
        if len(batch.numbers):
            self.images += batch.numbers.tolist()
            self.latents.append(encoded.latents)
            if encoded.flipped is not None:
                self.flipped.append(encoded.flipped)


def finish_shard(shard: OpenShard, dest: Dest, settings: Settings, labels: NDArray[np.int64]) -> None:
    """Write the tar and the record of a shard, unless another worker has.

    Args:
        shard: with all its batches.
        dest: where to.
        settings: of all shards.
        labels: of all images of the source.

    Raises:
        DataError: latents that are not finite.
    """
    name = shard_name(shard.number)
    rows, data, sums = [], b"", np.zeros((2, 0))
    if shard.images:
        latents, flipped = _joined(shard.latents), _joined(shard.flipped) if shard.flipped else None
        for part in (latents, flipped):
            finite = part is None or np.isfinite(part).all((1, 2, 3))
            if not np.all(finite):
                image = shard.images[int(np.argmin(finite))]
                raise DataError(
                    f"the latent of image {image} is not finite in float16 at --precision {settings.precision}:"
                    " use --precision fp32, or another tokenizer"
                )
        keys = [f"{image:08d}" for image in shard.images]
        data = pack_shard(keys, latents, labels[shard.images], flipped)
        flip_suffix = FLIP_SUFFIX if flipped is not None else None
        rows = scan_shard(io.BytesIO(data), latents.dtype, latents.shape[1:], flip_suffix=flip_suffix)
        sums = channel_sums([part for part in (latents, flipped) if part is not None], settings.store == "moments")
    record = ShardRecord(
        settings=settings,
        name=name,
        bytes=len(data),
        samples=len(rows),
        sha256=hashlib.sha256(data).hexdigest(),
        rows=rows,
        rejected=shard.rejected,
        upscaled=shard.upscaled,
        sums=sums[0].tolist(),
        square_sums=sums[1].tolist(),
    )
    # Workers on one kind of device write the same bytes, and then it does not matter who is last. Those on two kinds
    # may differ in last bits: a finished shard is left alone, and one that both were writing is found by its CRCs
    # (``gather.py``) and made again.
    if dest.has_index() or dest.is_complete(shard.number):
        return
    try:
        if data:
            dest.write(name, data)
        dest.write(record_name(shard.number), record.model_dump_json().encode())
    except Superseded:
        return


def _joined(parts: list[NDArray[np.float16]]) -> NDArray[np.float16]:
    joined = np.concatenate(parts)
    parts.clear()  # a shard is large enough once
    return joined


def channel_sums(parts: Sequence[NDArray[np.float16]], moments: bool) -> NDArray[np.float64]:
    """Per channel, the sum of stored latents and of their squares, (2, C); of moments E[x] and E[x^2] of a draw.

    Args:
        parts: arrays (N, C, h, w), or (N, 2C, h, w): mean and std stacked.
        moments: which of both.
    """
    total: NDArray[np.float64] | None = None
    for part in parts:
        for start in range(0, len(part), _CHUNK):
            values = part[start : start + _CHUNK].astype(np.float64)
            mean, spread = np.split(values, 2, axis=1) if moments else (values, np.zeros((1, 1, 1, 1)))
            sums = np.stack([mean.sum((0, 2, 3)), (mean**2 + spread**2).sum((0, 2, 3))])
            total = sums if total is None else total + sums
    assert total is not None  # at least one sample
    return total
