"""Files on a disk or an object store: one way to open, read and write them; they are whole or not there.

Credentials, endpoint and region come from each protocol's standard chain (for S3: environment, profiles, instance
roles) and are never part of a config, a log line or a report.
"""

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import fsspec.asyn
import numpy as np

from ig_dist.errors import ConfigError, DataError, first_line
from ig_dist.storage import s3
from ig_dist.storage.faults import PATIENCE, Patience, patience_of, retried, under
from ig_dist.storage.urls import WEB, full_url, is_file, is_local, once, refuse_credentials
from ig_dist.terminal.extras import missing

REQUEST_BYTES = 32 * 2**20
"""The most that one request reads: big enough to stream at full speed, small enough to ask for again."""


def open_url(url: str, what: str, patience: Patience = PATIENCE, *, web: bool = False) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path within it; ``what`` names the setting in errors.

    With ``web`` it may be http, which has no listings and cannot be written.

    Raises:
        ConfigError: credentials in it, a chain of URLs, an unknown protocol, or one that is not of use here or not
            installed.
    """
    refuse_credentials(url, what)
    if "::" in url:  # fsspec would unpack, copy or interpret the file that stands last
        raise ConfigError(f"{what} {url}: one URL within another is not opened: give the place itself")
    options: dict[str, Any] = {}
    protocol = fsspec.utils.get_protocol(url)
    if protocol in WEB:
        if not web:
            raise ConfigError(
                f"{what} {url}: http has no listings and cannot be written: give the store's own URL (s3://, gs://), or"
                " a copy on a disk"
            )
        options["client_kwargs"] = {"trust_env": True}  # for ~/.netrc
    on_s3 = protocol in ("s3", "s3a")
    if on_s3:
        options["config_kwargs"] = s3.client_config(patience)
        options["use_listings_cache"] = False  # other processes write there too
    try:
        fs, path = fsspec.core.url_to_fs(url.rstrip("/"), **options)
    except (ValueError, ImportError) as error:
        if on_s3 and isinstance(error, ImportError):
            raise missing("s3", f"{what} {url} needs") from None
        raise ConfigError(f"{what} {url!r}: {first_line(error)}") from None
    if on_s3:
        fs.retries = 1
    return fs if is_local(fs) else under(fs, patience), str(path)


def read_range(
    fs: Any,
    path: str,
    start: int,
    stop: int,
    patience: Patience | None = None,
    *,
    into: memoryview | None = None,
    taken: Callable[[memoryview], None] | None = None,
) -> memoryview:
    """Bytes ``start`` to ``stop`` (exclusive) of a file, all of them, in new memory or ``into`` what is given.

    With ``taken``, which is called with each part that came, in order, while the next is sent, that memory may be of
    any length, and is used again and again.

    Raises:
        DataError: as ``retried``, or the file is shorter.
        FileNotFoundError: there is no such file.
    """
    fs = under(fs, patience)
    size, done = stop - start, 0  # a try goes on where the one before broke off
    # numpy asks for huge pages: the kernel then clears and maps new memory several times faster
    buffer = np.empty(size, dtype=np.uint8).data if into is None else into

    def room() -> memoryview:
        return buffer[: size - done] if taken else buffer[done:size]

    def read() -> None:
        nonlocal done
        for part in _parts(fs, path, start + done, size - done, room):
            if taken:
                taken(part)
            done += len(part)
        if done != size:  # a proxy's short body with a consistent length looks like success
            raise ShortReadError(f"got {done} of {size} bytes at {start}")

    try:
        retried(fs, path, read)
    except ShortReadError as error:
        raise DataError(f"{full_url(fs, path)} is too short ({error}): restore it") from None
    return buffer[:size]


class ShortReadError(OSError):
    """Fewer bytes than were asked for."""


def read_file(fs: Any, path: str, patience: Patience | None = None) -> bytes:
    """A whole small file.

    Raises:
        FileNotFoundError: there is no such file, or something else in its place; others as ``retried``.
    """
    fs, place = under(fs, patience), Path(path)
    if is_local(fs) and place.exists() and not (place.is_file() or place.is_dir()):  # a pipe would be waited for
        raise FileNotFoundError(errno.ENOENT, "it is not a file", path)
    data: bytes = fs.cat_file(path, **request_timeout(fs, 0))
    return data


def list_sizes(fs: Any, path: str) -> dict[str, int]:
    """Name and size of every file of a folder; empty when there is none."""
    if is_local(fs) and Path(path).is_dir():  # several times as fast as fsspec, of tens of thousands of files
        sizes = {}
        with suppress(FileNotFoundError), os.scandir(path) as there:  # another process may delete the folder meanwhile
            for file in there:
                with suppress(FileNotFoundError):  # another process has just renamed it
                    if file.is_file():
                        sizes[file.name] = file.stat().st_size
        return sizes
    try:
        entries = fs.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    return {PurePosixPath(entry["name"]).name: entry["size"] for entry in entries if is_file(entry)}


def write_whole(fs: Any, path: str, data: bytes | memoryview, patience: Patience | None = None) -> None:
    """Write a file that is whole or not there, also when several processes write the same one."""
    if is_local(fs):
        with beside(Path(path)) as temporary:
            temporary.write_bytes(data)
            temporary.replace(path)
        return
    fs = under(fs, patience)
    fs.pipe_file(path, data, **upload_options(fs, data))


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A name in the folder of a file, for what shall take its place whole; what is left there afterwards is deleted."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def upload_options(fs: Any, data: bytes | memoryview) -> dict[str, Any]:
    """For ``pipe_file``: one request, with a bound on its time; the store refuses what changed on the way."""
    checked = {"chunksize": s3.SINGLE_PUT_BYTES, "ContentMD5": s3.md5(data)} if "s3" in fs.protocol else {}
    return request_timeout(fs, len(data)) | checked


def _parts(fs: Any, path: str, start: int, size: int, room: Callable[[], memoryview]) -> Iterator[memoryview]:
    """Read from byte ``start`` on, at most ``size`` bytes, into the room that there is; each part as it came."""
    if is_local(fs):
        with Path(path).open("rb", buffering=0) as file:
            file.seek(start)
            while (here := room()) and (count := file.readinto(here)):
                yield here[:count]
    elif "s3" in fs.protocol:
        yield from s3.get_parts(once(fs), path, start, size, room, patience_of(fs))
    else:
        bound, fs = request_timeout(fs, size), once(fs)
        if "http" in fs.protocol:
            data = _get_from_web(fs, path, start, size, bound["timeout"])
        else:
            data = memoryview(fs.cat_file(path, start=start, end=start + size, **bound))
        if len(data) > size:
            raise DataError(f"{full_url(fs, path)}: the server sends no parts of files: download it and use the copy")
        while data and (here := room()):
            count = min(len(here), len(data))
            here[:count] = data[:count]
            yield here[:count]
            data = data[count:]


def _get_from_web(fs: Any, url: str, start: int, size: int, timeout_s: float) -> memoryview:
    """Some bytes of a file, or one more, which says that the server sends others than these.

    fsspec reads an answer to its end, however far that is.
    """

    async def get() -> bytearray:
        options = dict(fs.kwargs)
        headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{start + size - 1}"}
        session, data = await fs.set_session(), bytearray()
        async with session.get(fs.encode_url(url), headers=headers, **options) as answer:
            fs._raise_not_found_for_status(answer, url)
            async for part in answer.content.iter_chunked(2**16):
                data += part[: size + 1 - len(data)]
                if len(data) > size:
                    break
        return data

    return memoryview(fsspec.asyn.sync(fs.loop, get, timeout=timeout_s))


def request_timeout(fs: Any, size: int) -> dict[str, Any]:
    """The bound on one request, for file systems that know one: their synchronous calls wait on an event loop."""
    return {"timeout": patience_of(fs).stall_s * max(1.0, size / REQUEST_BYTES)} if fs.async_impl else {}
