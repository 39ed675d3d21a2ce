"""Checkpoints on a real S3 server, through faults: saved, kept and loaded, or one clear line says why not."""

from __future__ import annotations

import os
import pickle
import random
import re
import resource
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ig_dist.checkpoints.reading import Checkpoint
from ig_dist.checkpoints.saving import Saver
from ig_dist.checkpoints.store import CheckpointStore
from ig_dist.errors import DataError
from ig_dist.export import ALONE
from ig_dist.parallel.engine import Piece
from ig_dist.storage import writes
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import open_url
from tests import forked
from tests.conftest import run_command
from tests.fault_proxy import Fault, FaultProxy
from tests.runs import local, metrics
from tests.unit.test_checkpoint import Hostile
from tests.waiting import wait_until

META = {"optimizer_steps": 1}
PART = 5 * 2**20  # the least that S3 takes
Write = Callable[..., Path]


@pytest.fixture
def url(bucket: str) -> str:
    return f"s3://{bucket}/run/checkpoints"


def open_store(url: str, deadline_s: float = 20.0) -> CheckpointStore:
    return CheckpointStore(url, keep_last=2, patience=Patience(stall_s=0.5, deadline_s=deadline_s))


def pieces(step: int, count: int = 1000) -> dict[str, Piece]:
    return {"model/w": Piece((count,), 0, torch.arange(count, dtype=torch.float32) + step)}


def save(store: CheckpointStore, *steps: int, count: int = 1000) -> Saver:
    saver = Saver(store, ALONE)
    for step in steps:
        saver.save(step, pieces(step, count), META)
    saver.wait()
    return saver


def check(store: CheckpointStore, step: int, count: int = 1000) -> None:
    checkpoint = store.find(ALONE)
    assert checkpoint is not None and checkpoint.step == step
    assert torch.equal(checkpoint.read("model/w"), pieces(step, count)["model/w"].data)


