"""Files that are there whole or not at all, and stay: synced to disk, or uploaded in pieces that are sent again."""

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
from ig_dist.storage.faults import Patience, retried, under
from ig_dist.storage.files import REQUEST_BYTES, beside, read_range, request_timeout, upload_options, write_whole
from ig_dist.storage.s3 import md5
from ig_dist.storage.urls import is_local

PART_BYTES = REQUEST_BYTES
"""What is larger is uploaded in parts of this size."""
_MOST_PARTS = 10_000  # of one upload to S3
_PARALLEL_PARTS = 4
_SYNC_BYTES = 32 * 2**20


def write_hashed(fs: Any, folder: str, prefix: str, chunks: Sequence[memoryview]) -> dict[str, Any]:
    """Write a file named after its content, ``<prefix>.<hash>.safetensors``.

    The name makes it the same file whoever writes it: two writers of one folder with other contents do not touch
    each other's files. On a disk the folder is there.

    Returns:
        ``name``, ``bytes`` and ``sha256`` of the file.
    """
    digest = hashlib.sha256()

    def hash_all() -> str:
        for chunk in chunks:
            digest.update(chunk)  # lets go of the interpreter's lock
        return digest.hexdigest()

    hashing, size = in_background(hash_all), sum(map(len, chunks))

    def name() -> str:
        return f"{prefix}.{hashing.result()[:16]}.safetensors"

    if is_local(fs):  # which is written meanwhile
        write_durably(Path(folder, prefix), chunks, name)
    else:
        path = f"{folder}/{name()}"
        retried(fs, path, lambda: write_stream(fs, path, chunks, size=size))
    return {"name": name(), "bytes": size, "sha256": hashing.result()}


def write_durably(path: Path, pieces: Iterable[memoryview], name: Callable[[], str] | None = None) -> None:
    """Write a file of a disk that is whole, and synced, or not there; one that is there is replaced.

    With ``name`` it is called so in the folder of ``path``, for what is known only once it is written.
    """
    with beside(path) as temporary:
        _write_synced(temporary, pieces)
        temporary.replace(path.with_name(name()) if name else path)
    _sync_folder(path.parent)


def _write_synced(path: Path, pieces: Iterable[memoryview]) -> None:
    with path.open("wb") as file:
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


def write_stream(
    fs: Any, path: str, pieces: Iterable[memoryview], patience: Patience | None = None, *, size: int
) -> None:
    """Write a file of so many bytes that is whole or not there; only some parts of it are in memory at a time.

    Raises:
        OSError: what is there afterwards is another writer's, or the upload was lost.
    """
    fs, part_bytes = under(fs, patience), max(PART_BYTES, -(-size // _MOST_PARTS))
    if is_local(fs):
        write_durably(Path(path), pieces)
    elif size <= part_bytes:
        write_whole(fs, path, b"".join(pieces))
    elif "s3" in fs.protocol:
        written = _upload_parts(fs, path, _cut(pieces, part_bytes))
        if (there := fs.size(path)) != written:
            raise OSError(f"{there} of {written} bytes are there")
    else:  # not tried again
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            with fs.open(temporary, "wb") as file:
                for piece in pieces:
                    file.write(piece)
            fs.mv(temporary, path)
        except BaseException:
            with contextlib.suppress(Exception):
                fs.rm_file(temporary)
            raise


def _cut(pieces: Iterable[memoryview], size: int) -> Iterator[bytes]:
    """The same bytes in parts of one size; the last one is shorter."""
    held = bytearray()
    for piece in pieces:
        held += piece
        while len(held) >= size:
            yield bytes(memoryview(held)[:size])
            del held[:size]
    if held:
        yield bytes(held)


def create_file(fs: Any, path: str, data: bytes) -> bool:
    """Write a file where there is none, durably; of several writers one wins.

    Returns:
        Whether the file holds ``data`` now: also when it did before, for the answer to an upload can be lost.
    """
    if is_local(fs):
        return _create_local(Path(path), data)
    try:
        fs.pipe_file(path, data, mode="create", **upload_options(fs, data))
    except OSError:  # of s3fs EINVAL when there is one; what is there decides
        try:
            return fs.size(path) == len(data) and bytes(read_range(fs, path, 0, len(data))) == data
        except FileNotFoundError:
            pass
        raise
    return True


def _create_local(path: Path, data: bytes) -> bool:
    with beside(path) as temporary:
        _write_synced(temporary, [memoryview(data)])
        try:
            os.link(temporary, path)
        except OSError as error:  # also of a file system without hard links
            if isinstance(error, FileExistsError) or os.path.lexists(path):  # it may be anything
                return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data
            temporary.replace(path)
    _sync_folder(path.parent)
    return True


def _sync_folder(folder: Path) -> None:
    """Names last like the files that they name; network file systems that cannot sync a folder keep both anyway."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(number)
    finally:
        os.close(number)


def _upload_parts(fs: Any, path: str, bodies: Iterable[bytes]) -> int:
    """An upload to S3 in parts that are sent again one by one, some of them at a time; the bytes of all.

    S3's single PUT ends at 5 GiB. All parts but the last must have 5 MiB at least.
    """
    bucket, key, _ = fs.split_path(path)

    def call(method: str, size: int = 0, **arguments: Any) -> Any:
        options = {"Bucket": bucket, "Key": key, **arguments, **request_timeout(fs, size)}
        return retried(fs, path, lambda: fs.call_s3(method, **options))

    upload = call("create_multipart_upload")["UploadId"]

    def send(number: int, body: bytes) -> dict[str, Any]:
        part = {"PartNumber": number, "UploadId": upload}
        sent = call("upload_part", len(body), Body=body, ContentMD5=md5(body), **part)
        return {"PartNumber": number, "ETag": sent["ETag"]}

    try:
        under_way: list[Future[dict[str, Any]]] = []
        parts, size = [], 0
        for number, body in enumerate(bodies, start=1):
            size += len(body)
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
    return size
