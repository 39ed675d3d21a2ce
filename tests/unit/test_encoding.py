"""Which shards a worker makes, and how large they are."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ig_dist.data.index import SampleTable
from ig_dist.data.shards import FLIP_SUFFIX, pack_shard, scan_shard
from ig_dist.data.sources.source import array_source
from ig_dist.data.statistics import ChannelSums
from ig_dist.encoding.encode import shards_to_make
from ig_dist.encoding.loader import ImageBatch
from ig_dist.encoding.records import Dest, Ledger
from ig_dist.encoding.settings import Settings, default_samples_per_shard, sample_tar_bytes
from ig_dist.encoding.shards import LatentBatch, OpenShard, finish_shard
from ig_dist.this_process import Process

SETTINGS: dict[str, Any] = {
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


class Shared:
    """A ledger in memory: what the workers of a test have finished."""

    def __init__(self) -> None:
        self.finished: set[int] = set()
        self.ended = False

    def look(self, every_s: float = 0.0) -> None:
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


def test_a_worker_does_not_list_all_shards_before_each_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest, listed = Dest(str(tmp_path)), list[str]()
    monkeypatch.setattr(dest, "sizes", lambda folder="": listed.append(folder) or {})
    ledger = Ledger(dest, Settings(**SETTINGS), 1000)
    assert list(shards_to_make(ledger, 1000, Process(0, 1, 0, 1, 0))) == list(range(1000))
    assert len(listed) < 10


def test_a_walk_ends_with_the_index() -> None:
    shared: Any = Shared()
    walk = shards_to_make(shared, 10, Process(0, 1, 0, 1, 0))
    assert next(walk) == 0
    shared.ended = True
    assert next(walk, None) is None


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("store", ["moments", "sample"])
def test_a_shard_packed_batch_by_batch_is_one_tar_with_one_set_of_rows(flips: bool, store: Any, tmp_path: Path) -> None:
    random, settings = np.random.default_rng(0), Settings(**(SETTINGS | {"store": store, "flips": flips}))
    shape = (100, 8 if store == "moments" else 4, 5, 5)
    latents, flipped = (np.abs(random.standard_normal(shape)).astype(np.float16) for _ in range(2))
    labels = random.integers(0, 12, 100)
    source = array_source("s", np.zeros((100, 1, 1, 3), np.uint8), labels, 12, None)
    sums = ChannelSums(store, 4)
    tar = pack_shard([f"{i:08d}" for i in range(100)], latents, labels, flipped if flips else None)
    suffix = FLIP_SUFFIX if flips else None
    rows = scan_shard(io.BytesIO(tar), latents.dtype, shape[1:], flip_suffix=suffix, visit=sums.add)
    sums.close()
    for size in (7, 64, 100):
        shard = OpenShard(3)
        for begin in range(0, 100, size):
            numbers, part = torch.arange(begin, min(begin + size, 100)), slice(begin, begin + size)
            batch = ImageBatch(3, begin + size >= 100, len(numbers), numbers, torch.empty(0), [], 0, None)
            shard.add(LatentBatch(batch, latents[part], flipped[part] if flips else None), source, settings)
        dest = Dest(str(tmp_path / str(size)))
        finish_shard(shard, dest, settings)
        assert (tmp_path / str(size) / "shard-000003.tar").read_bytes() == tar
        record = dest.read_record(3)
        assert record is not None and record.sha256 == hashlib.sha256(tar).hexdigest()
        made, expected = record.rows.columns, SampleTable.from_rows(rows).columns
        assert made.keys() == expected.keys() and all(
            np.array_equal(np.asarray(made[name]), np.asarray(expected[name])) for name in made
        )
        assert np.array_equal([record.sums, record.square_sums], sums.sums)  # to the bit, whatever the batch


def test_shards_are_about_256_mb_or_an_eighth_of_the_set() -> None:
    moments = sample_tar_bytes((4, 32, 32), Settings(**SETTINGS))
    assert moments == 512 + 16_384 + 512 + 1024
    samples = default_samples_per_shard(1_281_167, moments)
    assert samples % 256 == 0 and 0.9 < samples * moments / 2**28 <= 1
    assert sample_tar_bytes((4, 32, 32), Settings(**(SETTINGS | {"flips": True}))) == 2 * (moments - 1024) + 1024
    assert default_samples_per_shard(1797, 2048) == 256 and default_samples_per_shard(10, moments) == 256
    assert default_samples_per_shard(50_000, moments) == 6_400
    assert default_samples_per_shard(1_000_000, 2**29) == 256
