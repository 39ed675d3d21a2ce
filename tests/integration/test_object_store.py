"""The test bed for object storage is what the tests on it rely on: a real server, and faults as they were asked for."""

from __future__ import annotations

import errno
import http.client
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import botocore.exceptions
import pytest
import s3fs

from tests.conftest import ROOT, require_object_store
from tests.fault_proxy import Event, Fault, FaultProxy
from tests.object_store import PROGRAMS, ObjectStore
from tests.waiting import alive, wait_until

DATA = bytes(range(256)) * 4096  # 1 MiB
ONCE = {"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 1}, "read_timeout": 2}}


@pytest.fixture(params=["direct", "proxy"])
def fs(request: pytest.FixtureRequest, bucket: str) -> Any:
    """s3fs as the environment makes it, at the gateway and behind the proxy."""
    if request.param == "proxy":
        request.getfixturevalue("fault_proxy")
    return s3fs.S3FileSystem()


class Plain:
    """A client that repairs nothing: one connection, one answer each."""

    def __init__(self, proxy: FaultProxy, url: str) -> None:
        self.target = "{0.path}?{0.query}".format(urlsplit(url))
        self.connection = http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc, timeout=10)

    def get(self) -> http.client.HTTPResponse:
        self.connection.request("GET", self.target)
        return self.connection.getresponse()


@pytest.fixture
def plain(bucket: str, fault_proxy: FaultProxy) -> Iterator[Plain]:
    """Reads DATA from the bucket."""
    fs = s3fs.S3FileSystem()
    fs.pipe_file(f"{bucket}/data.bin", DATA)
    client = Plain(fault_proxy, fs.sign(f"{bucket}/data.bin"))
    yield client
    client.connection.close()


def test_files(fs: Any, bucket: str) -> None:
    fs.pipe_file(f"{bucket}/folder/one.bin", DATA)
    assert fs.cat_file(f"{bucket}/folder/one.bin") == DATA
    assert fs.cat_file(f"{bucket}/folder/one.bin", start=1000, end=1010) == DATA[1000:1010]
    for name in range(5):
        fs.pipe_file(f"{bucket}/folder/{name}", b"x" * name)
    fs.invalidate_cache()
    assert {Path(found["name"]).name: found["size"] for found in fs.ls(f"{bucket}/folder", detail=True)} == {
        "one.bin": len(DATA),
        **{str(name): name for name in range(5)},
    }
    fs.rm(f"{bucket}/folder", recursive=True)
    assert not fs.exists(f"{bucket}/folder/one.bin")
    with pytest.raises(FileNotFoundError):
        fs.cat_file(f"{bucket}/folder/one.bin")


def test_multipart(fs: Any, bucket: str) -> None:
    data = DATA * 12
    with fs.open(f"{bucket}/large.bin", "wb", block_size=5 * 2**20) as file:
        for start in range(0, len(data), 2**20):
            file.write(data[start : start + 2**20])
    parts = fs.info(f"{bucket}/large.bin")["ETag"].strip('"').partition("-")[2]
    assert int(parts) > 1
    assert fs.cat_file(f"{bucket}/large.bin") == data


