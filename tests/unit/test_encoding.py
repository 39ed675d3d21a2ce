"""Which worker this is, which shards it makes, and how large they are."""

from __future__ import annotations

import os
from typing import Any

import pytest

from ig_dist.encoding.settings import Settings, default_samples_per_shard, sample_tar_bytes
from ig_dist.encoding.walk import Worker, shards_to_make, this_worker


def test_torchrun_and_slurm_tell_a_worker_which_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM") or "RANK" in name or name == "WORLD_SIZE":
            monkeypatch.delenv(name)

    def told(option: str | None = None, **environment: int) -> Worker:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, str(value))
            return this_worker(option)

    assert told() == (0, 1, 0, 1)
    assert told("3/5", RANK=1, WORLD_SIZE=2) == (3, 5, 0, 1)
    assert told(RANK=9, WORLD_SIZE=16, LOCAL_RANK=1, LOCAL_WORLD_SIZE=8) == (9, 16, 1, 8)
    array = {"SLURM_ARRAY_TASK_MIN": 10, "SLURM_ARRAY_TASK_MAX": 16, "SLURM_ARRAY_TASK_COUNT": 4}
    assert [told(SLURM_ARRAY_TASK_ID=i, **array)[:2] for i in (10, 12, 14, 16)] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert told(SLURM_ARRAY_TASK_ID=12, SLURM_PROCID=1, SLURM_NTASKS=2, SLURM_LOCALID=1, **array) == (3, 8, 1, 1)
    assert told(SLURM_PROCID=3, SLURM_NTASKS=8, SLURM_LOCALID=3) == (3, 8, 3, 1)


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
    walks = [shards_to_make(shared, 100, Worker(rank, 3, 0, 1)) for rank in range(3)]
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
    walk = shards_to_make(shared, 10, Worker(0, 1, 0, 1))
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
