"""Encoding from and to a real S3 server through faults, signals, and workers whose floating point is another."""

from __future__ import annotations

import base64
import http.server
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ig_dist.encoding.records
import ig_dist.encoding.shards
from ig_dist.data.sources import find_source
from ig_dist.data.sources.spool import SourceFile, copy_tar
from ig_dist.errors import ConfigError, DataError
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import REQUEST_BYTES, open_url, write_whole
from tests import forked
from tests.conftest import succeed
from tests.encoding import Encode, arguments, usually_named
from tests.fault_proxy import Fault, FaultProxy
from tests.waiting import wait_until


def start(source: Path | str, dest: Path | str, options: str = "") -> forked.Process:
    return forked.Process(arguments(source, dest, options))


def upload(url: str, folder: Path) -> str:
    fs, path = open_url(url, "test")
    for file in folder.iterdir():
        write_whole(fs, f"{path}/{file.name}", file.read_bytes())
    return url


def stop(process: forked.Process, proxy: FaultProxy, number: int) -> str:
    """Stop a worker that meets faults; what it says on stderr. It may not take long."""
    wait_until(lambda: proxy.log, process)
    time.sleep(0.5)
    process.send_signal(number)
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 20
    return errors


def test_a_signal_ends_it_while_the_store_refuses_shards(
    forms: dict[str, Path], fault_proxy: FaultProxy, bucket: str
) -> None:
    fault_proxy.add(Fault("status503", method="PUT", path=r"\.tar"))
    process = start(forms["ImageFolder"], f"s3://{bucket}/out")
    errors = stop(process, fault_proxy, signal.SIGTERM)
    assert process.returncode == 75 and errors.count("\n") == 1 and "stopped: SIGTERM; finished shards stay" in errors


def test_a_tar_is_copied_by_one_worker_of_a_machine_and_by_the_next_if_that_is_stopped(
    forms: dict[str, Path], fault_proxy: FaultProxy, bucket: str, tmp_path: Path
) -> None:
    source, options = upload(f"s3://{bucket}/in", forms["WebDataset"]), f"--spool {tmp_path}/spool"
    fault_proxy.add(Fault("hang", method="GET", path=r"\.tar"))
    first = start(source, tmp_path / "out", options)
    wait_until(lambda: len(fault_proxy.log) >= 3, first)  # it has begun to copy each
    second = start(source, tmp_path / "out", options)
    waits = "waits for another process that copies train-0000"
    wait_until(lambda: second.out.exists() and waits in second.out.read_text(), second)
    assert len(fault_proxy.log) == 3
    errors = stop(first, fault_proxy, signal.SIGINT)
    assert first.returncode == 130 and "stopped: Ctrl-C" in errors
    assert list(tmp_path.rglob("*.tmp"))  # what it had begun
    fault_proxy.clear()
    fault_proxy.requests.clear()
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert sum(path.endswith(".tar") for method, path in fault_proxy.requests if method == "GET") == 3
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_copy_goes_on_where_it_broke_off(fault_proxy: FaultProxy, bucket: str, tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(2 * REQUEST_BYTES + 5_000_000)
    fs, path = open_url(f"s3://{bucket}/one.tar", "test")
    write_whole(fs, path, data)
    copied = 0

    def advance(count: int, done: int | None = None) -> None:
        nonlocal copied
        copied += count
        if copied == 2 * REQUEST_BYTES:
            fault_proxy.add(Fault("cut", next=1, method="GET", path="one.tar", after_bytes=2_000_000))

    fault_proxy.requests.clear()
    copy_tar(SourceFile(fs, path, "one.tar", len(data), ""), tmp_path / "copy", Patience(), advance)
    assert (tmp_path / "copy").read_bytes() == data and len(fault_proxy.log) == 1
    assert sum("one.tar" in path for _, path in fault_proxy.requests) == 4


def test_remote_parquet_is_read_through_faults_and_beyond_them_it_is_one_line(
    forms: dict[str, Path], fault_proxy: FaultProxy, bucket: str, tmp_path: Path
) -> None:
    source = upload(f"s3://{bucket}/in", forms["parquet"] / "data")
    for kind, method in (("status503", "HEAD"), ("status503", "GET"), ("reset", "GET"), ("cut", "GET")):
        fault_proxy.add(Fault(kind, next=1, method=method, path="parquet", after_bytes=500 if kind == "cut" else 0))
    found = find_source(f"{source}/*.parquet", str(tmp_path / "spool"))
    assert len(found.open().labels) == 240 and len(fault_proxy.log) == 4
    fault_proxy.add(Fault("status503", method="GET", path="parquet$"))
    with pytest.raises(DataError, match=rf"{source}/.*\.parquet: the storage has failed for 1 s"):
        find_source(f"{source}/*.parquet", str(tmp_path / "spool"), Patience(deadline_s=1))


class Web(http.server.BaseHTTPRequestHandler):
    """Files of ``folder`` by HEAD and Range, for one user."""

    folder: Path

    def do_GET(self) -> None:
        data = (self.folder / Path(self.path).name).read_bytes()
        if self.headers["Authorization"] != "Basic " + base64.b64encode(b"me:secret").decode():
            return self.send_error(401)
        part = self.headers["Range"]
        if part:
            first, last = part.removeprefix("bytes=").split("-")
            data = data[int(first) : int(last) + 1]
        self.send_response(206 if part else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def test_a_source_on_the_web_is_copied_with_the_password_of_netrc(
    forms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    handler = type("Files", (Web,), {"folder": forms["WebDataset"]})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = f"http://127.0.0.1:{server.server_port}/train-{{00000..00002}}.tar"
        with pytest.raises(ConfigError, match="or not for you: ~/.netrc"):
            find_source(source, str(tmp_path))
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        fsspec.get_filesystem_class("http").clear_instance_cache()
        assert len(find_source(source, str(tmp_path)).open().labels) == 240
        server.shutdown()


@pytest.mark.parametrize(
    ("store", "moment"), [("s3", "create_shard"), ("s3", "create_record"), ("local", "create_shard")]
)
def test_a_straggler_with_other_last_bits_changes_nothing(
    store: str,
    moment: str,
    forms: dict[str, Path],
    undisturbed: dict[str, bytes],
    encode: Encode,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Before it writes a tar, or the record of it, a worker on another kind of device finishes everything."""
    dest = f"s3://{bucket}/out" if store == "s3" else str(tmp_path / "out")
    pack, usual = ig_dist.encoding.shards.pack_shard, getattr(ig_dist.encoding.records.Dest, moment)
    packed: list[int] = []
    overtaken: list[int] = []

    def other_at_4(keys: Any, latents: Any, *more: Any) -> bytes:
        packed.append(len(packed))
        return pack(keys, np.nextafter(latents, np.float16(9)) if packed[-1] == 4 else latents, *more)

    def late(self: Any, number: int, *more: Any) -> Any:
        if number == 4 and not overtaken:
            overtaken.append(number)
            process = start(forms["ImageFolder"], dest)
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
        return usual(self, number, *more)

    monkeypatch.setattr(ig_dist.encoding.shards, "pack_shard", other_at_4)
    monkeypatch.setattr(ig_dist.encoding.records.Dest, moment, late)
    code, said, errors = encode(dest)
    assert code == 0 and "238 images" in said and overtaken, errors
    fs, path = open_url(dest, "test")
    files = {name.removeprefix(f"{path}/"): fs.cat_file(name) for name in fs.find(path)}
    assert usually_named(files) == undisturbed
    succeed(["python", "data_prep/verify_shards.py", dest])