def test_wrong_secret(fs: Any, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(PermissionError):
        s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(f"{bucket}/file", b"data")


def test_conditional_put(fs: Any, bucket: str, object_store: ObjectStore) -> None:
    fs.pipe_file(f"{bucket}/manifest", b"first", mode="create")
    with pytest.raises(OSError) as refused:
        fs.pipe_file(f"{bucket}/manifest", b"second", mode="create")
    assert refused.value.errno == errno.EINVAL  # s3fs's word for 412
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        object_store.client.put_object(Bucket=bucket, Key="manifest", Body=b"third", IfNoneMatch="*")
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert fs.cat_file(f"{bucket}/manifest") == b"first"


def test_processes_find_the_bucket(bucket: str, fault_proxy: FaultProxy) -> None:
    code = f"import fsspec; fsspec.open('s3://{bucket}/file', 'wb').open().close()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert ("PUT", f"/{bucket}/file") in [(method, path.partition("?")[0]) for method, path in fault_proxy.requests]


# what the proxy does to one connection


def test_connections_are_kept(plain: Plain) -> None:
    for _ in range(3):
        assert plain.get().read() == DATA
    sock = plain.connection.sock
    sock.sendall(f"GET {plain.target} HTTP/1.1\r\nHost: {plain.connection.host}\r\n\r\n".encode() * 3)  # pipelined
    received = 0
    while received < 3 * len(DATA):
        received += len(sock.recv(2**20))


@pytest.mark.parametrize("code", [403, 404, 500, 503])
def test_status(plain: Plain, fault_proxy: FaultProxy, code: int) -> None:
    fault_proxy.add(Fault(f"status{code}", next=1))
    answer = plain.get()
    assert answer.status == code and b"<Error>" in answer.read()
    assert plain.get().read() == DATA  # on the same connection


@pytest.mark.parametrize("kind", ["reset", "lost"])
def test_reset(plain: Plain, fault_proxy: FaultProxy, kind: str) -> None:
    fault_proxy.add(Fault(kind, next=1))
    with pytest.raises(ConnectionResetError):
        plain.get()


def test_hang(plain: Plain, fault_proxy: FaultProxy) -> None:
    fault_proxy.add(Fault("hang"))
    plain.connection.timeout = 0.5
    with pytest.raises(TimeoutError):
        plain.get()


def test_cut(plain: Plain, fault_proxy: FaultProxy) -> None:
    fault_proxy.add(Fault("cut", after_bytes=1000))
    with pytest.raises(http.client.IncompleteRead) as caught:
        plain.get().read()
    assert caught.value.partial == DATA[:1000]


def test_stall(plain: Plain, fault_proxy: FaultProxy) -> None:
    fault_proxy.add(Fault("stall", after_bytes=1000))
    answer = plain.get()
    assert answer.read(1000) == DATA[:1000]
    plain.connection.sock.settimeout(0.5)
    with pytest.raises(TimeoutError):
        answer.read(1)


def test_short(plain: Plain, fault_proxy: FaultProxy) -> None:
    fault_proxy.add(Fault("short", after_bytes=1000, next=1))
    answer = plain.get()
    assert answer.headers["Content-Length"] == "1000"
    assert answer.read() == DATA[:1000]
    assert plain.get().read() == DATA


@pytest.mark.parametrize("at", [0, len(DATA) - 1])
def test_flip(plain: Plain, fault_proxy: FaultProxy, at: int) -> None:
    fault_proxy.add(Fault("flip", after_bytes=at))
    changed = plain.get().read()
    assert len(changed) == len(DATA)
    assert [i for i in range(len(DATA)) if changed[i] != DATA[i]] == [at]


# what the proxy chooses


def test_rules(plain: Plain, fault_proxy: FaultProxy) -> None:
    path = plain.target
    fault_proxy.add(
        Fault("status500", method="PUT"),
        Fault("status500", path="other"),
        Fault("cut", after_bytes=len(DATA)),  # nothing to cut
        Fault("status503", next=2, method="GET", path=r"data\.bin"),
    )
    answers = []
    for _ in range(3):
        answer = plain.get()
        answers.append(answer.status)
        answer.read()
    assert answers == [503, 503, 200]
    assert fault_proxy.log == [Event("status503", "GET", path)] * 2
    fault_proxy.add(Fault("status403"))
    fault_proxy.clear()
    assert plain.get().read() == DATA
    with pytest.raises(ValueError, match="status200"):
        Fault("status200")


def test_share_and_seed(object_store: ObjectStore) -> None:
    def run(seed: int) -> list[int]:
        with FaultProxy(object_store.endpoint, seed) as proxy:
            proxy.add(Fault("status503", share=0.3))
            client, codes = Plain(proxy, "/"), []
            for _ in range(100):
                answer = client.get()
                codes.append(answer.status)
                answer.read()
            client.connection.close()
        return codes

    first = run(1)
    assert 15 <= first.count(503) <= 45
    assert first == run(1) != run(2)


def test_far_away(plain: Plain, fault_proxy: FaultProxy) -> None:
    fault_proxy.delay = 0.2
    began = time.monotonic()
    plain.get().read()
    assert time.monotonic() - began >= 0.2


# what s3fs makes of it


@pytest.mark.parametrize("kind", ["status503", "reset", "cut", "lost"])
def test_a_few_faults_are_repaired(bucket: str, fault_proxy: FaultProxy, kind: str) -> None:
    fs = s3fs.S3FileSystem()
    fs.pipe_file(f"{bucket}/file", DATA)
    fault_proxy.add(Fault(kind, next=2, method="GET", path="/file", after_bytes=1000))
    assert fs.cat_file(f"{bucket}/file") == DATA
    assert len(fault_proxy.log) == 2


def test_faults_of_a_put(bucket: str, fault_proxy: FaultProxy, object_store: ObjectStore) -> None:
    """What came whole is there, whatever the client was told; what did not is not."""
    direct = s3fs.S3FileSystem(endpoint_url=object_store.endpoint)
    for kind, there in {"reset": False, "lost": True, "cut": False, "flip": False, "status503": False}.items():
        fault_proxy.clear()
        fault_proxy.add(Fault(kind, method="PUT", after_bytes=1000))
        fs = s3fs.S3FileSystem(skip_instance_cache=True, **ONCE)
        fs.retries = 1
        with pytest.raises((OSError, botocore.exceptions.BotoCoreError)):
            fs.pipe_file(f"{bucket}/{kind}", DATA)
        direct.invalidate_cache()
        assert direct.exists(f"{bucket}/{kind}") == there, kind
    assert {event.method for event in fault_proxy.log} == {"PUT"}


# the daemons


def test_gateway_killed(bucket: str, fault_proxy: FaultProxy, object_store: ObjectStore) -> None:
    fs = s3fs.S3FileSystem(**ONCE)
    fs.retries = 1
    fs.pipe_file(f"{bucket}/file", DATA)
    before = object_store.pids
    object_store.kill_gateway()
    try:
        assert not alive(before["radosgw"]) and alive(before["ceph-osd"])
        with pytest.raises((OSError, botocore.exceptions.BotoCoreError)):
            fs.cat_file(f"{bucket}/file")
    finally:
        object_store.restart_gateway()
    assert fs.cat_file(f"{bucket}/file") == DATA


def test_all_killed(tmp_path: Path) -> None:
    require_object_store()
    with ObjectStore(tmp_path, store="bluestore") as store:
        store.create_bucket("kept")
        store.client.put_object(Bucket="kept", Key="file", Body=DATA)
        before = store.pids
        store.restart()
        assert store.client.get_object(Bucket="kept", Key="file")["Body"].read() == DATA
        after = store.pids
    assert len(after) == 3
    assert not any(alive(pid) for pid in [*before.values(), *after.values()])
    with pytest.raises(ValueError, match="bluestore"):
        ObjectStore(tmp_path).restart()


@pytest.mark.parametrize("end", ["signal.pause()", "sys.exit()", "1 / 0"])
def test_daemons_end_with_the_process(object_store: ObjectStore, tmp_path: Path, end: str) -> None:
    """Killed or ended without a stop; beside another store that goes on."""
    code = (
        "import pathlib, signal, sys; from tests.object_store import ObjectStore;"
        f"store = ObjectStore(pathlib.Path({str(tmp_path)!r})).start();"
        f"print(*store.pids.values(), flush=True); {end}"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 3 and not set(pids) & set(object_store.pids.values())
        if "pause" in end:
            assert all(map(alive, pids))
            process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    wait_until(lambda: not any(map(alive, pids)))
    assert len(object_store.pids) == 3
    shutil.rmtree(tmp_path)  # 40 MB


def test_missing_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's run goes on without, and says what to install; CI's does not."""
    from tests import object_store

    assert object_store.available() is None or "apt install" in str(object_store.available())
    monkeypatch.setattr(object_store, "ENVIRONMENT", {"PATH": "/nowhere"})
    assert all(name in str(object_store.available()) for name in (*PROGRAMS, "apt install radosgw"))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt install"):
        require_object_store()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt install"):
        require_object_store()
