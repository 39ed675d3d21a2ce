"""A storage that stays away while a run wants its next batch: nothing that was trained is lost, on any rank."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ig_dist.data.index import read_index
from ig_dist.storage.files import open_url, write_whole
from tests import forked
from tests.fault_proxy import Fault, FaultProxy
from tests.object_store import ObjectStore, free_port
from tests.runs import last_step
from tests.waiting import wait_until

Write = Callable[..., Path]
Ranks = list[forked.Process]


@pytest.fixture
def url(bucket: str, digits_index: Path) -> str:
    fs, path = open_url(f"s3://{bucket}/digits", "test")
    for file in digits_index.iterdir():
        write_whole(fs, f"{path}/{file.name}", file.read_bytes())
    fs.clear_instance_cache()
    return f"s3://{bucket}/digits"


def start(config: Path, endpoints: list[str]) -> Ranks:
    """A rank for each endpoint of the store."""
    job = {"WORLD_SIZE": len(endpoints), "LOCAL_WORLD_SIZE": len(endpoints), "MASTER_PORT": free_port()}
    ranks = []
    for rank, endpoint in enumerate(endpoints):
        own = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "AWS_ENDPOINT_URL": endpoint}
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", **{k: str(v) for k, v in (job | own).items()}}
        ranks.append(forked.Process([*forked.CLI, "train", config], env=environment))
    return ranks


def end(ranks: Ranks) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    try:
        said = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.wait(), out, err) for rank, (out, err) in zip(ranks, said, strict=True)]


def starve(ranks: Ranks, run: Path, proxy: FaultProxy, fault: Fault) -> None:
    """Let them train, then take the shards away and wait until what had been read ahead is used up."""
    wait_until(lambda: last_step(run) >= 10, *ranks)
    proxy.add(fault)
    seen = 0

    def stands_still() -> bool:
        nonlocal seen
        before, seen = seen, last_step(run)
        time.sleep(1.0)
        return before == seen and len(proxy.log) > 0

    wait_until(stands_still, *ranks)


def saved(run: Path) -> list[int]:
    return [json.loads(file.read_text())["step"] for file in sorted(run.glob("checkpoints/*/manifest.json"))]


def config_of(write: Write, url: str, **data: Any) -> Path:
    settings = {"index": url, "window_samples": 8, "stall_s": 100, **data}
    return write("outage", train={"steps": 100_000}, data=settings, checkpoint={"every_steps": 100_000})


@pytest.mark.parametrize(
    ("fault", "starved", "signalled"),
    [
        (Fault("reset", path=r"\.tar"), [True], 0),
        (Fault("hang", path=r"\.tar"), [True], 0),
        (Fault("reset", path=r"\.tar"), [False, True], 0),  # who has its batch
        (Fault("hang", path=r"\.tar"), [False, True], 1),  # who waits
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else str(value),
)
def test_a_stop_while_the_storage_is_away_saves_and_exits_75(
    tiny_config: Write,
    tmp_path: Path,
    url: str,
    object_store: ObjectStore,
    fault_proxy: FaultProxy,
    fault: Fault,
    starved: list[bool],
    signalled: int,
) -> None:
    run = tmp_path / "runs" / "outage"
    config = config_of(tiny_config, url, retry_s=100)
    ranks = start(config, [fault_proxy.endpoint if away else object_store.endpoint for away in starved])
    starve(ranks, run, fault_proxy, fault)
    began = time.monotonic()
    ranks[signalled].send_signal(signal.SIGTERM)
    ends = end(ranks)
    assert time.monotonic() - began < 15
    done = last_step(run)
    assert [code for code, _, _ in ends] == [75] * len(ranks), ends
    assert f"saved at step {done} of 100000; run the same command again to go on" in ends[0][2]
    assert saved(run) == [done] and done >= 10


@pytest.mark.parametrize("starved", [[True], [False, True]], ids=str)
def test_an_outage_beyond_the_deadline_saves_before_it_ends_the_run(
    tiny_config: Write,
    tmp_path: Path,
    url: str,
    object_store: ObjectStore,
    fault_proxy: FaultProxy,
    starved: list[bool],
) -> None:
    run = tmp_path / "runs" / "outage"
    config = config_of(tiny_config, url, retry_s=3)
    endpoints = [fault_proxy.endpoint if away else object_store.endpoint for away in starved]
    ranks = start(config, endpoints)
    starve(ranks, run, fault_proxy, Fault("reset", path=r"\.tar"))
    ends = end(ranks)
    done = last_step(run)
    assert [code for code, _, _ in ends] == [8] * len(ranks), ends
    (line,) = "".join(err for _, _, err in ends).splitlines()  # once, whoever met it
    assert line.startswith(f"error: {url}/shard-") and "has failed for 3 s" in line
    assert line.endswith(f"then run the same command again (saved at step {done} of 100000)")
    assert saved(run) == [done] and done >= 10

    fault_proxy.clear()
    ranks = start(config, endpoints)
    wait_until(lambda: last_step(run) > done, *ranks)
    ranks[0].send_signal(signal.SIGTERM)
    ends = end(ranks)
    assert [code for code, _, _ in ends] == [75] * len(ranks), ends
    assert f"resume at step {done} of" in ends[0][1]


def test_a_stop_while_validation_waits_for_the_storage(
    tiny_config: Write, tmp_path: Path, url: str, object_store: ObjectStore, fault_proxy: FaultProxy
) -> None:
    run = tmp_path / "runs" / "outage"
    held_out = read_index(url).info.shards[-1].name
    settings = {"index": url, "validation_shards": 1, "stall_s": 100}
    log = {"validate_every_steps": 15}
    config = tiny_config("outage", train={"steps": 100}, data=settings, checkpoint={"every_steps": 100}, log=log)
    ranks = start(config, [object_store.endpoint, fault_proxy.endpoint])
    fault_proxy.add(Fault("hang", path=held_out))
    wait_until(lambda: len(fault_proxy.log) > 0, *ranks)
    time.sleep(1.0)
    ranks[0].send_signal(signal.SIGTERM)
    ends = end(ranks)
    assert [code for code, _, _ in ends] == [75, 75], ends
    assert last_step(run) == 15 and saved(run) == [15]
