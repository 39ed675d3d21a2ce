"""Which shard a worker takes next."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from random import Random

from ig_dist.data.sources import Source
from ig_dist.encoding.loader import Request
from ig_dist.encoding.records import Ledger
from ig_dist.encoding.settings import Settings, shard_count, shard_places
from ig_dist.this_process import Process

LOOK_AGAIN_S = 10.0


def shards_to_make(ledger: Ledger, shards: int, worker: Process) -> Iterator[int]:
    """Shards for this worker, as it asks for them: its own part first, then any that is missing.

    The others come in an order of its own, so that two workers that help a third seldom make the same shard. What
    another worker is making now counts as missing: that worker may be dead. Within its own part, which others seldom
    help with, it looks every ``LOOK_AGAIN_S``: each look lists all that is finished.
    """
    looked = -math.inf
    begin, end = (i * shards // worker.world_size for i in (worker.rank, worker.rank + 1))
    others = [number for number in range(shards) if not begin <= number < end]
    Random(worker.rank).shuffle(others)
    for number in [*range(begin, end), *others]:
        if number in ledger.finished:
            continue
        if not begin <= number < end or time.monotonic() - looked > LOOK_AGAIN_S:
            ledger.look()
            looked = time.monotonic()
        if ledger.ended:
            return
        if number not in ledger.finished:
            yield number


def requests(
    source: Source, order: list[int], settings: Settings, ledger: Ledger, worker: Process, batch_size: int
) -> Iterator[Request]:
    """The batches of the shards to make. A shard that another worker has finished meanwhile is left in the middle."""
    looked = time.monotonic()
    for shard in shards_to_make(ledger, shard_count(len(order), settings.samples_per_shard), worker):
        places = shard_places(shard, len(order), settings.samples_per_shard)
        for start in range(places.start, places.stop, batch_size):
            if time.monotonic() - looked > LOOK_AGAIN_S:
                ledger.look()
                looked = time.monotonic()
            if ledger.ended or shard in ledger.finished:
                break
            stop = min(start + batch_size, places.stop)
            numbers = order[start:stop]
            yield Request(shard, stop == places.stop, numbers, [source.item(i) for i in numbers])
