"""Copies of what has no cheap random access: remote tars, and parquet files, become plain tars in a local folder.

A file is there when it is whole, and is made by one process at a time: any number of them on a machine may fill the
folder together. Parquet files are those of Hugging Face's image data sets: columns ``image`` {bytes, path}, ``label``.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from random import SystemRandom
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from rich.filesize import decimal

from ig_dist.data.shard_files import FileReader
from ig_dist.data.shards import pack_file, tar_end
from ig_dist.data.sources.source import Found, Source, file_size, source_name
from ig_dist.data.sources.tars import LABEL, PICTURES, TarFile, tar_source
from ig_dist.errors import ConfigError, DataError, first_line
from ig_dist.storage.background import in_parallel
from ig_dist.storage.faults import Patience, unreadable
from ig_dist.storage.files import REQUEST_BYTES
from ig_dist.storage.urls import is_local
from ig_dist.storage.writable import others_may_change
from ig_dist.terminal import console
from ig_dist.terminal.extras import missing
from ig_dist.terminal.progress import Advance, progress

_THREADS = 8
_ROWS = 256  # read at a time
_MOST_TIMES, _MOST_BYTES = 16, 64 << 20  # of the file's size, and besides, that its pictures may take


class SourceFile(NamedTuple):
    """A file of a source, local or remote."""

    fs: Any  # its fsspec file system
    path: str  # within that
    name: str
    size: int
    version: str  # what the store tells of its content (an ETag); may be empty

    def reader(self, patience: Patience, advance: Callable[[int], object]) -> FileReader:
        """What is in it; ``advance`` hears of the bytes read."""
        return FileReader(self.fs, self.path, self.size, patience, lambda part: advance(len(part)))


Copy = Callable[[SourceFile, Path, Patience, Advance], None]
"""Writes the tar of a source file to a path; tells of the bytes that it has read."""


def file_version(entry: dict[str, Any]) -> str:
    """What a store tells of a file's content, from its fsspec entry; empty: nothing."""
    return str(entry.get("ETag") or entry.get("etag") or "").strip('"')


def spooled_source(what: str, files: Sequence[SourceFile], base: str | None, patience: Patience) -> Found:
    """Remote tars, or parquet files, whose copies lie in ``base`` or the temporary folder; ``what`` begins its name."""
    is_parquet = files[0].name.endswith(".parquet")
    names, copy = (parquet_classes(files[0], patience), parquet_to_tar) if is_parquet else (None, copy_tar)
    if is_local(files[0].fs):
        entries = parquet_rows(files, patience)
    else:  # a column of each of several hundred remote files takes minutes; the store's own version says as much
        entries = [(f"{file.name} {file.version}", file.size, 0) for file in files]
    name, total = source_name(what, entries, len(entries)), sum(file.size for file in files)
    text = "".join(f"{file.path}\0{file.size}\0{file.version}\n" for file in files)
    folder = Path(base) if base else Path(tempfile.gettempdir()) / f"ig-dist-spool-{os.getuid()}"
    folder /= hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]

    def opened(chosen: Sequence[SourceFile], into: Path, *, whole: bool) -> Source:
        return tar_source(spool(chosen, into, copy, patience), what, name=name, names=names, whole=whole)[1]

    def open_part(scratch: str) -> tuple[Source, float]:
        return opened(files[:1], Path(scratch), whole=False), files[0].size / total

    kind = f"{len(files)} {'parquet files' if is_parquet else 'tars'}, {decimal(total)}, read from copies in {folder}"
    return Found(f"{kind} (delete them afterwards)", name, lambda: opened(files, folder, whole=True), open_part)


def spool(files: Sequence[SourceFile], folder: Path, copy: Copy, patience: Patience) -> list[TarFile]:
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
    wanted = [(file, path) for file, path in zip(files, copies, strict=True) if not path.exists()]
    size, free = sum(file.size for file, _ in wanted), shutil.disk_usage(folder).free
    begun = sum(max(0, file_size(_unfinished(path))) for _, path in wanted)  # by another process, or one that is dead
    if size - begun > free:
        raise ConfigError(
            f"copying the source takes {decimal(size - begun)}, {folder} has {decimal(free)} free:"
            " choose a folder on a larger disk with --spool"
        )
    # Processes that begin together each take an order of their own, so that they seldom wait for each other.
    SystemRandom().shuffle(wanted)
    with progress("copy", size, "bytes") as advance:

        def make(one: tuple[SourceFile, Path]) -> None:
            file, path = one
            try:
                with _alone(path, file.name):
                    if path.exists():  # by another process, meanwhile
                        return advance(file.size)
                    copy(file, _unfinished(path), patience, advance)
                    if not is_local(file.fs) and file_version(file.fs.info(file.path)) != file.version:
                        raise OSError("it changed meanwhile")
                    _unfinished(path).replace(path)
            except OSError as error:
                raise DataError(
                    f"{file.path} cannot be copied to {folder} ({first_line(error)}):"
                    " run the same command again, or choose another folder with --spool"
                ) from None

        in_parallel(make, wanted, _THREADS, patience.stop)
    return [TarFile(str(path), file.name) for file, path in zip(files, copies, strict=True)]