def keys(url: str) -> list[str]:
    fs, path = open_url(url, "test")
    fs.invalidate_cache()
    return sorted(key.removeprefix(f"{path}/") for key in fs.find(path))


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status503", share=0.3),
        Fault("status500", share=0.3),
        Fault("reset", share=0.2),
        Fault("cut", share=0.3, after_bytes=100),
        Fault("lost", share=0.2),
        Fault("stall", next=2, after_bytes=100),
        Fault("hang", next=2),
        Fault("flip", share=0.3, method="PUT", after_bytes=200),
    ],
    ids=lambda fault: fault.kind,
)
def test_faults_cost_time_only(
    url: str, fault_proxy: FaultProxy, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, count = open_store(url), 1000
    if fault.kind in ("lost", "status503"):
        monkeypatch.setattr(writes, "PART_BYTES", PART)
        count = 3 * 10**6  # three parts
    fault_proxy.add(fault)
    saver = save(store, 1, 2, 3, count=count)
    check(store, 3, count)
    assert saver.failed_saves == 0 and fault_proxy.log
    fault_proxy.clear()
    assert store.steps() == [2, 3] and len(keys(url)) == 4  # retention too
    fs, path = open_url(url, "test")
    listed = fs.call_s3("list_multipart_uploads", Bucket=path.split("/")[0])
    begun = re.compile(r"step_000000000[23]/.*\?uploads")  # and the answer lost; what step 1 left went with it
    lost = [e for e in fault_proxy.log if e.kind == "lost" and e.method == "POST" and begun.search(e.path)]
    assert len(listed.get("Uploads") or []) == len(lost)
    store.abort_orphans()
    assert not fs.call_s3("list_multipart_uploads", Bucket=path.split("/")[0]).get("Uploads")


def test_the_answer_to_the_manifest_may_be_lost(url: str, fault_proxy: FaultProxy) -> None:
    store = open_store(url)
    fault_proxy.add(Fault("lost", next=1, method="PUT", path=r"manifest\.json"))
    save(store, 1)
    assert len(fault_proxy.log) == 1
    check(store, 1)


def test_what_suffers_on_the_way_is_read_again(url: str, fault_proxy: FaultProxy) -> None:
    store = open_store(url)
    save(store, 1, 2)
    for path in (r"manifest\.json", r"\.safetensors"):
        fault_proxy.add(Fault("flip", next=1, method="GET", path=path, after_bytes=150))
        check(store, 2)
    assert len(fault_proxy.log) == 2 and not store.damaged


@pytest.mark.parametrize("count", [1000, 2 * 10**6])  # read in blocks with its neighbours, and by a range of its own
def test_a_bit_that_flips_while_a_tensor_is_read_is_noticed(url: str, fault_proxy: FaultProxy, count: int) -> None:
    store = open_store(url)
    save(store, 1, count=count)
    checkpoint = store.find(ALONE)
    assert checkpoint is not None
    fault_proxy.add(Fault("flip", next=2, method="GET", path=r"\.safetensors", after_bytes=3000))
    assert torch.equal(checkpoint.read("model/w"), pieces(1, count)["model/w"].data)
    assert len(fault_proxy.log) == 2 <= store.patience.faults
    checkpoint = Checkpoint(checkpoint.url, checkpoint.manifest, store.patience)  # has read nothing yet
    fault_proxy.add(Fault("flip", method="GET", path=r"\.safetensors", after_bytes=3000))
    with pytest.raises(DataError, match=rf"{url}/step_0000000001/rank_00000.*'model/w' is damaged .*: restore the"):
        checkpoint.read("model/w")


def test_of_two_writers_of_a_step_the_first_stays(url: str) -> None:
    first, second = open_store(url), open_store(url)
    save(first, 5)
    before = keys(url)
    save(second, 5)  # the same content
    assert keys(url) == before
    saver = Saver(second, ALONE)
    saver.save(5, pieces(6), META)
    with pytest.raises(DataError, match=rf"{url}/step_0000000005 was saved by another run meanwhile"):
        saver.wait()
    check(first, 5)
    assert keys(url) == before
    save(second, 6)  # and the next one of either run is whole
    check(first, 6)


def test_an_outage_costs_the_saves_within_it(
    url: str, fault_proxy: FaultProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(url, deadline_s=1.0)
    saver = save(store, 1)
    fault_proxy.add(Fault("status503"))
    saver.save(2, pieces(2), META)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"step 2 was not saved: .* has failed for 1 s.* run the same command again to"):
        saver.wait()
    assert time.monotonic() - began < 20.0
    said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("storage: ")]
    assert len(said) == 1
    assert said[0].startswith(
        f"the checkpoint of step 2 was not saved: {url}: the storage has failed for 1 s, last with"
    )
    assert said[0].endswith(": see that it is up and reachable; what was saved before is untouched")
    with pytest.raises(DataError, match=rf"{url}.*: the storage has failed for 1 s"):
        store.find(ALONE)
    fault_proxy.clear()
    check(store, 1)
    saver.save(3, pieces(3), META)
    saver.wait()
    check(store, 3)
    assert saver.failed_saves == 1 and store.steps() == [1, 3] and len(keys(url)) == 4


def test_denied_is_said_at_once(url: str, fault_proxy: FaultProxy) -> None:
    store = open_store(url)
    fault_proxy.add(Fault("status403", method="PUT"))
    saver = Saver(store, ALONE)
    saver.save(1, pieces(1), META)
    with pytest.raises(DataError, match="step 1 was not saved: .* access denied .* check the credentials"):
        saver.wait()
    fault_proxy.clear()
    fault_proxy.add(Fault("status403", method="DELETE"), Fault("status403", method="POST"))
    save(store, 2, 3, 4)  # a bucket that nothing may be deleted from
    check(store, 4)
    assert store.steps() == [2, 3, 4]


