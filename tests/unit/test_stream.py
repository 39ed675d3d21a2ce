"""The stream: what the order says is what every rank gets, whatever the ranks, workers, or start."""

import hashlib
import io
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ig_dist.data import stream as streaming
from ig_dist.data.index import SampleTable, ShardIndex, read_index, write_index
from ig_dist.data.latents import model_latents, normalisation, tokenizer_latents
from ig_dist.data.order import SampleOrder
from ig_dist.data.reader import ShardReader
from ig_dist.data.shard_files import find_shards
from ig_dist.data.shards import pack_shard, scan_shard
from ig_dist.data.sources import find_source
from ig_dist.data.stream import Batch, BatchStream, check_window_memory
from ig_dist.encoding.records import Dest
from ig_dist.errors import ConfigError, DataError

SIZES = [23, 1, 40, 17, 16]
SHAPE = (2, 3, 3)


def make_index(
    folder: Path, kind: str = "sample", sizes: list[int] = SIZES, shape: tuple[int, int, int] = SHAPE
) -> ShardIndex:
    """Shards of uneven size whose latents say which sample they are."""
    stored = (2 * shape[0], *shape[1:]) if kind == "moments" else shape
    folder.mkdir(exist_ok=True)
    shards, rows, first = [], [], 0
    for number, size in enumerate(sizes):
        ids = np.arange(first, first + size)
        latents = np.broadcast_to(ids[:, None, None, None], (size, *stored)).astype(np.float16)
        data = pack_shard([f"{i:06d}" for i in ids], latents, ids % 10)
        name = f"shard-{number:06d}.tar"
        (folder / name).write_bytes(data)
        rows += scan_shard(io.BytesIO(data), np.dtype(np.float16), stored)
        shards.append({"name": name, "bytes": len(data), "samples": size, "sha256": hashlib.sha256(data).hexdigest()})
        first += size
    latent = {"kind": kind, "shape": shape, "dtype": "float16", "shift": [1.0, 2.0], "scale": [0.5, 4.0]}
    info = {
        "source": "test",
        "seed": 0,
        "tokenizer": {"name": "pixel", "sha256": "0", "image_size": 3, "image_channels": 2},
        "latent": latent,
        "classes": [str(i) for i in range(10)],
        "statistics": {"mean": [0, 0], "std": [1, 1]},
        "shards": shards,
    }
    write_index(str(folder), info, SampleTable.from_rows(rows))
    return read_index(str(folder))


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return make_index(tmp_path / "shards")


def make_order(index: ShardIndex, window: int = 5) -> SampleOrder:
    return SampleOrder(index.shard_sizes, streams=4, global_batch_size=12, window_samples=window, seed=3)


def take(stream: BatchStream, count: int) -> list[Batch]:
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


@pytest.fixture(params=["picked", "held"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Samples come from the kernel's memory; or the kernel keeps nothing, as over a network, and windows are held."""
    if request.param == "held":
        monkeypatch.setattr(os, "RWF_NOWAIT", 2**30)  # no kernel knows it
        monkeypatch.setattr(streaming, "_LEAST", 1)
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 7])
def test_every_world_size_worker_count_and_start_sees_the_order(
    index: ShardIndex, world_size: int, workers: int, start: int
) -> None:
    order, count = make_order(index), 20  # 97 samples, 12 a batch: more than two epochs
    ranks = [
        take(BatchStream(index, order, rank=r, world_size=world_size, start=start, workers=workers), count)
        for r in range(world_size)
    ]
    for k in range(count):
        ids, epochs = order.batch(start + k)
        parts = [batches[k] for batches in ranks]
        assert torch.cat([part.ids for part in parts]).tolist() == ids.tolist()
        assert torch.cat([part.epochs for part in parts]).tolist() == epochs.tolist()
        positions = torch.cat([part.positions for part in parts]).tolist()
        assert positions == list(range((start + k) * 12, (start + k + 1) * 12))
        for part in parts:  # the bytes are the sample's own
            assert (part.latents == part.ids.view(-1, 1, 1, 1)).all()
            assert part.labels.tolist() == (part.ids % 10).tolist()


