"""Copies of what has no cheap random access: remote tars, and parquet files, become plain tars in a local folder.

A file is there when it is whole, and is made by one process at a time: any number of them on a machine may fill the
folder together.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from rich.filesize import decimal

from ig_dist.data.shard_files import FileReader
from ig_dist.data.sources.source import file_size
from ig_dist.errors import ConfigError, DataError, first_line
from ig_dist.storage.background import in_parallel
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import REQUEST_BYTES
from ig_dist.storage.urls import is_local
from ig_dist.storage.writable import others_may_change
from ig_dist.terminal import console
from ig_dist.terminal.progress import Advance, progress

_THREADS = 8


class SourceFile(NamedTuple):
    """A file of a source, local or remote."""

    fs: Any  # its fsspec file system
    path: str  # within that
    name: str
    size: int
    version: str  # what the store tells of its content (an ETag); may be empty


Copy = Callable[[SourceFile, Path, Patience, Advance], None]
"""Writes the tar of a source file to a path; tells of the bytes that it has read."""


def source_reader(file: SourceFile, patience: Patience, advance: Callable[[int], object]) -> FileReader:
    """What is in a file; ``advance`` hears of the bytes read."""
    return FileReader(file.fs, file.path, file.size, patience, lambda part: advance(len(part)))


def file_version(entry: dict[str, Any]) -> str:
    """What a store tells of a file's content, from its fsspec entry; empty: nothing."""
    return str(entry.get("ETag") or entry.get("etag") or "").strip('"')


def spool_folder(files: Sequence[SourceFile], chosen: str | None) -> Path:
    """The folder for copies of these files, named by a hash over them, in --spool or the temporary folder."""
    text = "".join(f"{file.path}\0{file.size}\0{file.version}\n" for file in files)
    base = Path(chosen) if chosen else Path(tempfile.gettempdir()) / f"ig-dist-spool-{os.getuid()}"
    return base / hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def spool(files: Sequence[SourceFile], folder: Path, copy: Copy, patience: Patience) -> list[Path]:
    """Copies of all files, in their order; those that exist are not made again.

    Of several processes one copies a file, and the others wait for it.

    Raises:
        ConfigError: the folder cannot be made or belongs to another user, or has not enough space.
        DataError: a file cannot be copied.
    """
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--spool {folder} cannot be made ({error.strerror}): choose another folder") from None
    if open_place := others_may_change(folder):
        raise ConfigError(
            f"--spool {folder}: other users may change files in {open_place}: choose another folder, or chmod o-w"
        )
    # Names in two folders may be equal; the number keeps them apart.
    copies = [folder / f"{i:05d}-{Path(file.name).stem[:50]}.tar" for i, file in enumerate(files)]
    missing = [i for i, path in enumerate(copies) if not path.exists()]
    begun = sum(max(0, file_size(_unfinished(copies[i]))) for i in missing)  # by another process, or one that is dead
    needed, free = sum(files[i].size for i in missing) - begun, shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"copying the source takes {decimal(needed)}, {folder} has {decimal(free)} free:"
            " choose a folder on a larger disk with --spool"
        )
    # Processes that begin together each take an order of their own, so that they seldom wait for each other.
    Random(uuid.uuid4().int).shuffle(missing)
    with progress("copy", sum(files[i].size for i in missing), "bytes") as advance:

        def make(i: int) -> None:
            file, unfinished = files[i], _unfinished(copies[i])
            try:
                with _alone(copies[i], file):
                    if copies[i].exists():  # by another process, meanwhile
                        return advance(file.size)
                    copy(file, unfinished, patience, advance)
                    if not is_local(file.fs) and file_version(file.fs.info(file.path)) != file.version:
                        raise OSError("it changed meanwhile")
                    unfinished.replace(copies[i])
            except OSError as error:
                raise DataError(
                    f"{file.path} cannot be copied to {folder} ({first_line(error)}):"
                    " run the same command again, or choose another folder with --spool"
                ) from None

        in_parallel(make, missing, _THREADS, patience.stop)
    return copies


def _unfinished(copy: Path) -> Path:
    """Where a copy is made, under its lock: what a killed process has left there is written over."""
    return copy.with_name(f"{copy.name}.tmp")


@contextmanager
def _alone(copy: Path, file: SourceFile) -> Iterator[None]:
    """The only process on this machine that makes this copy, or leaves no part; the lock of a dead one is free."""
    lock = FileLock(f"{copy}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        console.print(f"waits for another process that copies {file.name}", markup=False)
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        _unfinished(copy).unlink(missing_ok=True)
        lock.release()


def copy_tar(file: SourceFile, target: Path, patience: Patience, advance: Advance) -> None:
    """A byte copy."""
    with target.open("wb") as copy:
        shutil.copyfileobj(source_reader(file, patience, advance), copy, REQUEST_BYTES)
