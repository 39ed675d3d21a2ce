"""What an encoding will take: counts, bytes, and hours at a rate measured on a few images."""

from __future__ import annotations

import math
import time

from rich.filesize import decimal

from ig_dist.encoding.encode import Job
from ig_dist.encoding.loader import Request, decode
from ig_dist.encoding.settings import shard_count
from ig_dist.encoding.shards import stored_latents
from ig_dist.rng import Purpose, permutation

MEASURED_IMAGES = 48


def measure(job: Job, order: list[int]) -> tuple[int, float, float]:
    """Images measured, the first of the shuffle, and images/s of one decoding process and of the device."""
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
    return len(numbers), decoding, encoding


def estimate(job: Job, share: float, sample_bytes: int, processes: int) -> list[str]:
    """Lines that say what an encoding by so many processes will take; ``job`` has a ``share`` of the source."""
    order = permutation(job.settings.seed, Purpose.ENCODE_ORDER, 0, len(job.source.labels)).tolist()
    measured, decoding, encoding = measure(job, order)
    # processes that one device, and two, never wait for
    feeding = [math.ceil(devices * encoding / decoding) if math.isfinite(encoding) else 0 for devices in (1, 2)]
    all_decoding = decoding * max(job.decoders, 1)
    rate = 1 / (1 / all_decoding + 1 / encoding)  # a CPU is shared with the decoding processes
    if job.decoders and job.device.type == "cuda":  # a GPU works beside them
        rate = min(all_decoding, encoding)
    images = round(len(order) / share)
    shards = shard_count(images, job.settings.samples_per_shard)
    lines = [
        f"{'' if share == 1 else 'about '}{images:,} images of {len(job.source.classes):,} classes"
        f" -> {shards:,} shards, {decimal(images * sample_bytes)}",
        f"measured on {measured} images: a process decodes {decoding:,.0f} images/s, {job.device} encodes"
        f" {encoding:,.0f} images/s, fed by {feeding[0]} decoding processes (two by {feeding[1]})",
    ]
    for count in sorted({1, processes}):
        who = "1 process" if count == 1 else f"{count} processes, each on a GPU or machine of its own,"
        hours = images / (rate * count) / 3600
        lines.append(f"{who} ({job.decoders} decoding): {rate * count:,.0f} images/s, {hours:,.2f} hours")
    return lines