HARMS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-1],
    "torn": lambda data: data[: len(data) // 2],
    "flipped": lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
}


@pytest.mark.parametrize("name", ["rank_", "manifest.json"])
def test_damage_on_the_store_gives_way_to_the_one_before(url: str, tmp_path: Path, name: str) -> None:
    store = open_store(url)
    save(store, 1, 2)
    fs, path = open_url(url, "test")
    (key,) = [key for key in keys(url) if key.startswith(f"step_0000000002/{name}")]
    whole, proof = fs.cat_file(f"{path}/{key}"), tmp_path / "executed"
    for harm in (*HARMS.values(), lambda _: pickle.dumps(Hostile(proof))):
        fs.pipe_file(f"{path}/{key}", harm(whole))
        check(store, 1)
        assert store.damaged == {2}
        fs.pipe_file(f"{path}/{key}", whole)
        check(store, 2)
        assert not store.damaged
    fs.rm_file(f"{path}/{key}")
    check(store, 1)
    assert not proof.exists()
    fs.pipe_file(f"{path}/step_0000000002/rank_00001.0123456789ab.json", pickle.dumps(Hostile(proof)))
    save(store, 2)  # written over, whatever was there
    check(store, 2)
    assert not proof.exists() and len(keys(url)) == 4


def test_what_killed_processes_left_is_cleaned_up(url: str) -> None:
    store = open_store(url)
    fs, path = open_url(url, "test")
    bucket, prefix = path.split("/", 1)
    torn = f"{prefix}/step_0000000001/rank_00000.0123456789abcdef.safetensors"
    fs.pipe_file(f"{bucket}/{torn}", b"half of it")
    fs.call_s3("create_multipart_upload", Bucket=bucket, Key=torn)
    fs.call_s3("create_multipart_upload", Bucket=bucket, Key="run/elsewhere")
    assert store.find(ALONE) is None
    save(store, 2)
    assert all(key.startswith("step_0000000002/") for key in keys(url))
    assert [u["Key"] for u in fs.list_multipart_uploads(bucket)] == ["run/elsewhere"]


# whole runs


def test_a_run_goes_on_through_an_outage_and_a_lost_end_is_an_error(
    tiny_config: Write, tmp_path: Path, url: str, fault_proxy: FaultProxy
) -> None:
    settings = {"url": url, "every_steps": 5, "retry_s": 0.7, "export_every": 2}
    config = tiny_config("outage", train={"steps": 20}, checkpoint=settings)
    # rank 1 cannot write its part of step 5, and nobody the last one
    fault_proxy.add(Fault("status503", path="step_0000000005/rank_00001.*safetensors"))
    fault_proxy.add(Fault("status503", path="step_0000000020"))
    fault_proxy.add(Fault("flip", next=2, method="GET", path=r"rank_00001\.[0-9a-f]{12}\.json", after_bytes=99))
    done = run_command(local(config, 2))
    said = [line for line in done.stdout.splitlines() if "not saved" in line]
    assert done.returncode == 8, done.stderr
    assert len(said) == 2, done.stdout
    assert said[0].startswith(f"the checkpoint of step 5 was not saved: rank 1: {url}/step_0000000005/rank_00001")
    assert said[1].startswith("the checkpoint of step 20 was not saved: ")
    errors = [line for line in done.stderr.splitlines() if "was not saved" in line]
    # both ranks say it, unless one is gone before the other has
    assert errors and all("run the same command again to go on from the one before" in e for e in errors)
    assert "Traceback" not in done.stderr
    lines = metrics(tmp_path / "runs" / "outage")
    assert [line["step"] for line in lines] == list(range(1, 21)) and lines[-1]["failed_saves"] == 1
    assert lines[0]["checkpoint_stall_s"] is None and lines[0]["checkpoint_write_s"] is None
    assert lines[-1]["checkpoint_stall_s"] > 0 and lines[-1]["checkpoint_write_s"] > 0
    assert [p.name for p in (tmp_path / "runs/outage/export").iterdir()] == ["step_0000000010_ema_0.99"]
    fault_proxy.clear()
    checkpoint = CheckpointStore(url).find(ALONE)
    assert checkpoint is not None and checkpoint.step == 15
    assert sum(event.kind == "flip" for event in fault_proxy.log) == 2
    for name in checkpoint.manifest["tensors"]:
        checkpoint.read(name)


