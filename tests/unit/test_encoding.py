"""Which shards a worker makes, and how large they are."""

from __future__ import annotations

from typing import Any

from ig_dist.encoding.settings import Settings, default_samples_per_shard, sample_tar_bytes
from ig_dist.encoding.walk import shards_to_make
from ig_dist.this_process import Process


class Shared:
    """A ledger in memory: what the workers of a test have finished."""

    def __init__(self) -> None:
        self.finished: set[int] = set()
        self.ended = False

    def look(self) -> None:
        pass


def test_workers_share_the_shards_and_take_over_those_of_the_dead() -> None:
    shared: Any = Shared()
    made: list[list[int]] = [[], [], []]
    walks = [shards_to_make(shared, 100, Process(rank, 3, 0, 1, 0)) for rank in range(3)]
    for turn in range(200):
        for rank, walk in enumerate(walks):
            if rank == 1 and turn >= 10:  # it has died
                continue
            number = next(walk, None)
            if number is not None:
                made[rank].append(number)
                shared.finished.add(number)
    assert shared.finished == set(range(100)) and sum(map(len, made)) == 100  # nothing twice
    assert made[0][:33] == list(range(33)) and made[2][:34] == list(range(66, 100)) and made[1] == list(range(33, 43))


def test_a_walk_ends_with_the_index() -> None:
    shared: Any = Shared()
    walk = shards_to_make(shared, 10, Process(0, 1, 0, 1, 0))
    assert next(walk) == 0
    shared.ended = True
    assert next(walk, None) is None


def test_shards_are_about_256_mb_or_an_eighth_of_the_set() -> None:
    values: dict[str, Any] = {
        "source": "s",
        "tokenizer": "t",
        "tokenizer_sha256": "0",
        "precision": "fp32",
        "image_size": 256,
        "image_channels": 3,
        "store": "moments",
        "flips": False,
        "seed": 0,
        "samples_per_shard": 1,
    }
    moments = sample_tar_bytes((4, 32, 32), Settings(**values))
    assert moments == 512 + 16_384 + 512 + 1024
    samples = default_samples_per_shard(1_281_167, moments)
    assert samples % 256 == 0 and 0.9 < samples * moments / 2**28 <= 1
    assert sample_tar_bytes((4, 32, 32), Settings(**(values | {"flips": True}))) == 2 * (moments - 1024) + 1024
    assert default_samples_per_shard(1797, 2048) == 256 and default_samples_per_shard(10, moments) == 256
    assert default_samples_per_shard(50_000, moments) == 6_400
    assert default_samples_per_shard(1_000_000, 2**29) == 256
