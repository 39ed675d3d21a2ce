"""Encoding a source: the workers' loop, from images to the index, and what it will take."""

import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from random import Random

import torch
from rich.filesize import decimal

from ig_dist.autoencoders.tokenizers import Tokenizer
from ig_dist.data.index import ShardIndex, read_index
from ig_dist.data.sources import Source
from ig_dist.encoding.gather import gather, refuse, too_many
from ig_dist.encoding.loader import ImageBatch, Request, decode, image_batches
from ig_dist.encoding.records import PARTS, Dest, Ledger, Rejected, refuse_others
from ig_dist.encoding.settings import Settings, settings_of, shard_count, shard_places
from ig_dist.encoding.shards import OpenShard, finish_shard, latent_batches, rejected_of, stored_latents
from ig_dist.rng import Purpose, permutation
from ig_dist.storage.background import in_background
from ig_dist.terminal.progress import progress
from ig_dist.this_process import Process

LOOK_AGAIN_S = 10.0
STOP_S = 5.0  # that a stopped worker waits for the shard that is being written
MEASURED_IMAGES = 48  # for an estimate
COUNT_S = 60.0  # in which rejected files are counted on, when they are too many already


@dataclass(frozen=True)
class Job:
    """All that the workers' loop needs."""

    source: Source
    where: str  # the source as the user gave it
    dest: Dest
    settings: Settings
    tokenizer: Tokenizer
    device: torch.device
    shape: tuple[int, int, int]  # of a latent that the model sees, (C, h, w)
    worker: Process
    decoders: int  # processes that decode images; 0: this one does
    batch_size: int
    max_rejected: float


def existing_settings(dest: Dest) -> Settings | None:
    """The settings of the shards that are there; None: there are none."""
    if dest.has_index():
        return settings_of(read_index(dest.url).info)
    for name in sorted(dest.sizes(PARTS)):
        number = name.removeprefix("shard-").removesuffix(".json")
        record = dest.read_record(int(number)) if number.isdecimal() else None
        if record is not None:
            return record.settings
    return None


def finished_index(dest: Dest, settings: Settings) -> ShardIndex | None:
    """The index, if everything is finished; what a killed worker left beside it is removed."""
    if not dest.has_index():
        return None
    index = read_index(dest.url)
    refuse_others(dest, settings_of(index.info), settings)
    dest.sweep({shard.name for shard in index.info.shards})
    return index


def encode(job: Job) -> ShardIndex:
    """Make what is missing until nothing is, and write the index; or find that another worker has.

    Raises:
        ConfigError: the dest holds something else, or a class has no picture.
        TooManyRejected: more files than allowed hold no picture.
        DataError: the source or the storage fails.
    """
    total = len(job.source.labels)
    order = permutation(job.settings.seed, Purpose.ENCODE_ORDER, 0, total).tolist()
    shards = shard_count(total, job.settings.samples_per_shard)
    ledger = Ledger(job.dest, job.settings, shards)
    while True:
        ledger.look()
        complete = len(ledger.finished) == shards
        if not ledger.ended and not complete:
            job.dest.make()
            _make_missing(job, ledger, order)
        elif too_many(ledger.rejected, total, job.max_rejected):
            refuse(ledger.rejected, total, total, job.max_rejected, job.dest, job.where)
        elif ledger.ended or gather(job.dest, job.source, job.where, job.tokenizer, job.shape, shards):
            index = finished_index(job.dest, job.settings)
            if index is not None:
                return index