def test_the_stream_has_every_sample_exactly_once_an_epoch(index: ShardIndex) -> None:
    batches = take(BatchStream(index, make_order(index), workers=2), 30)
    ids, epochs = (torch.cat([getattr(b, name) for b in batches]) for name in ("ids", "epochs"))
    for epoch in range(3):
        assert ids[epochs == epoch].sort().values.tolist() == list(range(sum(SIZES)))


def test_micro_batches_are_consecutive_slices(index: ShardIndex) -> None:
    (batch,) = take(BatchStream(index, make_order(index)), 1)
    parts = batch.split(3)
    assert [len(part.ids) for part in parts] == [4, 4, 4]
    assert torch.cat([part.positions for part in parts]).tolist() == batch.positions.tolist()


def damage(index: ShardIndex, sample: int) -> None:
    shard = int(np.searchsorted(np.cumsum(SIZES), sample, side="right"))
    file = Path(index.folder) / index.info.shards[shard].name
    data = bytearray(file.read_bytes())
    data[int(index.table.offset[sample]) + 4] ^= 0x40
    file.write_bytes(data)


def test_a_damaged_sample_ends_the_run_by_default(index: ShardIndex) -> None:
    damage(index, 50)
    with pytest.raises(DataError, match=r"shard-000002.tar: sample 50 .*on_corrupt=skip"):
        take(BatchStream(index, make_order(index), workers=1), 20)


def told_by_kernel(file: str, name: str) -> int:
    """A number of this process: bytes read from files and sockets, or KiB of memory of its own."""
    return int(Path("/proc/self", file).read_text().partition(f"{name}:")[2].split()[0])


def test_the_first_batch_reads_its_samples_only_and_windows_need_no_more_memory_than_they_must(
    tmp_path: Path, way: str
) -> None:
    index = make_index(tmp_path / "shards", sizes=[500, 524], shape=(2, 64, 128))  # 32 KiB a sample
    order = SampleOrder(index.shard_sizes, streams=2, global_batch_size=8, window_samples=256, seed=0)
    take(BatchStream(index, order), 1)  # what is imported or kept at the first time
    batches = BatchStream(index, order)._batches()
    read, memory = told_by_kernel("io", "rchar"), told_by_kernel("status", "RssAnon")
    seen = [next(batches).ids]
    assert 8 * 2**15 <= told_by_kernel("io", "rchar") - read < 9 * 2**15
    highest = 0
    for batch in itertools.islice(batches, 127):
        seen.append(batch.ids)
        assert (batch.latents[:, 0, 0, 0] == batch.ids).all()
        highest = max(highest, told_by_kernel("status", "RssAnon") - memory)
    assert sorted(torch.cat(seen).tolist()) == list(range(1024))
    windows = 2 * 256 * 2**5  # KiB
    assert highest < (4096 if way == "picked" else 1.5 * windows + 4096), highest


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("workers", [0, 3])
def test_a_quarantined_sample_is_replaced_within_its_window_and_counted(index: ShardIndex, workers: int) -> None:
    order = make_order(index)
    whole = [order.batch(number) for number in range(9)]  # a little more than an epoch
    damage(index, 50)
    stream = BatchStream(index, order, workers=workers, reader=ShardReader(index, "skip"))
    batches = take(stream, 9)
    assert stream.reader.quarantined == {50}
    for batch, (ids, epochs) in zip(batches, whole, strict=True):
        keep = ids != 50
        assert (batch.ids.numpy()[keep] == ids[keep]).all()  # nothing else moves
        assert batch.epochs.tolist() == epochs.tolist()
        assert 50 not in batch.ids
        assert (batch.latents == batch.ids.view(-1, 1, 1, 1)).all()
    replaced = [(k, row) for k, (ids, _) in enumerate(whole) for row in np.flatnonzero(ids == 50)]
    for k, row in replaced:
        stream_number, n = row // 3, k * 3 + row % 3
        window = order.window(int(stream_number), int(n))
        assert int(batches[k].ids[row]) in order.ids(window)


def test_a_window_without_a_good_sample_is_fatal(index: ShardIndex) -> None:
    for sample in range(sum(SIZES)):
        damage(index, sample)
    with pytest.raises(DataError, match="all .* samples of a window are damaged"):
        take(BatchStream(index, make_order(index), reader=ShardReader(index, "skip")), 1)


