"""Which worker this is, and which shard it takes next."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from ig_dist.data.sources import Source
from ig_dist.encoding.loader import Request
from ig_dist.encoding.records import Ledger
from ig_dist.encoding.settings import Settings, shard_count, shard_places
from ig_dist.errors import ConfigError

LOOK_AGAIN_S = 10.0


class Worker(NamedTuple):
    """One of several processes that run the same command."""

    rank: int
    world_size: int
    local_rank: int
    """Among those of its machine: its GPU."""
    local_world_size: int


def this_worker(option: str | None) -> Worker:
    """Told by --worker, or by what started this process: torchrun, a SLURM array, srun; else it is alone.

    Args:
        option: --worker, "i/W".

    Raises:
        ConfigError: not of this form.
    """
    number = {name: int(value) for name, value in os.environ.items() if value.isdecimal()}
    if option is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", option)
        if not match or not int(match[1]) < int(match[2]):
            raise ConfigError(f"--worker {option} is not i/W with 0 <= i < W: use e.g. --worker 0/4 to --worker 3/4")
        return Worker(int(match[1]), int(match[2]), 0, 1)
    if "RANK" in number and "WORLD_SIZE" in number:
        local = number.get("LOCAL_RANK", 0), number.get("LOCAL_WORLD_SIZE", 1)
        return Worker(number["RANK"], number["WORLD_SIZE"], *local)
    tasks = number.get("SLURM_NTASKS", 1) if "SLURM_PROCID" in number else 1
    index, count = number.get("SLURM_PROCID", 0) % tasks, tasks
    if "SLURM_ARRAY_TASK_ID" in number:
        first = number.get("SLURM_ARRAY_TASK_MIN", 0)
        spread = number.get("SLURM_ARRAY_TASK_MAX", number["SLURM_ARRAY_TASK_ID"]) - first + 1
        arrays = number.get("SLURM_ARRAY_TASK_COUNT", spread)
        array = (number["SLURM_ARRAY_TASK_ID"] - first) * arrays // spread  # ids may have gaps
        index, count = array * tasks + index, arrays * tasks
    return Worker(index, count, number.get("SLURM_LOCALID", 0), 1)


def shards_to_make(ledger: Ledger, shards: int, worker: Worker) -> Iterator[int]:
    """Shards for this worker, as it asks for them: its own part first, then any that is missing.

    The others come in an order of its own, so that two workers that help a third seldom make the same shard. What
    another worker is making now counts as missing: that worker may be dead.
    """
    begin, end = (i * shards // worker.world_size for i in (worker.rank, worker.rank + 1))
    others = [number for number in range(shards) if not begin <= number < end]
    Random(worker.rank).shuffle(others)
    for number in [*range(begin, end), *others]:
        if number in ledger.finished:
            continue
        ledger.look()
        if ledger.ended:
            return
        if number not in ledger.finished:
            yield number


def requests(
    source: Source, order: list[int], settings: Settings, ledger: Ledger, worker: Worker, batch_size: int
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
