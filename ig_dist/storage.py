"""Paths and URLs: one way to open them, requests that outlast the storage's faults, files that are whole or not there.

Credentials, endpoint and region come from each protocol's standard chain (for S3: environment, profiles, instance
roles) and are never part of a config, a log line or a report.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import hashlib
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec
import numpy as np

from ig_dist.background import in_background
from ig_dist.errors import ConfigError, DataError
from ig_dist.terminal import console

T = TypeVar("T")

REQUEST_BYTES = 32 * 2**20
"""The most that one request reads: big enough to stream at full speed, small enough to ask for again."""

LOCAL = fsspec.filesystem("file")

_SINGLE_PUT_BYTES = 5 * 2**30  # S3's limit. One PUT is atomic and leaves no half upload behind.
_CHUNK_BYTES = 2**20
_CLIENT_LOCK = threading.Lock()
_LOG_EVERY_S = 5.0
_LOOK_S = 0.2  # between looks for a stop
_TRANSIENT_CODES = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError"}

_LASTING = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
_WEB = ("http", "https")


@dataclass
class Patience:
    """How long faults of a storage are borne, and how many were. Safe to share between threads."""

    stall_s: float = 60.0
    """A request of up to ``REQUEST_BYTES`` that takes longer is given up and made again."""
    deadline_s: float = 600.0
    """A request that fails for this long ends the command."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set: no further tries, and whoever waits for one waits no longer."""
    faults: int = 0
    """Requests that had to be made again."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _said_at: float = -_LOG_EVERY_S
    _unsaid: int = 0

    def count(self, what: str, error: BaseException, wait_s: float) -> None:
        """Count a fault, and say it: at most one line in some seconds, which tells of the others."""
        with self._lock:
            self.faults += 1
            if time.monotonic() - self._said_at < _LOG_EVERY_S:
                self._unsaid += 1
                return
            others = f" ({self._unsaid} more since the last line)" if self._unsaid else ""
            self._said_at, self._unsaid = time.monotonic(), 0
        console.print(f"storage: {what}: {_words(error)}; again in {wait_s:.1f} s{others}", markup=False)


PATIENCE = Patience()
"""For whoever has no reason for another."""


def refuse_credentials(url: str, what: str) -> None:
    """URLs are stored and shown: none may hold a password.

    Raises:
        ConfigError: this one does; ``what`` names the setting.
    """
    for match in re.finditer(r"(\w+)://([^/?#\s]*)@", url):
        if ":" in match[2] or match[1] in _WEB:
            hidden = url.replace(match[0], f"{match[1]}://***@")
            raise ConfigError(
                f"{what} {hidden}: no credentials in a URL, which is stored and shown: take them out and give them to"
                " the protocol's own chain (https: ~/.netrc; S3: AWS_PROFILE or ~/.aws; others: the environment)"
            )


def open_url(url: str, what: str, patience: Patience = PATIENCE, *, web: bool = False) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path within it.

    Args:
        url: where.
        what: names the setting in errors.
        patience: how long faults are borne.
        web: it may be http, which has no listings and cannot be written.

    Raises:
        ConfigError: credentials in it, an unknown protocol, or one that is not of use here or not installed.
    """
    refuse_credentials(url, what)
    options: dict[str, Any] = {}
    protocol = fsspec.utils.get_protocol(url)
    if protocol in _WEB:
        if not web:
            raise ConfigError(
                f"{what} {url}: http has no listings and cannot be written: give the store's own URL (s3://, gs://), or"
                " a copy on a disk"
            )
        options["client_kwargs"] = {"trust_env": True}  # for ~/.netrc
    s3 = protocol in ("s3", "s3a")
    if s3:
        options["config_kwargs"] = _s3_config(patience)
        options["use_listings_cache"] = False  # other processes write there too
    try:
        fs, path = fsspec.core.url_to_fs(url.rstrip("/"), **options)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{what} {url!r}: {' '.join(str(error).split())}") from None
    if s3:
        fs.retries = 1
    return fs if is_local(fs) else _Persistent(fs, patience), str(path)


