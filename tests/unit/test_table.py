"""The side file: what the library would write, large ones read in checked blocks, and never more than is looked at."""

import itertools
import json
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import safetensors.numpy
import torch
from pytest import MonkeyPatch

from ig_dist.data import table as side_file
from ig_dist.data.index import TABLE_NAME, SampleTable, read_index, read_table, write_index
from ig_dist.data.order import SampleOrder
from ig_dist.data.stream import BatchStream
from ig_dist.encoding import gather
from ig_dist.encoding.records import ShardRecord
from ig_dist.errors import ConfigError, DamagedError
from tests.unit.conftest import Run
from tests.unit.test_stream import make_index, make_order, take

CASES = [False, True]


@pytest.fixture
def small(monkeypatch: MonkeyPatch) -> None:
    """Blocks, pieces and limits so small that a hundred samples make a large table."""
    monkeypatch.setattr(side_file, "BLOCK", 64)
    monkeypatch.setattr(side_file, "PIECE", 256)
    monkeypatch.setattr(side_file, "HELD_BYTES", 320)


@pytest.fixture
def read(monkeypatch: MonkeyPatch) -> Iterator[list[int]]:
    """The bytes of each request for a part of a side file."""
    sizes: list[int] = []
    real = side_file.read_range

    def counted(fs: Any, path: str, start: int, stop: int, *rest: Any) -> Any:
        sizes.append(stop - start)
        return real(fs, path, start, stop, *rest)

    monkeypatch.setattr(side_file, "read_range", counted)
    yield sizes


def random_table(count: int, flips: bool) -> SampleTable:
    random = np.random.default_rng(count)
    numbers = random.integers(0, 2**31, (5, count))
    wide = [numbers[0] * 1000, numbers[1].astype(np.int32), numbers[2].astype(np.uint32)]
    return SampleTable(*wide, *([numbers[3] * 1000, numbers[4].astype(np.uint32)] if flips else []))