def _make_missing(job: Job, ledger: Ledger, order: list[int]) -> None:
    """Make the shards that no worker has finished."""
    batches = image_batches(
        _requests(job, ledger, order),
        job.settings.image_size,
        job.settings.image_channels,
        workers=job.decoders,
        pin=job.device.type == "cuda",
    )
    shard, made = OpenShard(-1), set[int]()
    writing: Future[None] | None = None
    try:
        with progress("encode", len(order), "images", _images(ledger.finished, job)) as advance:
            wanted = _until_too_many(batches, job, ledger, len(order))
            for encoded in latent_batches(wanted, job.tokenizer, job.settings, job.device):
                if encoded.batch.shard != shard.number:  # the one before is finished, or was left to another worker
                    shard = OpenShard(encoded.batch.shard)
                shard.add(encoded, job.source, job.settings)
                if encoded.batch.last:
                    if writing is not None:
                        writing.result()
                    # a thread writes the last shard while this one feeds the device with the next
                    writing = in_background(partial(finish_shard, shard, job.dest, job.settings))
                    made.add(shard.number)
                in_hand = 0 if shard.number in made else shard.places
                advance(encoded.batch.places, done=_images(ledger.finished | made, job) + in_hand)
            if writing is not None:
                writing.result()
    except BaseException:
        # also of a signal: a storage that works gets the last shard, one that fails holds nobody up
        wait([writing] if writing else [], timeout=STOP_S)
        job.dest.patience.stop.set()
        raise


def _requests(job: Job, ledger: Ledger, order: list[int]) -> Iterator[Request]:
    """The batches of the shards to make. A shard that another worker has finished meanwhile is left in the middle."""
    size = job.settings.samples_per_shard
    for shard in shards_to_make(ledger, shard_count(len(order), size), job.worker):
        places = shard_places(shard, len(order), size)
        for start in range(places.start, places.stop, job.batch_size):
            ledger.look(LOOK_AGAIN_S)
            if ledger.ended or shard in ledger.finished:
                break
            stop = min(start + job.batch_size, places.stop)
            numbers = order[start:stop]
            yield Request(shard, stop == places.stop, numbers, [job.source.item(i) for i in numbers])


def shards_to_make(ledger: Ledger, shards: int, worker: Process) -> Iterator[int]:
    """Shards for this worker, as it asks for them: its own part first, then any that is missing.

    The others come in an order of its own, so that two workers that help a third seldom make the same shard. What
    another worker is making now counts as missing: that worker may be dead. Within its own part, which others seldom
    help with, it looks every ``LOOK_AGAIN_S``.
    """
    begin, end = (i * shards // worker.world_size for i in (worker.rank, worker.rank + 1))
    others = [number for number in range(shards) if not begin <= number < end]
    Random(worker.rank).shuffle(others)
    for number in [*range(begin, end), *others]:
        if number in ledger.finished:
            continue
        ledger.look(LOOK_AGAIN_S if begin <= number < end else 0.0)
        if ledger.ended:
            return
        if number not in ledger.finished:
            yield number


def _until_too_many(batches: Iterator[ImageBatch], job: Job, ledger: Ledger, total: int) -> Iterator[ImageBatch]:
    """The batches, until more files are rejected than may be. The others are then only decoded, to count them all."""
    own: dict[int, Rejected] = {}
    known, looked_at, ends_at = [*ledger.rejected], _images(ledger.finished, job), float("inf")
    for batch in batches:
        looked_at += batch.places
        if batch.rejected:
            own |= {row.number: row for row in rejected_of(batch, job.source)}
            known = [*({row.number: row for row in ledger.rejected} | own).values()]
        if too_many(known, total, job.max_rejected):
            ends_at = min(ends_at, time.monotonic() + COUNT_S)
            if time.monotonic() > ends_at:
                break
        else:
            yield batch
    if too_many(known, total, job.max_rejected):
        refuse(known, min(looked_at, total), total, job.max_rejected, job.dest, job.where)


def _images(shards: set[int], job: Job) -> int:
    """Images in shards."""
    total, size = len(job.source.labels), job.settings.samples_per_shard
    return sum(len(shard_places(number, total, size)) for number in shards)


def _measure(job: Job, order: list[int]) -> tuple[int, float, float]:
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
    measured, decoding, encoding = _measure(job, order)
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