class _Persistent:
    """A remote file system whose calls on a path are ``retried``; all else is the file system's own."""

    _READS = ("cat_file", "exists", "find", "glob", "info", "isdir", "isfile", "ls", "size")
    _CALLS = frozenset((*_READS, "makedirs", "mv", "pipe_file", "rm", "rm_file", "rmdir"))

    def __init__(self, fs: Any, patience: Patience) -> None:
        self.wrapped, self._patience = fs, patience

    def __getattr__(self, name: str) -> Any:
        if name in ("wrapped", "_patience"):  # while it is copied
            raise AttributeError(name)
        call = getattr(self.wrapped, name)
        if name not in self._CALLS:
            return call

        def persistent(path: Any, *arguments: Any, **options: Any) -> Any:
            return retried(self.wrapped, path, lambda: call(path, *arguments, **options), self._patience)

        return persistent


def once(fs: Any) -> Any:
    """The file system that tries once, for who retries with a patience of their own."""
    return getattr(fs, "wrapped", fs)


def is_local(fs: Any) -> bool:
    """Whether the file system is this machine's own."""
    return "file" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def full_url(fs: Any, path: str) -> str:
    """What a user calls the file: a local path, or the URL."""
    return path if is_local(fs) else str(fs.unstrip_protocol(path))


def retried(fs: Any, path: str, operation: Callable[[], T], patience: Patience = PATIENCE) -> T:
    """Do an operation on a file, again after a transient fault: with back-off and jitter, under the deadline.

    A local file system is tried once.

    Raises:
        DataError: the deadline passed, or access is denied.
        OSError: a fault that no repetition mends, such as FileNotFoundError.
    """
    if is_local(fs):
        return operation()
    import tenacity

    url = full_url(fs, path)
    failing_since: list[float] = []  # a long operation is not late because it once fails

    def too_late(state: tenacity.RetryCallState) -> bool:
        failing_since.append(time.monotonic())
        return patience.stop.is_set() or failing_since[-1] - failing_since[0] >= patience.deadline_s

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
        wait=tenacity.wait_exponential_jitter(multiplier=0.1, max=10.0, jitter=0.5),
        stop=too_late,
        sleep=tenacity.sleep_using_event(patience.stop),
        before_sleep=lambda state: patience.count(
            url,
            state.outcome.exception(),  # type: ignore[union-attr, arg-type]  # it has failed
            state.upcoming_sleep,
        ),
        reraise=True,
    )
    try:
        return retrying(lambda: _unless_stopped(operation, patience))
    except PermissionError as error:
        raise DataError(
            f"{url}: access denied ({_words(error)}): check the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID, instance"
            " role) and what the bucket allows them"
        ) from None
    except Exception as error:
        if patience.stop.is_set() and _is_transient(error):
            raise DataError(f"{url}: given up, because the command ends") from None
        if type(error).__name__ in _NO_CREDENTIALS:
            raise DataError(
                f"{url}: {_words(error)}: set AWS_PROFILE or AWS_ACCESS_KEY_ID, or run `aws login`"
            ) from None
        if not _is_transient(error):
            if isinstance(error, ValueError) or type(error).__module__.startswith(("botocore", "aiohttp")):
                remedy = "check the URL, AWS_ENDPOINT_URL, AWS_PROFILE and ~/.aws (with SSO, log in again), or ~/.netrc"
                raise ConfigError(f"{url}: {_words(error)}: {remedy}") from None
            raise
        raise DataError(
            f"{url}: the storage has failed for {patience.deadline_s:g} s, last with: {_words(error)}: see that it is"
            " up and reachable, then run the same command again"
        ) from None


def _unless_stopped(operation: Callable[[], T], patience: Patience) -> T:
    """What an operation gives, or InterruptedError soon after ``patience.stop`` is set.

    It runs in a thread of its own, so that one that hangs can be left alone, whatever client it hangs in: it ends by
    the client's time-out, or with the process.
    """
    work = in_background(operation)
    while not concurrent.futures.wait([work], timeout=_LOOK_S).done:
        if patience.stop.is_set():
            raise InterruptedError("stopped")
    return work.result()


