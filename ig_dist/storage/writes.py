"""Files that are there whole or not at all, and stay: synced to disk, or uploaded in pieces that are sent again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from ig_dist.storage.background import in_background
from ig_dist.storage.faults import Patience, retried
from ig_dist.storage.files import read_range, request_timeout, upload_options, write_whole
from ig_dist.storage.s3 import md5
from ig_dist.storage.urls import is_local, once

_PARALLEL_PARTS = 4
_SYNC_BYTES = 32 * 2**20
_MOST_IN_MEMORY = 8 * 2**20
MOST_PARTS = 10_000  # of one upload to S3; each but the last has 5 MiB at least


def write_hashed(fs: Any, folder: str, prefix: str, chunks: Sequence[memoryview], patience: Patience) -> dict[str, Any]:
    """Write a file named after its content, ``<prefix>.<hash>.safetensors``.

    The name makes it the same file whoever writes it: two writers of one folder with other contents do not touch
    each other's files. Beyond ``chunks`` it needs the memory of four of them.

    Args:
        fs: file system.
        folder: an existing folder (object stores need none).
        prefix: begins the file's name.
        chunks: the content; what is uploaded in several requests is cut there.
        patience: how long faults are borne.

    Returns:
        ``name``, ``bytes`` and ``sha256`` of the file.
    """
    digest = hashlib.sha256()

    def hash_all() -> str:
        for chunk in chunks:
            digest.update(chunk)  # lets go of the interpreter's lock
        return digest.hexdigest()

    hashing = in_background(hash_all)

    def name() -> str:
        return f"{prefix}.{hashing.result()[:16]}.safetensors"

    if is_local(fs):  # which is written meanwhile
        write_durably(Path(folder, prefix), chunks, name)
    else:
        _upload(fs, f"{folder}/{name()}", chunks, patience)
    return {"name": name(), "bytes": sum(map(len, chunks)), "sha256": hashing.result()}


def write_durably(path: Path, pieces: Iterable[memoryview], name: Callable[[], str] | None = None) -> None:
    """Write a file of a disk that is whole, and synced, or not there.

    Args:
        path: the file, replaced if it is there.
        pieces: its content.
        name: what it is called in its folder, if that is known only once it is written.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            reaching, unsynced = in_background(lambda: None), 0  # the disk writes what it has while more comes
            for piece in pieces:
                unsynced += file.write(piece)
                if unsynced >= _SYNC_BYTES and reaching.done():
                    reaching.result()
                    file.flush()
                    reaching, unsynced = in_background(partial(os.fdatasync, file.fileno())), 0
            reaching.result()
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path.with_name(name()) if name else path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(str(path.parent))


def write_stream(fs: Any, path: str, pieces: Iterable[memoryview], patience: Patience, *, size: int) -> None:
    """Write a file that is whole or not there; on a disk and S3 only some pieces are in memory at a time.

    Args:
        fs: file system.
        path: the file, replaced if it is there.
        pieces: the content; all but the last of 5 MiB at least and 10,000 at most.
        patience: how long faults are borne.
        size: bytes of it, about.
    """
    if is_local(fs):
        write_durably(Path(path), pieces)
    elif "s3" in fs.protocol and size >= _MOST_IN_MEMORY:
        written = 0

        def bodies() -> Iterator[bytes]:
            nonlocal written
            for piece in pieces:
                written += len(piece)
                yield bytes(piece)

        upload_parts(fs, path, bodies(), patience)
        if fs.size(path) != written:  # it is another writer's, or the upload is lost
            raise OSError(f"{fs.size(path)} of {written} bytes are there")
    else:  # what other file systems stream is not tried again, and a part of it may stay
        write_whole(fs, path, b"".join(pieces), patience)


def create_file(fs: Any, path: str, data: bytes, patience: Patience) -> bool:
    """Write a file where there is none, durably; of several writers one wins.

    Returns:
        Whether the file holds ``data`` now: also when it did before, for the answer to an upload can be lost.
    """
    if is_local(fs):
        return _create_local(Path(path), data)
    fs, options = once(fs), upload_options(fs, data, patience)
    try:
        retried(fs, path, lambda: fs.pipe_file(path, data, mode="create", **options), patience)
    except OSError:  # of s3fs EINVAL when there is one; what is there decides
        try:
            size = retried(fs, path, lambda: fs.size(path), patience)
            return size == len(data) and bytes(read_range(fs, path, 0, size, patience)) == data
        except FileNotFoundError:
            pass
        raise
    return True


def _create_local(path: Path, data: bytes) -> bool:
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except OSError as error:  # also of a file system without hard links
            if isinstance(error, FileExistsError) or os.path.lexists(path):  # it may be anything
                return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(str(path.parent))
    return True


def sync_folder(folder: str) -> None:
    """Names last like the files that they name; network file systems that cannot sync a folder keep both anyway."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(number)
    finally:
        os.close(number)


def _upload(fs: Any, path: str, chunks: Sequence[memoryview], patience: Patience) -> None:
    if len(chunks) == 1:
        write_whole(fs, path, bytes(chunks[0]), patience)
    elif "s3" in fs.protocol:
        together = -(-len(chunks) // MOST_PARTS)
        starts = range(0, len(chunks), together)
        upload_parts(fs, path, (b"".join(chunks[start : start + together]) for start in starts), patience)
    else:

        def stream() -> None:
            with fs.open(path, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)

        retried(fs, path, stream, patience)


def upload_parts(fs: Any, path: str, bodies: Iterable[bytes], patience: Patience) -> None:
    """An upload to S3 in parts that are sent again one by one, some of them at a time; S3's single PUT ends at 5 GiB.

    Args:
        fs: an S3 file system.
        path: the file.
        bodies: the parts, all but the last of 5 MiB at least and 10,000 at most; taken one by one as they are sent.
        patience: how long faults are borne.
    """
    bucket, key, _ = fs.split_path(path)

    def call(method: str, size: int = 0, **arguments: Any) -> Any:
        options = {"Bucket": bucket, "Key": key, **arguments, **request_timeout(fs, size, patience)}
        return retried(fs, path, lambda: fs.call_s3(method, **options), patience)

    upload = call("create_multipart_upload")["UploadId"]

    def send(number: int, body: bytes) -> dict[str, Any]:
        part = {"PartNumber": number, "UploadId": upload}
        return {
            "PartNumber": number,
            "ETag": call("upload_part", len(body), Body=body, ContentMD5=md5(body), **part)["ETag"],
        }

    try:
        under_way: list[Future[dict[str, Any]]] = []
        parts = []
        for number, body in enumerate(bodies, start=1):
            if len(under_way) == _PARALLEL_PARTS:
                parts.append(under_way.pop(0).result())
            under_way.append(in_background(partial(send, number, body)))
        parts += [sending.result() for sending in under_way]
        with contextlib.suppress(FileNotFoundError):  # it was completed, and the answer lost: the caller looks at sizes
            call("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts})
    except BaseException:
        with contextlib.suppress(Exception):  # what is left is aborted at the next start
            fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload, timeout=10)
        raise
