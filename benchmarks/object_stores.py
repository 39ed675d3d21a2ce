"""obstore against s3fs and against ``ig_dist.storage``, on a real S3 server and behind a proxy with faults.

    pip install obstore
    python -m benchmarks.object_stores

Each client is a process of its own, one after the other in each round. Reads and writes are MB/s and seconds of the
processor for a GB, of the best round; of the rest all rounds are shown.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.fault_proxy import Fault, FaultProxy
from tests.object_store import ACCESS_KEY, REGION, SECRET_KEY, ObjectStore

MIB = 2**20
BUCKET, OBJECT = "bench", "shard.tar"
SIZE = 256 * MIB
THREADS = 8
STALL_S = 2.0
FAULTS = {  # of 200 windows
    "503": Fault("status503", share=0.05),
    "reset": Fault("reset", share=0.05),
    "cut": Fault("cut", share=0.05, after_bytes=1000),
    "short": Fault("short", next=3, after_bytes=1000),
    "stall": Fault("stall", next=3, after_bytes=1000),
}


class Client(NamedTuple):
    """What is measured of one."""

    read: Callable[[int, int], Any]
    put: Callable[[str, bytes], object]
    create: Callable[[str, bytes], bool]  # whether the object is ours now


def ours(endpoint: str) -> Client:
    """As training and encoding read and write."""
    import s3fs

    os.environ["AWS_ENDPOINT_URL"] = endpoint
    s3fs.S3FileSystem.clear_instance_cache()  # fsspec would give the one at the other endpoint
    from ig_dist.storage.faults import Patience
    from ig_dist.storage.files import open_url, read_range, write_whole
    from ig_dist.storage.writes import create_file, write_stream

    fs, root = open_url(f"s3://{BUCKET}", "bucket", Patience(stall_s=STALL_S, deadline_s=30))

    def put(key: str, data: bytes) -> None:
        pieces = [memoryview(data)[at : at + 32 * MIB] for at in range(0, len(data), 32 * MIB)]
        if len(pieces) > 1:
            write_stream(fs, f"{root}/{key}", pieces, size=len(data))
        else:
            write_whole(fs, f"{root}/{key}", data)

    return Client(
        lambda start, stop: read_range(fs, f"{root}/{OBJECT}", start, stop),
        put,
        lambda key, data: create_file(fs, f"{root}/{key}", data),
    )


def s3fs(endpoint: str) -> Client:
    """With its own retries."""
    import s3fs

    config = {"retries": {"mode": "standard", "max_attempts": 5}, "read_timeout": STALL_S, "max_pool_connections": 64}
    fs = s3fs.S3FileSystem(endpoint_url=endpoint, config_kwargs=config)

    def create(key: str, data: bytes) -> bool:
        try:
            fs.pipe_file(f"{BUCKET}/{key}", data, mode="create")
        except OSError:
            return False
        return True

    return Client(
        lambda start, stop: fs.cat_file(f"{BUCKET}/{OBJECT}", start=start, end=stop),
        lambda key, data: fs.pipe_file(f"{BUCKET}/{key}", data),
        create,
    )


def obstore(endpoint: str) -> Client:
    """With its own retries."""
    module: Any = importlib.import_module("obstore")  # no dependency, and unknown to mypy
    store = importlib.import_module("obstore.store").S3Store(
        BUCKET,
        endpoint=endpoint,
        region=REGION,
        access_key_id=ACCESS_KEY,
        secret_access_key=SECRET_KEY,
        client_options={"allow_http": True, "timeout": f"{STALL_S}s"},
    )

    def create(key: str, data: bytes) -> bool:
        try:
            module.put(store, key, data, mode="create")
        except module.exceptions.AlreadyExistsError:
            return False
        return True

    return Client(
        lambda start, stop: module.get_range(store, OBJECT, start=start, end=stop),
        lambda key, data: module.put(store, key, data, chunk_size=32 * MIB, max_concurrency=4),
        create,
    )


CLIENTS = {"ours": ours, "s3fs": s3fs, "obstore": obstore}


def content(start: int, stop: int) -> bytes:
    """What the object holds there: the number of each 4 KiB."""
    return b"".join((at // 4096).to_bytes(4, "little") * 1024 for at in range(start, stop, 4096))


@contextmanager
def timed(found: dict[str, Any], name: str, size: int) -> Iterator[None]:
    """MB/s, and seconds of the processor for a GB."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    found[name] = round(size / wall / 1e6), round(cpu / size * 1e9, 2)


def measure(name: str, endpoint: str, windows: int) -> dict[str, Any]:
    """One client, in this process."""
    began = time.perf_counter()
    client = CLIENTS[name](endpoint)
    client.create("first", b"first")
    found: dict[str, Any] = {"start_s": round(time.perf_counter() - began, 2), "start_mib": memory()}
    with ThreadPoolExecutor(THREADS) as pool:
        for kib in (64, 256, 8192):
            count = min(windows, 2 * SIZE // (kib * 1024))
            places = [index * 7_919 * 4096 % (SIZE - kib * 1024) for index in range(count)]
            with timed(found, f"read {kib} KiB", count * kib * 1024):
                list(pool.map(lambda at, size=kib * 1024: client.read(at, at + size), places))
        for mib in (8, 64):
            data = os.urandom(mib * MIB)
            with timed(found, f"put {mib} MiB", 2 * len(data)):
                list(pool.map(lambda key, body=data: client.put(key, body), ["put-0", "put-1"]))
        found["created twice"] = [client.create(f"{name}-{began}", body) for body in (b"a", b"b")]
        found["peak_mib"] = memory()
    with FaultProxy(endpoint) as proxy:
        faulty = CLIENTS[name](proxy.endpoint)
        for kind, fault in FAULTS.items():
            proxy.add(fault)
            began, wrong, errors = time.perf_counter(), 0, dict[str, int]()
            for at in range(0, 200 * 65536, 65536):
                try:
                    wrong += bytes(faulty.read(at, at + 65536)) != content(at, at + 65536)
                except Exception as error:  # each client has its own
                    errors[type(error).__name__] = errors.get(type(error).__name__, 0) + 1
            found[kind] = {"s": round(time.perf_counter() - began, 1), "wrong": wrong, "errors": errors}
            proxy.clear()
        proxy.add(Fault("lost", next=1, method="PUT"))
        try:
            found["created, answer lost"] = faulty.create(f"lost-{name}-{began}", b"data")
        except Exception as error:
            found["created, answer lost"] = type(error).__name__
    return found


def memory() -> int:
    """MiB at most so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=1000, help="read of each size")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        name, endpoint = asked.child
        print(json.dumps(measure(name, endpoint, asked.windows)))
        return
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ObjectStore(Path(folder)) as store:
        os.environ |= store.environment()
        store.create_bucket(BUCKET)
        store.client.put_object(Bucket=BUCKET, Key=OBJECT, Body=content(0, SIZE))
        for _ in range(asked.rounds):
            rounds.append({})
            for name in CLIENTS:
                line = [sys.executable, "-m", "benchmarks.object_stores", "--windows", str(asked.windows)]
                line += ["--child", name, store.endpoint]
                rounds[-1][name] = json.loads(subprocess.check_output(line, text=True).splitlines()[-1])
    for key in rounds[0]["ours"]:
        for name in CLIENTS:
            values = [one[name][key] for one in rounds]
            print(f"{key:>24} {name:>8}: {max(values) if key.startswith(('read', 'put')) else values}")


if __name__ == "__main__":
    main()
