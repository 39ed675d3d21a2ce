"""Streaming from a real S3 server through faults: the epoch completes, every sample once, every byte checked."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ig_dist.data import table as side_file
from ig_dist.data.cache import BlockCache
from ig_dist.data.index import ShardIndex, read_index, read_table, write_index
from ig_dist.data.order import SampleOrder
from ig_dist.data.reader import ShardReader
from ig_dist.data.stream import Batch, BatchStream
from ig_dist.errors import ConfigError, DataError
from ig_dist.storage import writes
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import open_url, read_file, read_range, write_whole
from ig_dist.storage.s3 import abort_orphaned_uploads
from ig_dist.storage.urls import once
from tests.conftest import run_command
from tests.fault_proxy import Fault, FaultProxy
from tests.object_store import ObjectStore
from tests.unit.test_stream import SIZES, make_index
from tests.unit.test_table import info, random_table
from tests.waiting import wait_until

BATCHES = 9  # of 12: a little more than the 97 samples of an epoch
RETRIED = Patience(stall_s=0.5, deadline_s=20.0)


@pytest.fixture
def url(bucket: str, tmp_path: Path) -> str:
    """The shards of the unit tests in a bucket; their latents say which sample they are."""
    return upload(bucket, tmp_path)


def upload(bucket: str, tmp_path: Path) -> str:
    local = make_index(tmp_path / "shards")
    fs, path = open_url(f"s3://{bucket}/data", "test")
    for file in Path(local.folder).iterdir():
        write_whole(fs, f"{path}/{file.name}", file.read_bytes())
    fs.clear_instance_cache()  # a proxy may come in between
    return f"s3://{bucket}/data"


def stream_of(index: ShardIndex, patience: Patience, **options: int) -> BatchStream:
    order = SampleOrder(index.shard_sizes, streams=4, global_batch_size=12, window_samples=5, seed=3)
    reader = ShardReader(index, patience=Patience(patience.stall_s, patience.deadline_s))
    return BatchStream(index, order, workers=3, reader=reader, **options)


def epoch(index: ShardIndex, patience: Patience = RETRIED) -> tuple[list[Batch], int]:
    """A little more than an epoch, checked against the order; and the number of faults borne."""
    stream = stream_of(index, patience)
    try:
        batches = list(itertools.islice(stream, BATCHES))
    finally:
        stream.close()
    check(index, batches)
    return batches, stream.reader.patience.faults


def check(index: ShardIndex, batches: list[Batch]) -> None:
    order = SampleOrder(index.shard_sizes, streams=4, global_batch_size=12, window_samples=5, seed=3)
    for number, batch in enumerate(batches):
        assert batch.ids.tolist() == order.batch(number)[0].tolist()
        assert (batch.latents == batch.ids.view(-1, 1, 1, 1)).all()
    ids, epochs = (torch.cat([getattr(b, name) for b in batches]) for name in ("ids", "epochs"))
    assert ids[epochs == 0].sort().values.tolist() == list(range(sum(SIZES)))


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status503", share=0.05, path=r"\.tar"),
        Fault("status503", share=0.2, path=r"\.tar"),
        Fault("status500", share=0.1, path=r"\.tar"),
        Fault("reset", share=0.2, path=r"\.tar"),
        Fault("cut", share=0.2, path=r"\.tar", after_bytes=20),
        Fault("short", share=0.2, path=r"\.tar", after_bytes=20),
        Fault("flip", share=0.2, path=r"\.tar", after_bytes=20),
        Fault("stall", next=3, path=r"\.tar", after_bytes=40),
        Fault("hang", next=3, path=r"\.tar"),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.share}",
)
def test_transient_faults_cost_time_only(
    url: str, fault_proxy: FaultProxy, fault: Fault, capsys: pytest.CaptureFixture[str]
) -> None:
    index = read_index(url)
    fault_proxy.add(fault)
    faults = sum(epoch(index)[1] for _ in range(3))
    assert fault_proxy.log
    # a flip is found by its CRC, a reset of an idle connection the client itself asks for again
    if fault.kind not in ("flip", "reset"):
        assert faults > 0
        said = capsys.readouterr().out
        assert "storage: s3://" in said and ".tar: " in said and "again in" in said


def test_objects_of_any_name_are_read_by_a_url_that_is_kept_until_it_no_longer_serves(bucket: str) -> None:
    fs, path = open_url(f"s3://{bucket}/a b", "test")
    path, data = f"{path}/ü+x=1?&~.bin", bytes(range(256))
    write_whole(fs, path, data)
    assert bytes(read_range(fs, path, 3, 250)) == data[3:250]
    urls = once(fs).urls
    assert urls[path]
    urls[path] += ".moved"
    assert bytes(read_range(fs, path, 3, 250)) == data[3:250] and not urls[path]
    assert bytes(read_range(fs, path, 3, 250)) == data[3:250]


def test_flips_in_one_reading_after_another_condemn_no_sample(url: str, fault_proxy: FaultProxy) -> None:
    index = read_index(url)
    begin = int(index.table.offset[0])  # where the request for the whole shard begins
    for sample in (5, 0, 0):  # the others are whole, so that only sample 5 is asked for again
        fault_proxy.add(Fault("flip", next=1, path="shard-000000", after_bytes=int(index.table.offset[sample]) - begin))
    reader = ShardReader(index, "skip")
    samples, good = reader.read_ids(0, SIZES[0])
    assert [event.kind for event in fault_proxy.log] == 3 * ["flip"]
    assert good.all() and not reader.quarantined
    assert samples[:, 0, 0, 0].tolist() == list(range(SIZES[0]))


@pytest.mark.parametrize(("path", "times"), [("index.samples", 2), ("index.json", 2)])
def test_an_index_that_suffers_on_the_way_is_read_again(
    url: str, fault_proxy: FaultProxy, path: str, times: int
) -> None:
    fault_proxy.add(Fault("flip", next=times, path=path, after_bytes=0))
    assert read_index(url).num_samples == sum(SIZES)
    assert [event.kind for event in fault_proxy.log] == times * ["flip"]
    fault_proxy.add(Fault("flip", path=path, after_bytes=0))
    with pytest.raises(ConfigError, match="does not match|not an index"):
        read_index(url)


def test_the_index_is_read_through_faults(url: str, fault_proxy: FaultProxy) -> None:
    fault_proxy.add(Fault("status503", next=1, path="index.json"), Fault("reset", next=2), Fault("status500", next=2))
    assert read_index(url).num_samples == sum(SIZES)
    assert len(fault_proxy.log) == 5


def test_a_large_side_file_goes_up_in_parts_and_comes_back_in_blocks(
    bucket: str, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_file, "HELD_BYTES", 2**20)
    monkeypatch.setattr(writes, "PART_BYTES", 5 * 2**20)
    fs, path = open_url(f"s3://{bucket}/large", "test")
    write_whole(fs, f"{path}/000000.tar", b"x")
    fault_proxy.add(Fault("status503", next=2, path="samples"))
    written = random_table(samples := 700_000, flips=False)
    described = info(samples)
    described["shards"][0]["bytes"] = 1
    write_index(f"s3://{bucket}/large", described, written)
    assert len(fault_proxy.log) == 2
    index = read_index(f"s3://{bucket}/large")
    fault_proxy.add(Fault("status503", next=1, path="samples"), Fault("cut", next=1, path="samples", after_bytes=40))
    fault_proxy.add(Fault("flip", next=2, path="samples", after_bytes=20))
    for start in range(0, samples, 99_999):
        for name, column in index.table[start : start + 3000].columns.items():
            assert np.array_equal(column, written.columns[name][start : start + 3000])
    assert [event.kind for event in fault_proxy.log[2:]] == ["status503", "cut", "flip", "flip"]
    read_table(index.folder, index.info, whole=True)


def test_a_server_that_is_killed_and_comes_back_is_waited_for(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a store of its own: what watched the killed gateway's objects delays the next writes by half a minute
    with ObjectStore(tmp_path / "store") as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
        store.create_bucket(bucket)
        index = read_index(upload(bucket, tmp_path))
        read_while_it_is_killed(index, store)


def read_while_it_is_killed(index: ShardIndex, store: ObjectStore) -> None:
    stream = stream_of(index, RETRIED)
    batches: list[Batch] = []

    def read() -> None:
        for batch in itertools.islice(stream, BATCHES):
            batches.append(batch)
            if len(batches) == 2:
                midway.set()
                killed.wait()

    midway, killed = threading.Event(), threading.Event()
    reading = threading.Thread(target=read)
    reading.start()
    midway.wait()
    store.kill_gateway()
    killed.set()
    time.sleep(1.5)
    assert len(batches) < BATCHES
    store.restart_gateway()
    reading.join()
    stream.close()
    check(index, batches)
    assert stream.reader.patience.faults > 0


def test_a_server_that_stays_away_is_one_clear_error_after_the_deadline(url: str, fault_proxy: FaultProxy) -> None:
    index = read_index(url)
    fault_proxy.add(Fault("reset"))
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        epoch(index, Patience(stall_s=0.5, deadline_s=2.0))
    assert time.monotonic() - began < RETRIED.deadline_s
    message = str(caught.value)
    assert f"{url}/shard-" in message and "has failed for 2 s" in message and "run the same command again" in message


def test_a_hanging_server_is_noticed(url: str, fault_proxy: FaultProxy) -> None:
    index = read_index(url)
    fault_proxy.add(Fault("hang"))
    began = time.monotonic()
    with pytest.raises(DataError, match="has failed for 2 s"):
        epoch(index, Patience(stall_s=0.5, deadline_s=2.0))
    assert time.monotonic() - began < RETRIED.deadline_s


@pytest.mark.parametrize("kind", ["hang", "stall", "reset"])
def test_a_stream_closes_at_once_whatever_its_requests_wait_for(url: str, fault_proxy: FaultProxy, kind: str) -> None:
    index = read_index(url)
    stream = stream_of(index, Patience(stall_s=30.0, deadline_s=60.0))
    fault_proxy.add(Fault(kind, path=r"\.tar", after_bytes=20 if kind == "stall" else 0))
    assert stream.get(0.0) is None  # it begins to read
    wait_until(lambda: fault_proxy.log)
    assert stream.get(0.5) is None
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 20.0  # its requests would wait for 30 s


def test_a_request_that_hangs_is_left_alone_when_the_command_ends(bucket: str, fault_proxy: FaultProxy) -> None:
    patience = Patience(stall_s=30.0, deadline_s=60.0)
    fs, path = open_url(f"s3://{bucket}/up", "test", patience)
    fault_proxy.add(Fault("hang"))
    for action in (lambda: write_whole(fs, path, b"x", patience), lambda: read_file(fs, path, patience)):
        patience.stop.clear()
        threading.Timer(0.3, patience.stop.set).start()
        began = time.monotonic()
        with pytest.raises(DataError, match="given up, because the command ends"):
            action()
        assert 0.2 < time.monotonic() - began < 20.0


def test_denied_and_gone_are_said_at_once(url: str, fault_proxy: FaultProxy) -> None:
    index = read_index(url)
    began = time.monotonic()
    fault_proxy.add(Fault("status403", path=r"shard-000002\.tar"))
    with pytest.raises(DataError, match=rf"{url}/shard-000002.tar: access denied .* check the credentials"):
        epoch(index)
    fault_proxy.clear()
    fault_proxy.add(Fault("status404", path=r"shard-000002\.tar"))
    with pytest.raises(DataError, match=rf"{url}/shard-000002.tar is gone: restore the shard"):
        epoch(index)
    assert time.monotonic() - began < RETRIED.deadline_s
    with pytest.raises(ConfigError, match="does not exist; write shards there with"):
        read_index(f"{url}-not")


def test_wrong_credentials_are_named_and_no_secret_is_shown(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    done = run_command(["ig-dist", "train", "configs/digits.yaml", f"data.index={url}"])
    assert done.returncode == 4
    assert "access denied" in done.stderr and "check the credentials" in done.stderr and done.stderr.count("\n") == 1
    assert "not-the-secret" not in done.stdout + done.stderr


def test_lasting_damage_is_fatal_or_quarantined_the_same_on_every_rank_and_restart(url: str) -> None:
    index = read_index(url)
    fs, path = open_url(url, "test")
    shard = f"{path}/shard-000002.tar"
    data = bytearray(fs.cat_file(shard))
    data[int(index.table.offset[50]) + 4] ^= 0x40  # sample 50 is in shard 2
    write_whole(fs, shard, bytes(data))
    with pytest.raises(DataError, match=rf"{url}/shard-000002.tar: sample 50 .*data.on_corrupt=skip"):
        epoch(index)
    order = SampleOrder(index.shard_sizes, streams=4, global_batch_size=12, window_samples=5, seed=3)

    def ids(start: int, world_size: int) -> list[list[int]]:
        parts = []
        for rank in range(world_size):
            reader = ShardReader(index, "skip")
            stream = BatchStream(index, order, rank=rank, world_size=world_size, start=start, workers=2, reader=reader)
            parts.append([batch.ids for batch in itertools.islice(stream, BATCHES - start)])
            stream.close()
        return [torch.cat(batch).tolist() for batch in zip(*parts, strict=True)]

    whole = ids(0, 1)
    assert 50 not in itertools.chain(*whole)
    assert ids(0, 2) == whole and ids(4, 1) == whole[4:] and ids(4, 4) == whole[4:]


def test_a_restart_reads_at_most_one_window_a_stream_again(url: str, fault_proxy: FaultProxy) -> None:
    index = read_index(url)
    shards = sum(shard.bytes for shard in index.info.shards)
    fault_proxy.requests.clear()
    stream = stream_of(index, RETRIED, start=5)
    next(iter(stream))
    stream.close()
    asked = [request for request in fault_proxy.requests if ".tar" in request[1]]
    assert shards and 4 <= len(asked) <= 4 * 2 * 3  # of each stream: its window and the next, in at most 3 pieces


def test_the_cache_saves_the_second_epochs_requests(url: str, fault_proxy: FaultProxy, tmp_path: Path) -> None:
    index = read_index(url)
    order = SampleOrder(index.shard_sizes, streams=4, global_batch_size=12, window_samples=5, seed=3)
    asked = []
    for _ in range(2):
        fault_proxy.requests.clear()
        reader = ShardReader(index, cache=BlockCache(str(tmp_path / "cache"), 2**30, index))
        stream = BatchStream(index, order, workers=3, reader=reader)
        check(index, list(itertools.islice(stream, BATCHES)))
        stream.close()
        asked.append(len([path for _, path in fault_proxy.requests if ".tar" in path]))
    assert asked[0] >= len(SIZES) and asked[1] == 0


def test_uploads_survive_faults_and_what_changed_on_the_way_is_refused(bucket: str, fault_proxy: FaultProxy) -> None:
    fs, path = open_url(f"s3://{bucket}/up", "test")
    data = bytes(range(256)) * 1000
    fault_proxy.add(
        Fault("flip", next=1, method="PUT", after_bytes=100),
        Fault("status503", next=1, method="PUT"),
        Fault("cut", next=1, method="PUT", after_bytes=100),
        Fault("lost", next=1, method="PUT"),
    )
    write_whole(fs, f"{path}/file", data, RETRIED)
    assert {event.kind for event in fault_proxy.log} == {"flip", "status503", "cut", "lost"}
    assert fs.cat_file(f"{path}/file") == data


def test_orphaned_uploads_are_aborted_below_the_path_only(bucket: str) -> None:
    fs, path = open_url(f"s3://{bucket}/data", "test")
    for key in ("data/shard-1.tar", "database/other"):
        fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    assert abort_orphaned_uploads(fs, path) == 1
    assert [upload["Key"] for upload in fs.list_multipart_uploads(bucket)] == ["database/other"]