def info(samples: int, shards: int = 1, flips: bool = False) -> dict[str, Any]:
    return {
        "source": "test",
        "seed": 0,
        "tokenizer": {"name": "pixel", "sha256": "0", "image_size": 1, "image_channels": 1},
        "latent": {
            "kind": "sample",
            "shape": [1, 1, 2],
            "dtype": "float16",
            "flips": flips,
            "shift": [0.0],
            "scale": [1.0],
        },
        "classes": [str(i) for i in range(10)],
        "statistics": {"mean": [0.0], "std": [1.0]},
        "shards": [
            {"name": f"{number:06d}.tar", "bytes": 0, "samples": samples // shards, "sha256": "0"}
            for number in range(shards)
        ],
    }


@pytest.mark.parametrize("flips", CASES)
@pytest.mark.parametrize("count", [0, 1, 97])
def test_it_is_the_file_of_the_safetensors_library(small: None, count: int, flips: bool) -> None:
    table = random_table(count, flips)
    pieces = [bytes(piece) for piece in side_file.pack(table.columns)]
    assert b"".join(pieces) == safetensors.numpy.save({name: column[:] for name, column in table.columns.items()})
    assert all(len(piece) == side_file.PIECE for piece in pieces[:-1])


@pytest.mark.parametrize("flips", CASES)
@pytest.mark.parametrize("place", ["{tmp}", "memory://table-{name}"])
def test_rows_of_a_large_table_are_those_that_were_written(
    small: None, read: list[int], tmp_path: Path, flips: bool, place: str
) -> None:
    url = place.format(tmp=tmp_path, name=tmp_path.name)
    written = random_table(200, flips)
    fsspec.filesystem("memory").makedirs(f"/table-{tmp_path.name}", exist_ok=True)
    with fsspec.open(f"{url}/000000.tar", "wb"):
        pass
    write_index(url, info(200, flips=flips), written)
    opened = read_index(url)
    assert sum(read) <= 12 * side_file.BLOCK  # the header
    for name, column in opened.table.columns.items():
        whole = written.columns[name]
        for rows in (slice(0, 200), slice(3, 77), slice(-5, None), slice(9, 9), 7, -200):
            found = column[rows]
            assert np.array_equal(found, whole[rows]) and found.dtype == whole.dtype
        assert len(column) == 200
        for beyond in (200, -201):
            with pytest.raises(IndexError):
                column[beyond]
    held = opened.table.label.read.__self__.block.cache_info().currsize  # type: ignore[attr-defined]
    assert 0 < held <= side_file.HELD_BYTES // side_file.BLOCK
    assert opened.table.class_counts(10).tolist() == written.class_counts(10).tolist()
    read_table(url, opened.info, whole=True)


def test_only_a_table_too_large_for_one_request_has_crcs(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """Then an index that was written anew is the one that runs were begun with, to the byte."""
    text = (Path(make_index(tmp_path / "a").folder) / "index.json").read_text()
    assert "table_crc32" not in text and list(json.loads(text))[-2:] == ["table_sha256", "shards"]
    monkeypatch.setattr(side_file, "HELD_BYTES", 1000)
    large = make_index(tmp_path / "b")
    assert large.info.table_crc32 is not None
    # and a large one from before there were any opens, whole
    file = tmp_path / "b" / "index.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "table_crc32"}))
    old = read_index(str(tmp_path / "b"))
    assert isinstance(old.table.label, np.ndarray) and old.table.label.tolist() == large.table.label[:].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_large_table(small: None, tmp_path: Path, workers: int) -> None:
    index = make_index(tmp_path)
    assert isinstance(index.table.label, side_file.StoredColumn)
    order = make_order(index)
    for number, batch in enumerate(take(BatchStream(index, order, workers=workers), 20)):
        assert batch.ids.tolist() == order.batch(number)[0].tolist()
        assert (batch.latents == batch.ids.view(-1, 1, 1, 1)).all()
        assert batch.labels.tolist() == (batch.ids % 10).tolist()


@pytest.mark.parametrize("column", ["offset", "label", "crc32"])
def test_damage_to_any_column_is_found_when_it_is_looked_at(small: None, tmp_path: Path, column: str, run: Run) -> None:
    index = make_index(tmp_path)
    file = tmp_path / TABLE_NAME
    data = bytearray(file.read_bytes())
    stored = index.table.columns[column]
    assert isinstance(stored, side_file.StoredColumn)
    data[stored.begin + 50 * stored.dtype.itemsize] ^= 4  # of sample 50
    file.write_bytes(data)
    damaged = read_index(str(tmp_path))
    assert len(damaged.table.columns[column][:10]) == 10
    with pytest.raises(DamagedError, match=rf"{file} is damaged from byte \d+ on \(its CRC differs\): copy it again"):
        take(BatchStream(damaged, make_order(damaged)), 20)
    ran = run("verify_shards", tmp_path)
    assert ran.code == 4 and f"{file} is damaged from byte" in ran.out and "with another" not in ran.out
    file.write_bytes(data + bytes(64))
    with pytest.raises(ConfigError, match=r"does not match index.json \(it has \d+ bytes\)"):
        read_index(str(tmp_path))


def test_what_suffers_on_the_way_is_read_again(small: None, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    make_index(tmp_path)
    fsspec.filesystem("memory").put(str(tmp_path), f"/{tmp_path.name}", recursive=True)
    index = read_index(f"memory://{tmp_path.name}")
    real, left = side_file.read_range, [1]

    def flipping(*arguments: Any) -> Any:
        data = real(*arguments)
        if left.pop() if left else 0:
            data[3] ^= 1
        return data

    monkeypatch.setattr(side_file, "read_range", flipping)
    assert index.table.label[90:].tolist() == [number % 10 for number in range(90, 97)] and not left


def many_rows(folder: Path, samples: int, shards: int) -> None:
    """An index of shards without content."""
    folder.mkdir()
    for shard in (described := info(samples, shards))["shards"]:
        (folder / shard["name"]).touch()
    ids = np.arange(samples)
    write_index(str(folder), described, SampleTable(ids % 1000 * 8, (ids % 10).astype(np.int32), ids.astype(np.uint32)))


def test_an_index_costs_what_is_looked_at(tmp_path: Path, read: list[int]) -> None:
    """Three million samples: opened, and 300 windows of them looked up, in a few MB."""
    many_rows(tmp_path / "data", 3_000_000, 300)
    tracemalloc.start()
    index = read_index(str(tmp_path / "data"))
    assert sum(read) == side_file.BLOCK and tracemalloc.get_traced_memory()[1] < 2e6  # 48 MB lie there
    order = SampleOrder(index.shard_sizes, streams=8, global_batch_size=64, window_samples=1024, seed=0)
    tracemalloc.reset_peak()
    for number, stream in itertools.product(range(38), range(8)):  # as the reader does
        window = order.window(stream, number * 1024)
        for piece in window.stretches:
            rows = index.table[index.first_ids[piece.shard] + piece.start : index.first_ids[piece.shard] + piece.stop]
            ids = index.first_ids[piece.shard] + np.arange(piece.start, piece.stop)
            assert np.array_equal(rows.crc32, ids) and np.array_equal(rows.label, ids % 10)
    assert tracemalloc.get_traced_memory()[1] < side_file.HELD_BYTES + 2e6
    blocks = 8 * 5 * (4 + 3 + 3)  # of a shard's three columns, for the 5 shards at most that a stream has been to
    assert sum(read) < blocks * side_file.BLOCK
    tracemalloc.stop()


def test_a_window_takes_as_long_whatever_the_number_of_shards() -> None:
    few, many = (
        SampleOrder(np.full(count, 10_000), streams=8, global_batch_size=64, window_samples=64, seed=0)
        for count in (10, 10_000)
    )

    def seconds(order: SampleOrder) -> float:
        order.window(0, 0)  # the order of an epoch's shards is found once
        began = time.process_time()
        for number in range(0, 100 * 64, 64):
            order.window(3, number)
        return time.process_time() - began

    # a thousand times the shards: what grows with them is far beyond what a busy machine adds
    assert min(seconds(many) for _ in range(5)) < 5 * min(seconds(few) for _ in range(5))


def test_records_are_as_they_were_and_in_columns() -> None:
    settings = {
        **{"source": "s", "tokenizer": "t", "tokenizer_sha256": "0", "precision": "fp32", "image_size": 1},
        **{"image_channels": 1, "store": "sample", "flips": True, "seed": 0, "samples_per_shard": 2},
    }
    rows = [[640, 3, 4000000000, 1280, 7], [2**40, 4, 5, 2**40 + 1, 4294967295]]
    text = json.dumps(
        {
            **{"settings": settings, "name": "shard-000000.tar", "bytes": 9, "samples": 2, "sha256": "0", "rows": rows},
            **{"rejected": [[5, "a.png", "bad"]], "upscaled": 0, "sums": [1.0], "square_sums": [2.0]},
        },
        separators=(",", ":"),
    )
    record = ShardRecord.model_validate_json(text)
    assert record.rows.offset[:].tolist() == [640, 2**40] and record.rows.crc32[:].tolist() == [4000000000, 5]
    assert record.model_dump_json() == text
    for damaged in (text.replace("4000000000", "null"), text.replace("640,3,", "640,"), text.replace("[640", "[[640]")):
        with pytest.raises(ValueError, match="validation error|Invalid JSON"):
            ShardRecord.model_validate_json(damaged)


def test_what_gather_holds_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    table = random_table(20_000, flips=True)
    record = ShardRecord.model_construct(
        **{"settings": None, "name": "x", "bytes": 1, "samples": 20_000, "sha256": "0", "rows": table, "upscaled": 1},
        **{"rejected": [], "sums": [1.0, 2.0], "square_sums": [1.0, 2.0]},
    )
    tracemalloc.start()
    totals = gather._Totals(10, str(tmp_path))
    for _ in range(100):
        totals.add(record)
    write_index(str(tmp_path), info(2_000_000, flips=True), totals.table)
    assert tracemalloc.get_traced_memory()[1] < 4 * side_file.PIECE  # 56 MB of rows
    tracemalloc.stop()
    (tmp_path / "000000.tar").touch()
    read = read_index(str(tmp_path)).table
    assert {path.name for path in tmp_path.iterdir()} == {"000000.tar", "index.json", TABLE_NAME}
    assert totals.sums.tolist() == [[100, 200], [100, 200]]
    assert totals.class_counts.tolist() == read.class_counts(10).tolist()
    for name, column in read.columns.items():
        assert np.array_equal(column[-20_000:], table.columns[name])


def test_what_goes_to_the_gpu_is_in_pinned_memory(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """The tensors themselves: of others on the same memory its allocator does not know that copies are under way."""
    index, pinned, real = make_index(tmp_path), dict[int, torch.Tensor](), torch.empty

    def empty(*arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        tensor = real(*arguments, **options)
        if pin_memory:
            pinned[id(tensor)] = tensor
        return tensor

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (batch,) = take(BatchStream(index, make_order(index)), 1)
    assert all(id(tensor) in pinned for tensor in (batch.latents, batch.labels, batch.positions))
    assert (batch.latents == batch.ids.view(-1, 1, 1, 1)).all() and batch.positions.tolist() == list(range(12))
    assert batch.labels.tolist() == (batch.ids % 10).tolist()
