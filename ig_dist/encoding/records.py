"""What is finished: a record beside each shard, until the index takes their place.

A shard is complete when its tar and its record exist. Both are written whole and never one over another, the record
last, so any number of workers may look, die and come back without locks.
"""

import contextlib
import csv
import io
import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, ValidationError

from ig_dist.data.index import SampleTable
from ig_dist.encoding.settings import Settings, shard_name
from ig_dist.errors import ConfigError, DataError, IgDistError, first_line
from ig_dist.storage.faults import Patience, unreadable
from ig_dist.storage.files import list_sizes, open_url, read_file, write_whole
from ig_dist.storage.urls import is_local
from ig_dist.storage.writes import create_file

PARTS = "parts"
REJECTED_NAME = "rejected.csv"
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp$")
_RECORD = re.compile(r"shard-\d{6,}\.json")  # or what a killed worker left of one
_SHARD = re.compile(r"shard-(\d{6,})(?:\.[0-9a-f]{16})?\.tar")  # of settings.shard_name


class TooManyRejected(IgDistError):  # noqa: N818  (a user's mistake that one worker alone may come upon)
    """More files hold no picture than the user allows."""

    exit_code = 2


class Superseded(Exception):  # noqa: N818  (no failure: what was to be written is no longer wanted)
    """The index exists: other workers have finished everything."""


class Rejected(NamedTuple):
    """A file of the source that holds no picture."""

    number: int  # of the image in the source
    path: str
    reason: str


def _rows(table: SampleTable) -> list[list[int]]:
    """As they are written down: offset, label, CRC, offset and CRC of the mirrored latent (-1 and 0: none)."""
    none = {"flip_offset": np.full(len(table), -1), "flip_crc32": np.zeros(len(table), int)}
    columns = none | table.columns
    return np.stack([np.asarray(columns[name], np.int64) for name in vars(table)], axis=1).tolist()  # type: ignore[no-any-return]


def _table(rows: Any) -> SampleTable:
    try:
        return rows if isinstance(rows, SampleTable) else SampleTable.from_rows(rows)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"no rows: {error}") from None


class ShardRecord(BaseModel):
    """One finished shard. Without samples (all files rejected) there is no tar."""

    model_config = ConfigDict(extra="forbid")

    settings: Settings
    name: str
    bytes: int
    samples: int
    sha256: str
    rows: Annotated[SampleTable, PlainValidator(_table), PlainSerializer(_rows)]
    """As columns, for they may be many; a list of ``SampleRow`` in the file."""
    rejected: list[Rejected]
    upscaled: int  # images that were smaller than they are now
    sums: list[float]  # per channel: sum of the stored latents (of moments: of the means), as float64
    square_sums: list[float]  # per channel: sum of their squares (of moments: of mean^2 + std^2)


