"""From latents to a finished shard: the tar, then its record."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ig_dist.data.index import SampleTable
from ig_dist.data.shards import FLIP_SUFFIX, pack_shard, scan_shard
from ig_dist.data.sources import Source
from ig_dist.data.statistics import ChannelSums
from ig_dist.encoding.encoder import LatentBatch
from ig_dist.encoding.loader import ImageBatch
from ig_dist.encoding.records import Dest, Rejected, ShardRecord, Superseded
from ig_dist.encoding.settings import Settings
from ig_dist.errors import DataError


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
        self.rejected += rejected_of(batch, source)
        if len(batch.numbers):
            self.images += batch.numbers.tolist()
            self.latents.append(encoded.latents)
            if encoded.flipped is not None:
                self.flipped.append(encoded.flipped)


def rejected_of(batch: ImageBatch, source: Source) -> list[Rejected]:
    """The files of a batch that hold no picture."""
    # a name in another encoding than UTF-8 could not be written down
    paths = (source.paths[number].encode(errors="backslashreplace").decode() for number, _ in batch.rejected)
    return [Rejected(number, path, reason) for (number, reason), path in zip(batch.rejected, paths, strict=True)]


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
    rows, data, sums = [], b"", ChannelSums(settings.store, 0)
    if shard.images:
        latents, flipped = _joined(shard.latents), _joined(shard.flipped) if shard.flipped else None
        data = pack_shard([f"{image:08d}" for image in shard.images], latents, labels[shard.images], flipped)
        sums = ChannelSums(settings.store, latents.shape[1] // (2 if settings.store == "moments" else 1))
        flip_suffix = FLIP_SUFFIX if flipped is not None else None
        rows = scan_shard(io.BytesIO(data), latents.dtype, latents.shape[1:], flip_suffix=flip_suffix, visit=sums.add)
        sums.close()
        if sums.not_finite:
            raise DataError(
                f"the latent of image {int(sums.not_finite[0])} is not finite in float16 at --precision"
                f" {settings.precision}: use --precision fp32, or another tokenizer"
            )
    if dest.has_index() or dest.is_complete(shard.number):
        return
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        record = ShardRecord(
            settings=settings,
            name=dest.create_shard(shard.number, data, sha256),
            bytes=len(data),
            samples=len(rows),
            sha256=sha256,
            rows=SampleTable.from_rows(rows),
            rejected=shard.rejected,
            upscaled=shard.upscaled,
            sums=sums.sums[0].tolist(),
            square_sums=sums.sums[1].tolist(),
        )
        dest.create_record(shard.number, record)
    except Superseded:
        return


def _joined(parts: list[NDArray[np.float16]]) -> NDArray[np.float16]:
    joined = np.concatenate(parts)
    parts.clear()  # a shard is large enough once
    return joined
