"""The reader: mirrored samples, the node's cache, and what a run may take from the shards."""

import contextlib
import io
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ig_dist.data.cache import BlockCache
from ig_dist.data.index import LatentInfo, SampleTable, ShardIndex, read_index, write_index
from ig_dist.data.latents import check_latents
from ig_dist.data.order import SampleOrder
from ig_dist.data.reader import ShardReader
from ig_dist.data.shards import FLIP_SUFFIX, pack_shard, scan_shard
from ig_dist.data.stream import BatchStream
from ig_dist.errors import ConfigError, DataError
from ig_dist.rng import Purpose, bernoulli
from tests.unit.test_stream import make_index, make_order, take


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return make_index(tmp_path / "shards")


def small_blocks(index: ShardIndex, cache: BlockCache | None = None, **options: str) -> ShardReader:
    """A reader whose blocks hold 7 samples."""
    size = index.table.offset[7] - index.table.offset[0]
    return ShardReader(index, **options, cache=cache, request_bytes=int(size))  # type: ignore[arg-type]


def ids_of(batches: list) -> list[int]:  # the latents say which sample they are
    return [int(x) for batch in batches for x in batch.latents[:, 0, 0, 0]]


def expected(index: ShardIndex, count: int) -> list[int]:
    order = make_order(index)
    return [int(i) for number in range(count) for i in order.batch(number)[0]]


@pytest.mark.parametrize("cap", [0, 10**5, 10**9])
def test_a_cache_changes_no_byte_and_serves_what_the_source_has_lost(
    index: ShardIndex, tmp_path: Path, cap: int
) -> None:
    cache = BlockCache(str(tmp_path / "cache"), cap, index)
    for _ in range(2):
        stream = BatchStream(index, make_order(index), workers=2, reader=small_blocks(index, cache))
        assert ids_of(take(stream, 20)) == expected(index, 20)
    bytes_kept = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.bin"))
    assert bytes_kept <= cap
    if cap == 10**9:
        for shard in index.info.shards:
            (Path(index.folder) / shard.name).unlink()
        stream = BatchStream(index, make_order(index), reader=small_blocks(index, cache))
        assert ids_of(take(stream, 20)) == expected(index, 20)


def test_a_sample_that_two_blocks_hold_is_served_by_the_cache(index: ShardIndex, tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path / "cache"), 10**9, index)
    cut = int(index.table.offset[3]) + 18  # sample 3 begins in the first block and ends in the second
    for there in (True, False):
        if not there:
            for shard in index.info.shards:
                (Path(index.folder) / shard.name).unlink()
        stream = BatchStream(index, make_order(index), reader=ShardReader(index, cache=cache, request_bytes=cut))
        assert ids_of(take(stream, 20)) == expected(index, 20)


def test_the_cap_keeps_whole_shards_the_same_on_every_process(index: ShardIndex, tmp_path: Path) -> None:
    cap = index.info.shards[0].bytes + index.info.shards[1].bytes
    caches = [BlockCache(str(tmp_path / name), cap, index) for name in ("a", "b")]
    assert [cache.shards for cache in caches] == [2, 2]