def read_range(
    fs: Any,
    path: str,
    start: int,
    stop: int,
    patience: Patience = PATIENCE,
    *,
    into: memoryview | None = None,
    arrived: Callable[[memoryview, int], None] | None = None,
) -> memoryview:
    """Bytes ``start`` to ``stop`` (exclusive) of a file, all of them.

    Args:
        fs: the file system.
        path: the file.
        start: first byte.
        stop: byte after the last.
        patience: how long faults are borne.
        into: memory for them, at least as long; None: new memory.
        arrived: called after each part that came, with the memory and how many of its bytes are there: what is done
            there overlaps with the sending of the next part.

    Raises:
        DataError: as ``retried``, or the file is shorter.
        FileNotFoundError: there is no such file.
    """
    # numpy asks for huge pages: the kernel then clears and maps new memory several times faster
    buffer = np.empty(stop - start, dtype=np.uint8).data if into is None else into[: stop - start]
    done = 0  # a try goes on where the one before broke off

    def read() -> None:
        nonlocal done
        for count in _chunks(fs, path, start + done, buffer[done:], patience):
            done += count
            if arrived:
                arrived(buffer, done)
        if done != len(buffer):  # a proxy's short body with a consistent length looks like success
            raise ShortReadError(f"got {done} of {len(buffer)} bytes at {start}")

    try:
        retried(fs, path, read, patience)
    except ShortReadError as error:
        raise DataError(f"{full_url(fs, path)} is too short ({error}): restore it") from None
    return buffer


def read_file(fs: Any, path: str, patience: Patience = PATIENCE) -> bytes:
    """A whole small file.

    Raises:
        FileNotFoundError: there is no such file; others as ``retried``.
    """
    fs = once(fs)
    data: bytes = retried(fs, path, lambda: fs.cat_file(path, **request_timeout(fs, 0, patience)), patience)
    return data


def list_sizes(fs: Any, path: str, patience: Patience = PATIENCE) -> dict[str, int]:
    """Name and size of every file of a folder; empty when there is none."""
    fs = once(fs)
    try:
        entries = retried(fs, path, lambda: fs.ls(path, detail=True), patience)
    except FileNotFoundError:
        return {}
    return {PurePosixPath(entry["name"]).name: entry["size"] for entry in entries if is_file(entry)}


def is_file(entry: dict[str, Any]) -> bool:
    """Whether an fsspec entry is a file, or a local link to one."""
    return entry["type"] == "file" or bool(entry.get("islink") and Path(entry["name"]).is_file())


def unreadable(fs: Any, path: str, error: OSError) -> DataError:
    """What is said of a file that the machine itself cannot read."""
    gone = isinstance(error, FileNotFoundError)
    words = error.strerror or _words(error)
    return DataError(
        f"{full_url(fs, path)} {'is gone' if gone else f'cannot be read ({words})'}: restore it and run again"
    )