def _unfinished(copy: Path) -> Path:
    """Where a copy is made, under its lock: what a killed process has left there is written over."""
    return copy.with_name(f"{copy.name}.tmp")


@contextmanager
def _alone(copy: Path, name: str) -> Iterator[None]:
    """The only process on this machine that makes this copy, or leaves no part; the lock of a dead one is free."""
    lock = FileLock(f"{copy}.lock")
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        console.print(f"waits for another process that copies {name}", markup=False)
        held = lock.acquire(poll_interval=0.2)
    with held:
        try:
            yield
        finally:
            _unfinished(copy).unlink(missing_ok=True)


def copy_tar(file: SourceFile, target: Path, patience: Patience, advance: Advance) -> None:
    """A byte copy."""
    with target.open("wb") as copy:
        shutil.copyfileobj(file.reader(patience, advance), copy, REQUEST_BYTES)


def parquet_classes(file: SourceFile, patience: Patience) -> list[str] | None:
    """The names of the classes by label, from the ``huggingface`` key of the file's metadata; None: it has none.

    Raises:
        ConfigError: no parquet, or not these columns.
    """
    with _opened(file, patience) as opened:
        metadata = opened.schema_arrow.metadata or {}
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        names = features["label"]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def parquet_rows(files: Sequence[SourceFile], patience: Patience) -> list[tuple[str, int, int]]:
    """(name of the file, its size, label) of every row. The images are not read."""
    rows: list[tuple[str, int, int]] = []
    for file in files:
        with _opened(file, patience) as opened:
            labels = opened.read(columns=["label"]).column("label").to_pylist()
        rows += [(file.name, file.size, _checked(label, file, row)) for row, label in enumerate(labels)]
    return rows


def parquet_to_tar(file: SourceFile, target: Path, patience: Patience, advance: Advance) -> None:
    """Write the rows of a parquet file as WebDataset samples, named by their row."""
    with _opened(file, patience, advance) as opened, target.open("wb") as tar:
        row = 0
        for batch in opened.iter_batches(batch_size=_ROWS, columns=["image", "label"]):
            for image, label in zip(batch.column("image"), batch.column("label"), strict=True):
                fields = image.as_py() or {}
                # The content tells the format; the name only has to be a picture's. Without bytes it is rejected later.
                suffix = PurePosixPath(str(fields.get("path") or "")).suffix.lower().removeprefix(".")
                suffix = suffix if suffix in PICTURES else "jpg"
                pack_file(tar, f"{row:08d}.{suffix}", fields.get("bytes") or b"")
                pack_file(tar, f"{row:08d}.{LABEL}", b"%d" % _checked(label.as_py(), file, row))
                row += 1
                if tar.tell() > _MOST_TIMES * file.size + _MOST_BYTES:
                    raise ConfigError(
                        f"--source: {file.name} has {file.size} bytes and unfolds to more than {tar.tell()}: pictures"
                        " do not, fetch it again"
                    )
        tar.write(tar_end(tar.tell()))


def _checked(label: Any, file: SourceFile, row: int) -> int:
    if not isinstance(label, int):
        raise ConfigError(f"--source: row {row} of {file.name} has the label {label!r}, not a class number: mend it")
    return label


@contextmanager
def _opened(file: SourceFile, patience: Patience, advance: Callable[[int], object] = lambda _: None) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing("parquet", "reading parquet needs") from None
    try:
        with file.reader(patience, advance) as raw:
            opened = pyarrow.parquet.ParquetFile(raw)
            schema = opened.schema_arrow
            fields = {field.name: field.type for field in schema}
            image = fields.get("image")
            if (
                "label" not in fields
                or image is None
                or not pyarrow.types.is_struct(image)
                or "bytes" not in image.names
                or image.field("bytes").type not in (pyarrow.binary(), pyarrow.large_binary())
            ):
                raise ConfigError(
                    f"--source: {file.name} has the columns {', '.join(schema.names)}; needed are image"
                    " {bytes, path} and label: rename them, or convert the data set"
                )
            yield opened
    except (pyarrow.ArrowException, KeyError, UnicodeDecodeError) as error:
        raise ConfigError(f"--source: {file.name} is not a readable parquet file ({error}): fetch it again") from None
    except OSError as error:
        raise unreadable(file.fs, file.path, error) from None