class Dest:
    """The folder of the shards: a path or any fsspec URL."""

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        self.url, self.patience = url.rstrip("/"), patience or Patience()
        self.fs, self.path = open_url(self.url, "--dest", self.patience)

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Names and bytes of the files in the folder or in a folder of it."""
        self.fs.invalidate_cache()
        try:
            return list_sizes(self.fs, f"{self.path}/{folder}".rstrip("/"))
        except OSError as error:
            raise self._unusable(error) from None

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        self.fs.invalidate_cache()
        return bool(self.fs.exists(f"{self.path}/{name}"))

    def has_index(self) -> bool:
        """Whether everything is finished."""
        return self.exists("index.json")

    def is_complete(self, number: int) -> bool:
        """Whether a shard is finished."""
        record = self.read_record(number)
        return record is not None and (record.samples == 0 or self.exists(record.name))

    def read_record(self, number: int) -> ShardRecord | None:
        """The record of a shard; None: it is gone, or no record (the shard is then made again)."""
        name = record_name(number)
        try:
            return ShardRecord.model_validate_json(read_file(self.fs, f"{self.path}/{name}"))
        except (FileNotFoundError, ValidationError):
            return None
        except OSError as error:
            raise unreadable(self.fs, f"{self.path}/{name}", error) from None

    def make(self) -> None:
        """Make the folder."""
        try:
            if is_local(self.fs):  # an object needs no folder
                self.fs.makedirs(self.path, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from None

    def _unusable(self, error: OSError) -> ConfigError:
        what = "is a file" if isinstance(error, NotADirectoryError) else f"cannot be used ({_reason(error)})"
        return ConfigError(f"--dest {self.url} {what}: choose a folder, or make it accessible")

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole; raises as ``writing``."""
        with self.writing(name) as path:
            write_whole(self.fs, path, data)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file whole where there is none; whether it holds ``data`` now. Raises as ``writing``."""
        with self.writing(name) as path:
            return create_file(self.fs, path, data)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[str]:
        """For who writes a file: its path. A local folder for it is made.

        Raises:
            Superseded: the index was written meanwhile, and what was in the way of it swept away.
            DataError: the storage does not take it.
        """
        path = f"{self.path}/{name}"
        try:
            if is_local(self.fs) and not self.has_index():  # with the index, the folder of the records is gone for good
                self.fs.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
            yield path
        except OSError as error:
            if isinstance(error, FileNotFoundError) and self.has_index():
                raise Superseded from None
            raise DataError(
                f"{self.url}/{name} cannot be written ({_reason(error)}): mend that, and run the same command again"
            ) from None

    def create_shard(self, number: int, data: bytes, sha256: str) -> str:
        """Write the tar of a shard; the name that it has now.

        A tar that is there stays: another worker's record, and the index, may speak of it. If it is not the same,
        because that worker has another kind of device, or because it is damaged, this one is named by its content.
        """
        name = shard_name(number)
        if data and not self.create(name, data):
            if self.has_index():
                raise Superseded
            name = shard_name(number, sha256)
            self.write(name, data)
        return name

    def create_record(self, number: int, record: ShardRecord) -> None:
        """Write the record of a shard. Of two workers' the first stays, unless it is damaged or its tar is gone."""
        name, data = record_name(number), record.model_dump_json().encode()
        if not self.create(name, data) and not self.is_complete(number):
            self.write(name, data)

    def sweep(self, known: set[str]) -> None:
        """Remove the records, what killed workers left, and the tars of shards that are not the index' (``known``)."""
        for name in self.sizes(PARTS):
            if _RECORD.match(name):
                self.remove(f"{PARTS}/{name}")
        numbers = {match[1] for name in known if (match := _SHARD.fullmatch(name))}
        for name in self.sizes().keys() - known:
            match = _SHARD.fullmatch(name)
            if match[1] in numbers if match else _TEMPORARY.search(name):
                self.remove(name)
        if is_local(self.fs):
            with contextlib.suppress(OSError):  # another worker is here too
                self.fs.rmdir(f"{self.path}/{PARTS}")

    def remove(self, name: str) -> None:
        """Remove a file, if it is there; without its record a shard is made again."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.path}/{name}")

    def write_rejected(self, rejected: Sequence[Rejected]) -> None:
        """``rejected.csv`` (path, reason) in the order of the source; none where nothing is rejected."""
        if rejected:
            text = io.StringIO(newline="")
            csv.writer(text).writerows([("path", "reason"), *((row.path, row.reason) for row in sorted(rejected))])
            self.write(REJECTED_NAME, text.getvalue().encode())
        else:
            self.remove(REJECTED_NAME)


def record_name(number: int) -> str:
    """The file of a shard's record."""
    return f"{PARTS}/{PurePosixPath(shard_name(number)).stem}.json"


def refuse_others(dest: Dest, theirs: Settings, mine: Settings) -> None:
    """Go on only where the shards there are of these settings."""
    differences = theirs.differences(mine)
    if differences:
        raise ConfigError(
            f"--dest {dest.url} holds shards made with other settings or images ({'; '.join(differences)}):"
            " choose another, or delete it"
        )


class Ledger:
    """What all workers have finished of so many shards, as of the last look. Each record is read once."""

    def __init__(self, dest: Dest, settings: Settings, shards: int) -> None:
        self.ended = False  # the index is there
        self.finished: set[int] = set()
        self._known: dict[int, tuple[str | None, list[Rejected]]] = {}  # the tar, if any, and what was rejected
        self._dest, self._settings, self._shards = dest, settings, shards
        self._looked = -math.inf

    def look(self, every_s: float = 0.0) -> None:
        """See what is there now, unless that was done less than so long ago: each look lists all that is finished."""
        if time.monotonic() - self._looked < every_s:
            return
        self._looked = time.monotonic()
        tars, records = self._dest.sizes(), self._dest.sizes(PARTS)
        present = [number for number in range(self._shards) if PurePosixPath(record_name(number)).name in records]
        self._known = {number: self._known[number] for number in present if number in self._known}
        for number in present:
            record = self._dest.read_record(number) if number not in self._known else None
            if record is not None:
                refuse_others(self._dest, record.settings, self._settings)
                self._known[number] = (record.name if record.samples else None, record.rejected)
        self.finished = {number for number, (tar, _) in self._known.items() if tar is None or tar in tars}
        # After the listing: if that lacks records because the index has taken their place, the index is seen here.
        self.ended = self._dest.has_index()

    @property
    def rejected(self) -> list[Rejected]:
        """What is rejected in all finished shards."""
        return [row for number in self.finished for row in self._known[number][1]]


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such folder or bucket"
    return error.strerror or first_line(error)