def test_a_shard_that_disappears_is_fatal_even_under_skip(index: ShardIndex) -> None:
    (Path(index.folder) / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match="shard-000002.tar is gone"):
        take(BatchStream(index, make_order(index), reader=ShardReader(index, "skip"), workers=2), 20)


def test_an_index_that_does_not_match_its_shards_is_refused(index: ShardIndex) -> None:
    folder = Path(index.folder)
    shard = folder / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"shard-000001.tar has \d+ bytes, index.json says"):
        read_index(str(folder))
    shard.unlink()
    with pytest.raises(ConfigError, match=r"shard shard-000001.tar of index.json is missing"):
        read_index(str(folder))


def test_what_cannot_be_read_is_said_in_one_line(index: ShardIndex) -> None:
    for name in ("index.samples.safetensors", "index.json"):
        file = Path(index.folder) / name
        file.unlink()
        file.mkdir()
        with pytest.raises(DataError, match=rf"{file} cannot be read \(Is a directory\)"):
            read_index(index.folder)
        file.rmdir()
        file.symlink_to(file)
        with pytest.raises(DataError, match=rf"{file} cannot be read \(Too many levels of symbolic links\)"):
            read_index(index.folder)
        file.unlink()


def test_links_to_shards_are_shards(index: ShardIndex, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    for file in Path(index.folder).iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    assert read_index(str(tmp_path / "links")).num_samples == index.num_samples


def test_shards_of_others_are_not_encoded_again(index: ShardIndex) -> None:
    file = Path(index.folder) / "index.json"
    file.write_text(file.read_text().replace('"foreign": false', '"foreign": true'))
    (Path(index.folder) / "shard-000001.tar").unlink()
    with pytest.raises(ConfigError, match="restore it or run ig-dist index --force$"):
        read_index(index.folder)


@pytest.mark.parametrize("url", ["https://me:secret@host/x", "https://secret@host/x", "s3://me:secret@bucket/x"])
def test_credentials_in_a_url_are_refused_and_not_shown(url: str) -> None:
    for read in (read_index, find_source, find_shards, Dest):
        with pytest.raises(ConfigError, match=r"://\*\*\*@(host|bucket)/x: no credentials in a URL") as caught:
            read(url)
        assert "secret" not in str(caught.value)


def test_indexes_over_http_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data.index https://host/x: http has no listings"):
        read_index("https://host/x")


def test_a_side_file_of_another_index_is_refused(index: ShardIndex) -> None:
    table = Path(index.folder) / "index.samples.safetensors"
    table.write_bytes(table.read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigError, match="does not match index.json"):
        read_index(index.folder)


def test_window_memory_is_bounded(index: ShardIndex) -> None:
    limits = {"streams": 4, "window_samples": 16, "nodes": 1}
    check_window_memory(index, **limits, window_bytes=2**20)
    with pytest.raises(ConfigError, match=r"use data.window_samples=\d+ or data.window_bytes=\d+"):
        check_window_memory(index, **limits, window_bytes=2**11)


def test_posterior_draws_are_keyed_by_position(tmp_path: Path) -> None:
    info = make_index(tmp_path / "moments", kind="moments").info.latent
    stored = torch.ones(6, *info.stored_shape, dtype=torch.float16)
    stored[:, 2:] = 0.5  # mean 1, std 0.5
    positions = torch.arange(100, 106)
    drawn = model_latents(stored, info, posterior="draw", seed=1, positions=positions)
    alone = model_latents(stored[2:3], info, posterior="draw", seed=1, positions=positions[2:3])
    assert torch.equal(drawn[2:3], alone)
    assert len(drawn.flatten().unique()) == drawn.numel()
    mean = model_latents(stored, info, posterior="mean", seed=1, positions=positions)
    assert torch.equal(mean[0, :, 0, 0], torch.tensor([(1 - 1.0) * 0.5, (1 - 2.0) * 4.0]))
    back = tokenizer_latents(mean, normalisation(info, mean.device))
    assert torch.allclose(back, torch.ones_like(back))