def test_a_damaged_block_is_read_again_from_the_source(index: ShardIndex, tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path / "cache"), 10**9, index)
    take(BatchStream(index, make_order(index), reader=small_blocks(index, cache)), 9)
    blocks = sorted((tmp_path / "cache").rglob("*.bin"))
    for number, block in enumerate(blocks):
        data = bytearray(block.read_bytes())
        data[5] ^= 1  # of the first sample
        block.write_bytes([bytes(data), bytes(data[:-1]), b""][number % 3])
    reader = small_blocks(index, cache, on_corrupt="skip")
    assert ids_of(take(BatchStream(index, make_order(index), reader=reader), 9)) == expected(index, 9)
    assert not reader.quarantined
    shards_that_lie = [Path(index.folder) / shard.name for shard in index.info.shards]
    for shard in shards_that_lie:
        shard.unlink()  # what is in the cache now is whole again
    assert ids_of(take(BatchStream(index, make_order(index), reader=reader), 9)) == expected(index, 9)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond ``size`` bytes: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_cache_disk_is_said_once_and_costs_nothing_but_the_cache(
    index: ShardIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = BlockCache(str(tmp_path / "cache"), 10**9, index)
    with file_size_limit(10):
        stream = BatchStream(index, make_order(index), workers=2, reader=small_blocks(index, cache))
        assert ids_of(take(stream, 20)) == expected(index, 20)
    said = capsys.readouterr().out
    assert said.count("goes on without keeping more") == 1 and "data.cache_bytes" in said
    assert not list((tmp_path / "cache").rglob("*.bin")) and not list((tmp_path / "cache").rglob("*.tmp"))


def test_an_unwritable_cache_folder_is_the_users_mistake(index: ShardIndex, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data.cache_dir .*file/cache: Not a directory: choose a folder"):
        BlockCache(str(tmp_path / "file/cache"), 10**9, index)


def flip_index(folder: Path) -> ShardIndex:
    """60 samples in 3 shards: latent i holds i, its mirrored latent -i."""
    folder.mkdir()
    shards, rows = [], []
    for number in range(3):
        ids = np.arange(20 * number, 20 * number + 20)
        latents = np.broadcast_to(ids[:, None, None, None] + 1, (20, 2, 3, 3)).astype(np.float16)
        data = pack_shard([f"{i:06d}" for i in ids], latents, ids % 10, -latents)
        (folder / f"{number}.tar").write_bytes(data)
        rows += scan_shard(io.BytesIO(data), np.dtype(np.float16), (2, 3, 3), flip_suffix=FLIP_SUFFIX)
        shards.append({"name": f"{number}.tar", "bytes": len(data), "samples": 20, "sha256": "0"})
    info = make_index(folder / "other").info.model_dump(exclude={"format", "table_sha256"})
    info["latent"]["flips"] = True
    write_index(str(folder), info | {"shards": shards}, SampleTable.from_rows(rows))
    return read_index(str(folder))


@pytest.mark.parametrize("world_size", [1, 2])
def test_flips_are_keyed_by_the_position_and_change_every_epoch(tmp_path: Path, world_size: int) -> None:
    index = flip_index(tmp_path / "shards")
    order = SampleOrder(index.shard_sizes, streams=4, global_batch_size=12, window_samples=5, seed=3)
    seen: dict[int, list[bool]] = {}
    for rank in range(world_size):
        stream = BatchStream(index, order, rank=rank, world_size=world_size, workers=rank, flip=True)
        for batch in take(stream, 50):  # ten epochs
            values = batch.latents[:, 0, 0, 0]
            assert (values.abs() == batch.ids + 1).all()
            assert torch.equal(values < 0, bernoulli(3, Purpose.FLIP, batch.positions, 0.5))
            for sample, value in zip(batch.ids.tolist(), values.tolist(), strict=True):
                seen.setdefault(sample, []).append(value < 0)
    assert len(seen) == 60 and all(len(flips) == 10 for flips in seen.values())
    assert 0.4 < np.mean(list(seen.values())) < 0.6
    without = take(BatchStream(index, order), 5)
    assert all((batch.latents > 0).all() for batch in without)


def test_damage_to_the_mirrored_latent_is_found_when_it_is_wanted(tmp_path: Path) -> None:
    index = flip_index(tmp_path / "shards")
    assert index.table.flip_offset is not None
    file = Path(index.folder) / "1.tar"
    data = bytearray(file.read_bytes())
    data[int(index.table.flip_offset[25]) + 1] ^= 1
    file.write_bytes(data)
    reader, wanted = ShardReader(index), np.zeros(20, dtype=bool)
    rows = reader.rows(np.empty((20, reader.sample_bytes), np.uint8))
    assert reader.read_run(reader.find(1, 0, 20, wanted), rows).all() and reader.read_ids(20, 40)[1].all()
    wanted[5] = True
    with pytest.raises(DataError, match="sample 25 "):
        reader.read_run(reader.find(1, 0, 20, wanted), rows)
    with pytest.raises(DataError, match="sample 25 "):
        reader.read_ids(20, 40, flipped=True)


def test_what_the_shards_do_not_hold_is_refused() -> None:
    moments = LatentInfo(kind="moments", shape=(4, 2, 2), dtype="float16", shift=[0] * 4, scale=[1] * 4)
    sample = moments.model_copy(update={"kind": "sample"})
    assert check_latents(moments, None, False) == "draw" and check_latents(sample, None, False) == "stored_sample"
    assert check_latents(moments, "mean", False) == "mean"
    with pytest.raises(ConfigError, match=r"the shards store one latent a sample: .* encode with --store moments"):
        check_latents(sample, "draw", False)
    with pytest.raises(ConfigError, match=r"the shards store mean and std: use data.posterior=draw"):
        check_latents(moments, "stored_sample", False)
    with pytest.raises(ConfigError, match="encode with --flips"):
        check_latents(sample, None, True)


def test_the_cache_sweeps_what_killed_processes_left(index: ShardIndex, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / index.sha256[:16]
    folder.mkdir(parents=True)
    old, new = folder / "000000-00000.bin.0.tmp", folder / "000000-00001.bin.1.tmp"
    for file, age in ((old, 7200), (new, 0)):
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
    BlockCache(str(tmp_path / "cache"), 2**30, index)
    assert not old.exists() and new.exists()