def write_whole(fs: Any, path: str, data: bytes | memoryview, patience: Patience = PATIENCE) -> None:
    """Write a file that is whole or not there, also when several processes write the same one."""
    if is_local(fs):
        temporary = Path(f"{path}.{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return
    fs, options = once(fs), upload_options(fs, data, patience)
    retried(fs, path, lambda: fs.pipe_file(path, data, **options), patience)


def upload_options(fs: Any, data: bytes | memoryview, patience: Patience) -> dict[str, Any]:
    """For ``pipe_file``: one request, with a bound on its time; the store refuses what changed on the way."""
    s3 = {"chunksize": _SINGLE_PUT_BYTES, "ContentMD5": md5(data)} if "s3" in fs.protocol else {}
    return request_timeout(fs, len(data), patience) | s3


def md5(data: bytes | memoryview) -> str:
    """The hash that S3 holds an upload against."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def abort_orphaned_uploads(fs: Any, path: str, patience: Patience = PATIENCE) -> int:
    """Abort the multipart uploads below a path that nobody will finish; the number of them.

    A process that is killed while it uploads leaves parts that cost storage and are listed nowhere. Call it only
    when nobody writes there any more. Nothing to do but on S3.
    """
    if "s3" not in fs.protocol:
        return 0
    bucket, prefix, _ = fs.split_path(f"{path}/")

    def call(method: str, **arguments: Any) -> Any:
        return retried(fs, path, lambda: fs.call_s3(method, Bucket=bucket, **arguments), patience)

    count, page = 0, {"IsTruncated": True}
    markers: dict[str, str] = {}
    while page.get("IsTruncated"):  # at most 1,000 a page
        page = call("list_multipart_uploads", Prefix=prefix, **markers)
        for upload in page.get("Uploads") or []:
            with contextlib.suppress(FileNotFoundError):  # it is gone, and the answer was lost
                call("abort_multipart_upload", Key=upload["Key"], UploadId=upload["UploadId"])
            count += 1
        markers = {"KeyMarker": page.get("NextKeyMarker", ""), "UploadIdMarker": page.get("NextUploadIdMarker", "")}
    return count


def _chunks(fs: Any, path: str, start: int, into: memoryview, patience: Patience) -> Iterator[int]:
    """Read from byte ``start`` on until ``into`` is full or the file ends; the size of each part that came."""
    if is_local(fs):
        with Path(path).open("rb", buffering=0) as file:
            file.seek(start)
            yield file.readinto(into) or 0
    elif "s3" in fs.protocol:
        yield from _s3_chunks(fs, path, start, into, patience)
    else:
        fs = once(fs)
        data = fs.cat_file(path, start=start, end=start + len(into), **request_timeout(fs, len(into), patience))
        if len(data) > len(into):
            raise DataError(f"{full_url(fs, path)}: the server sends no parts of files: download it and use the copy")
        into[: len(data)] = data
        yield len(data)


def _s3_chunks(fs: Any, path: str, start: int, into: memoryview, patience: Patience) -> Iterator[int]:
    """One streaming GET into memory, in this thread.

    s3fs hands every chunk through the one event loop of the process, joins them, and needs the GIL for each; with plain
    sockets reader threads read side by side, straight into their buffers.
    """
    import botocore.exceptions
    import s3fs.errors

    bucket, key, _ = fs.split_path(path)
    try:
        asked = f"bytes={start}-{start + len(into) - 1}"
        body = _s3_client(fs, patience).get_object(Bucket=bucket, Key=key, Range=asked)["Body"]
        with closing(body):  # what is left of a broken answer must not reach the next request
            done = 0
            while done < len(into) and (count := body.readinto(into[done : done + _CHUNK_BYTES])):
                done += count
                yield count
    except botocore.exceptions.ClientError as error:
        raise s3fs.errors.translate_boto_error(error) from error


def _s3_client(fs: Any, patience: Patience) -> Any:
    """A synchronous client with the address and credentials of an s3fs file system; it may be used by many threads."""
    import botocore.config
    import botocore.session

    fs = once(fs)
    with _CLIENT_LOCK:
        if not hasattr(fs, "synchronous_client"):  # lives as long as the file system, which fsspec keeps
            config = botocore.config.Config(
                **_s3_config(patience), signature_version=botocore.UNSIGNED if fs.anon else None
            )
            fs.synchronous_client = botocore.session.get_session().create_client(
                "s3",
                endpoint_url=fs.endpoint_url,
                aws_access_key_id=fs.key,
                aws_secret_access_key=fs.secret,
                aws_session_token=fs.token,
                config=config,
            )
    return fs.synchronous_client


def _s3_config(patience: Patience) -> dict[str, Any]:
    # Every fault reaches ``retried``, which counts and bounds them; three layers of retries would multiply.
    return {
        "connect_timeout": min(10.0, patience.stall_s),
        "read_timeout": patience.stall_s,
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "max_pool_connections": 64,
    }


class ShortReadError(OSError):
    """Fewer bytes than were asked for."""


def request_timeout(fs: Any, size: int, patience: Patience) -> dict[str, Any]:
    """The bound on one request, for file systems that know one: their synchronous calls wait on an event loop."""
    return {"timeout": patience.stall_s * max(1.0, size / REQUEST_BYTES)} if fs.async_impl else {}


def _is_transient(error: BaseException) -> bool:
    response = getattr(error.__cause__, "response", None)  # s3fs keeps the server's answer there
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status in (408, 429) or response.get("Error", {}).get("Code") in _TRANSIENT_CODES
    status = getattr(error, "status", None)  # of aiohttp's answers
    if isinstance(status, int):
        return status >= 500 or status in (408, 429)
    if type(error).__name__ in _NO_CREDENTIALS or isinstance(error, _LASTING):
        return False
    types: list[type[BaseException]] = [OSError, asyncio.TimeoutError]
    # of the clients that are in use: a connection that fails before or in the answer is no OSError there
    clients = (("botocore.exceptions", "HTTPClientError"), ("botocore.exceptions", "ConnectionError"))
    for module, name in (*clients, ("botocore.exceptions", "IncompleteReadError"), ("aiohttp", "ClientError")):
        if module in sys.modules:
            types.append(getattr(sys.modules[module], name))
    return isinstance(error, tuple(types))


def _words(error: BaseException) -> str:
    """One line that says what an exception is."""
    return " ".join(str(error).split()) or type(error).__name__