def test_a_run_on_a_full_disk_ends_with_exit_code_4(tiny_config: Write, tmp_path: Path) -> None:
    config = tiny_config("full", train={"steps": 10}, checkpoint={"every_steps": 5})
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    process = forked.Process([*forked.CLI, "train", config], before=limit)
    said, errors = process.communicate(300)
    assert process.returncode == 4 and errors.count("\n") == 1, errors
    assert "step 10 was not saved" in errors and "free some space" in errors
    assert sum("was not saved" in line for line in said.splitlines()) == 2
    assert metrics(tmp_path / "runs" / "full")[-1]["failed_saves"] == 1
    assert not (tmp_path / "runs/full/export").exists()
    assert run_command(["ig-dist", "train", config]).returncode == 0
    assert [p.name for p in (tmp_path / "runs/full/export").iterdir()] == ["step_0000000010_ema_0.99"]


@pytest.mark.parametrize("kills", [6, pytest.param(30, marks=[pytest.mark.full, pytest.mark.timeout(1800)])])
def test_sigkill_within_a_save_leaves_no_trace(
    tiny_config: Write, tmp_path: Path, url: str, fault_proxy: FaultProxy, kills: int
) -> None:
    """Killed at a request that writes or deletes, before, while or after the store does it."""
    settings: dict[str, Any] = {"every_steps": 4, "keep_last": 2}
    train = {"steps": 4 * kills + 8}
    whole = tiny_config("whole", train=train, checkpoint=settings)
    killed = tiny_config("killed", train=train, checkpoint={**settings, "url": url})
    assert run_command(local(whole, 2)).returncode == 0
    fault_proxy.delay = 0.01  # as a store that is far away
    moments, store, resumed = random.Random(kills), open_store(url), []
    for _ in range(kills):
        kill_at_write(local(killed, 2), fault_proxy, moments.randrange(1, 9), extra_s=moments.uniform(0, 0.02))
        checkpoint = store.find(ALONE)
        assert not store.damaged
        resumed.append(checkpoint.step if checkpoint else 0)
    assert resumed == sorted(resumed) and resumed[-1] > 0  # nothing that was whole was lost
    done = run_command(local(killed, 2))
    assert done.returncode == 0 and f"resume at step {resumed[-1]} of" in done.stdout, done.stderr
    assert "damaged" not in done.stderr

    expected = CheckpointStore(str(tmp_path / "runs/whole/checkpoints")).find(ALONE)
    found = store.find(ALONE)
    assert expected is not None and found is not None and found.step == expected.step == train["steps"]
    assert found.manifest["tensors"].keys() == expected.manifest["tensors"].keys()
    for name in expected.manifest["tensors"]:
        assert torch.equal(found.read(name), expected.read(name)), name
    assert {key.split("/")[0] for key in keys(url)} == {f"step_{step:010d}" for step in store.steps()}
    assert len(keys(url)) == 3 * 2  # two checkpoints of two files and a manifest: nothing torn is left


def kill_at_write(command: list[str], proxy: FaultProxy, number: int, extra_s: float) -> None:
    """Start the command and SIGKILL all of it at its so many-th request that changes something."""
    proxy.requests.clear()
    process = forked.Process(command[1:], new_session=True)

    def changes() -> int:
        return sum(method not in ("GET", "HEAD") for method, _ in list(proxy.requests))

    wait_until(lambda: changes() >= number, process, every_s=0.001)
    time.sleep(extra_s)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.2)  # what is on its way arrives
