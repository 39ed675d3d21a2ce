"""What an encoding will take: counts, bytes, and hours at a rate measured on a few images."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from rich.filesize import decimal

from ig_dist.encoding.encode import Job
from ig_dist.encoding.loader import Request, decode
from ig_dist.encoding.settings import shard_count
from ig_dist.encoding.shards import stored_latents
from ig_dist.rng import Purpose, permutation

MEASURED_IMAGES = 48


class Rates(NamedTuple):
    """Images/s of one process."""

    images: int
    """That were measured."""
    decoding: float
    """Of one decoding process."""
    encoding: float
    """Of the device."""

    def feeding(self, devices: int) -> int:
        """Decoding processes that so many devices never wait for."""
        return math.ceil(devices * self.encoding / self.decoding) if math.isfinite(self.encoding) else 0

    def overall(self, decoders: int, device: torch.device) -> float:
        """Images/s with so many decoding processes. A GPU works beside them; a CPU is shared with them."""
        decoding = self.decoding * max(decoders, 1)
        if decoders and device.type == "cuda":
            return min(decoding, self.encoding)
        return 1 / (1 / decoding + 1 / self.encoding)


def measure(job: Job, order: list[int]) -> Rates:
    """Decode and encode the first images of the shuffle, and throw the result away."""
    numbers, settings = order[:MEASURED_IMAGES], job.settings
    request = Request(0, True, numbers, [job.source.item(number) for number in numbers])
    began = time.perf_counter()
    batch = decode(request, settings.image_size, settings.image_channels)
    decoding = len(numbers) / (time.perf_counter() - began)
    images, ids = (part[: job.batch_size].to(job.device) for part in (batch.images, batch.numbers))
    repeats = 2 if len(ids) else 0  # the first one warms up
    for _ in range(repeats):
        began = time.perf_counter()
        stored_latents(job.tokenizer, images, ids, settings)[-1].cpu()  # waits for the device
    encoding = len(ids) / (time.perf_counter() - began) if repeats else float("inf")
    return Rates(len(numbers), decoding, encoding)


def estimate(job: Job, share: float, sample_bytes: int, processes: int) -> list[str]:
    """Lines that say what an encoding will take.

    Args:
        job: of the source, or of a part of it.
        share: that part.
        sample_bytes: of a sample in its tar.
        processes: that will share the work.
    """
    order = permutation(job.settings.seed, Purpose.ENCODE_ORDER, 0, len(job.source.labels)).tolist()
    rates = measure(job, order)
    rate, images = rates.overall(job.decoders, job.device), round(len(order) / share)
    shards = shard_count(images, job.settings.samples_per_shard)
    lines = [
        f"{'' if share == 1 else 'about '}{images:,} images of {len(job.source.classes):,} classes"
        f" -> {shards:,} shards, {decimal(images * sample_bytes)}",
        f"measured on {rates.images} images: a process decodes {rates.decoding:,.0f} images/s,"
        f" {job.device} encodes {rates.encoding:,.0f} images/s, fed by {rates.feeding(1)} decoding processes (two by"
        f" {rates.feeding(2)})",
    ]
    for count in sorted({1, processes}):
        who = "1 process" if count == 1 else f"{count} processes, each on a GPU or machine of its own,"
        hours = images / (rate * count) / 3600
        lines.append(f"{who} ({job.decoders} decoding): {rate * count:,.0f} images/s, {hours:,.2f} hours")
    return lines
