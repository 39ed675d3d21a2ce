"""From batches of images to a finished shard: latents, the tar, batch by batch, then its record."""

import hashlib
import io
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ig_dist.autoencoders.tokenizers import Tokenizer
from ig_dist.data.index import SampleTable
from ig_dist.data.shards import FLIP_SUFFIX, SampleRow, pack_shard, scan_shard, tar_end
from ig_dist.data.sources import Source
from ig_dist.data.statistics import ChannelSums
from ig_dist.encoding.loader import ImageBatch
from ig_dist.encoding.records import Dest, Rejected, ShardRecord, Superseded
from ig_dist.encoding.settings import Settings, sample_tar_bytes
from ig_dist.errors import DataError
from ig_dist.rng import Purpose, normal

_IN_FLIGHT = 2  # batches whose latents are still on the device


class LatentBatch(NamedTuple):
    """The stored latents of a batch, (B, channels or 2 channels, h, w) float16 on the host."""

    batch: ImageBatch
    latents: NDArray[np.float16]
    flipped: NDArray[np.float16] | None


@torch.inference_mode()
def stored_latents(tokenizer: Tokenizer, images: Tensor, numbers: Tensor, settings: Settings) -> list[Tensor]:
    """What a shard holds of images: their latents, with ``flips`` also those of the mirrored images, float16.

    Args:
        tokenizer: on the device of the images.
        images: (B, H, W, channels) uint8.
        numbers: (B,) int64, of the images in the source: the key of posterior draws.
        settings: what is stored.
    """
    stored = []
    for step, view in enumerate([images, images.flip(2)] if settings.flips else [images]):
        latents = tokenizer.encode(view)
        if tokenizer.stochastic and settings.store == "sample":
            mean, std = latents.chunk(2, dim=1)
            latents = mean + std * normal(settings.seed, Purpose.ENCODE_POSTERIOR, numbers, mean.shape[1:], step=step)
        stored.append(latents.to(torch.float16))
    return stored


def latent_batches(
    batches: Iterable[ImageBatch], tokenizer: Tokenizer, settings: Settings, device: torch.device
) -> Iterator[LatentBatch]:
    """Encode batches. On a GPU the copies back run beside the next batch's encoding."""
    in_flight: deque[tuple[ImageBatch, list[Tensor], Any]] = deque()
    for batch in batches:
        images, numbers = (part.to(device, non_blocking=True) for part in (batch.images, batch.numbers))
        stored = stored_latents(tokenizer, images, numbers, settings) if len(numbers) else []
        done = None
        if device.type == "cuda":
            stored = [
                torch.empty_like(part, device="cpu", pin_memory=True).copy_(part, non_blocking=True) for part in stored
            ]
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        in_flight.append((batch._replace(images=batch.images[:0]), stored, done))
        if len(in_flight) > _IN_FLIGHT or device.type != "cuda":
            yield _arrived(*in_flight.popleft())
    while in_flight:
        yield _arrived(*in_flight.popleft())


def _arrived(batch: ImageBatch, stored: list[Tensor], done: Any) -> LatentBatch:
    if done is not None:
        done.synchronize()
    # Copies: pinned memory goes back to be used again.
    arrays = [part.numpy().copy() for part in stored]
    return LatentBatch(batch, arrays[0] if arrays else np.empty(0, np.float16), arrays[1] if arrays[1:] else None)


@dataclass
class OpenShard:
    """A shard that is being made: each batch is packed while the processor's cache still has it."""

    number: int
    tar: io.BytesIO = field(default_factory=io.BytesIO)  # its samples so far
    sha256: Any = field(default_factory=hashlib.sha256)  # of these bytes
    rows: list[SampleRow] = field(default_factory=list)
    sums: ChannelSums | None = None
    rejected: list[Rejected] = field(default_factory=list)
    upscaled: int = 0
    places: int = 0

    def add(self, encoded: LatentBatch, source: Source, settings: Settings) -> None:
        """Take the next batch."""
        batch, latents, flipped = encoded
        self.places += batch.places
        self.upscaled += batch.upscaled
        self.rejected += rejected_of(batch, source)
        if not len(batch.numbers):
            return
        channels = latents.shape[1] // (2 if settings.store == "moments" else 1)
        self.sums = self.sums or ChannelSums(settings.store, channels)
        labels = source.labels[batch.numbers.numpy()]
        packed = pack_shard([f"{image:08d}" for image in batch.numbers.tolist()], latents, labels, flipped)
        flip_suffix = FLIP_SUFFIX if flipped is not None else None
        rows = scan_shard(
            io.BytesIO(packed), latents.dtype, latents.shape[1:], flip_suffix=flip_suffix, visit=self.sums.add
        )
        begin = self.tar.tell()
        moved = begin if flipped is not None else 0  # there is none at -1
        self.rows += [row._replace(offset=row.offset + begin, flip_offset=row.flip_offset + moved) for row in rows]
        # without the zeros that end a tar
        self.write(memoryview(packed)[: len(rows) * sample_tar_bytes((channels, *latents.shape[2:]), settings)])

    def write(self, data: memoryview) -> None:
        """Append to the tar."""
        self.tar.write(data)
        self.sha256.update(data)


def rejected_of(batch: ImageBatch, source: Source) -> list[Rejected]:
    """The files of a batch that hold no picture."""
    # a name in another encoding than UTF-8 could not be written down
    paths = (source.paths[number].encode(errors="backslashreplace").decode() for number, _ in batch.rejected)
    return [Rejected(number, path, reason) for (number, reason), path in zip(batch.rejected, paths, strict=True)]


def finish_shard(shard: OpenShard, dest: Dest, settings: Settings) -> None:
    """Write the tar and the record of a shard that has all its batches, unless another worker has."""
    sums = shard.sums or ChannelSums(settings.store, 0)
    sums.close()
    if sums.not_finite:
        raise DataError(
            f"the latent of image {int(sums.not_finite[0])} is not finite in float16 at --precision"
            f" {settings.precision}: use --precision fp32, or another tokenizer"
        )
    if dest.has_index() or dest.is_complete(shard.number):
        return
    if shard.rows:
        shard.write(memoryview(tar_end(shard.tar.tell())))
    data, sha256 = shard.tar.getvalue(), shard.sha256.hexdigest()
    try:
        record = ShardRecord(
            settings=settings,
            name=dest.create_shard(shard.number, data, sha256),
            bytes=len(data),
            samples=len(shard.rows),
            sha256=sha256,
            rows=SampleTable.from_rows(shard.rows),
            rejected=shard.rejected,
            upscaled=shard.upscaled,
            sums=sums.sums[0].tolist(),
            square_sums=sums.sums[1].tolist(),
        )
        dest.create_record(shard.number, record)
    except Superseded:
        return
