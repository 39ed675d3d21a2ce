"""The side file of an index: one row per sample, in columns, read in checked blocks and written as it comes.

The file is plain safetensors. A large one is never read whole: rows are taken out of blocks, whose CRCs stand in
``index.json``, when they are asked for, and the blocks that were used last are held. So what an index costs depends on
what is looked at, and not on how many samples there are, on a disk and on an object store alike.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from ig_dist.errors import ConfigError, DamagedError, DataError
from ig_dist.storage.faults import PATIENCE, Patience, intact, unreadable
from ig_dist.storage.files import REQUEST_BYTES, read_range
from ig_dist.storage.urls import full_url

BLOCK = 2**17  # bytes under one CRC: some shards' worth of a column; no row straddles two
HELD_BYTES = REQUEST_BYTES  # of blocks that a process holds; a file of no more is read whole
PIECE = 2**23  # bytes that are written, or looked through, at once

_FEW = 8  # blocks that are held when they are read
_ROWS = 2**16  # that are written at once
_DTYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "U32": np.dtype("<u4")}


class Column(Protocol):
    """A number of each sample: an array, or what gives arrays for slices."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> Any: ...
    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its numbers."""


class Blocks:
    """A file that is read in blocks, held against CRC-32s in hexadecimal as they come, by any threads.

    Raises:
        ConfigError: the CRCs are of another file.
    """

    def __init__(self, fs: Any, path: str, size: int, crcs: str, remedy: str) -> None:
        self.size = size
        self._fs, self._path, self._remedy = fs, path, remedy
        self._crcs = np.frombuffer(bytes.fromhex(crcs), ">u4")
        if len(self._crcs) != -(-size // BLOCK):
            raise ConfigError(
                f"{full_url(fs, path)} does not match index.json (it has {size} bytes): copy both again or {remedy}"
            )
        self.block = lru_cache(HELD_BYTES // BLOCK)(self._fetch)

    def read(self, start: int, stop: int, patience: Patience = PATIENCE) -> NDArray[np.uint8]:
        """Bytes ``start`` to ``stop`` (exclusive), in new memory.

        Raises:
            DamagedError: they are not what index.json says.
            DataError: the storage fails.
        """
        if stop <= start:
            return np.empty(0, np.uint8)
        first, after = start // BLOCK, -(-stop // BLOCK)
        if after - first > _FEW:  # whoever reads so much goes through the file once
            data = self._fetch(first, patience, after)
        else:
            data = np.concatenate([self.block(number, patience) for number in range(first, after)])
        return data[start - first * BLOCK : stop - first * BLOCK]

    def sha256(self) -> str:
        """Hash of the whole file, all of whose blocks are checked on the way."""
        digest = hashlib.sha256()
        for start in range(0, self.size, PIECE):
            digest.update(self.read(start, min(start + PIECE, self.size)).data)
        return digest.hexdigest()

    def _fetch(self, first: int, patience: Patience, after: int = 0) -> NDArray[np.uint8]:
        """Blocks ``first`` to ``after`` (exclusive), or that one, read in one request."""
        after = after or first + 1

        def read() -> NDArray[np.uint8]:
            data = read_range(self._fs, self._path, first * BLOCK, min(after * BLOCK, self.size), patience)
            for number, crc in enumerate(self._crcs[first:after]):
                if zlib_ng.crc32(data[number * BLOCK :][:BLOCK]) != crc:
                    where = f"from byte {(first + number) * BLOCK} on (its CRC differs)"
                    raise DamagedError(
                        f"{full_url(self._fs, self._path)} is damaged {where}: copy it again with index.json,"
                        f" or {self._remedy}"
                    )
            return np.frombuffer(data, np.uint8)

        try:
            return intact(self._fs, self._path, read)
        except OSError as error:
            raise unreadable(self._fs, self._path, error) from None


@dataclass(frozen=True)
class StoredColumn:
    """A column in a file, of which only what is asked for is read."""

    read: Callable[[int, int, Patience], NDArray[np.uint8]]
    """Bytes of the file, from the first to the second (exclusive)."""
    begin: int  # of the column's first byte in the file
    count: int
    dtype: np.dtype[Any]
    patience: Patience

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: Any) -> Any:
        """The numbers of a slice without steps, or of one row."""
        if not isinstance(rows, slice):
            row = range(self.count)[rows]  # or IndexError
            return self[row : row + 1][0]
        start, stop, step = rows.indices(self.count)
        if step != 1:
            raise IndexError("a stored column has no slices with steps")
        first, after = (self.begin + row * self.dtype.itemsize for row in (start, max(start, stop)))
        return self.read(first, after, self.patience).view(self.dtype)


def stored_columns(blocks: Blocks) -> dict[str, StoredColumn]:
    """The columns of a side file, by its header.

    Raises:
        ValueError: it is no such file.
    """
    length = int.from_bytes(blocks.read(0, min(8, blocks.size)).tobytes(), "little")
    if 8 + length > blocks.size:
        raise ValueError("its header is longer than the file")
    columns = {}
    try:
        for name, tensor in json.loads(blocks.read(8, 8 + length).tobytes()).items():
            (count,), (begin, end), dtype = tensor["shape"], tensor["data_offsets"], _DTYPES[tensor["dtype"]]
            if not 0 <= begin <= end <= blocks.size - 8 - length or count != (end - begin) / dtype.itemsize:
                raise ValueError(f"column {name} is not in it")
            columns[name] = StoredColumn(blocks.read, 8 + length + int(begin), int(count), dtype, PATIENCE)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is none ({type(error).__name__})") from None
    return columns


def pack(columns: Mapping[str, Column]) -> Iterator[memoryview]:
    """The bytes of a side file, in pieces of ``PIECE`` but the last: as the safetensors library writes them."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    kinds = list(_DTYPES)
    # wide numbers first: then every number lies at a multiple of its size
    ordered = sorted(columns, key=lambda name: (kinds.index(names[columns[name].dtype]) > 0, name))
    header, at = {}, 0
    for name in ordered:
        column = columns[name]
        end = at + len(column) * column.dtype.itemsize
        header[name] = {"dtype": names[column.dtype], "shape": [len(column)], "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    piece = bytearray(len(text).to_bytes(8, "little") + text)
    for column in (columns[name] for name in ordered):
        for start in range(0, len(column), _ROWS):
            piece += column[start : start + _ROWS].tobytes()
            while len(piece) >= PIECE:
                ready, piece = piece[:PIECE], piece[PIECE:]
                yield memoryview(ready)
    if piece:
        yield memoryview(piece)


def block_crcs(piece: memoryview) -> str:
    """The CRCs of the blocks of a piece, as ``index.json`` holds them."""
    return "".join(f"{zlib_ng.crc32(piece[start : start + BLOCK]):08x}" for start in range(0, len(piece), BLOCK))


class Spool:
    """Columns that are added shard by shard, in temporary files that nobody sees.

    Args:
        folder: on whose disk the files are; None: the system's for temporary files.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder, self._files = folder, dict[str, IO[bytes]]()
        self.columns: dict[str, StoredColumn] = {}  # what was added so far

    def add(self, columns: Mapping[str, Column]) -> None:
        """Append rows.

        Raises:
            DataError: there is no room for them.
        """
        count = len(self.columns.get("label", ())) + len(columns["label"])
        try:
            for name, column in columns.items():
                if name not in self._files:
                    self._files[name] = tempfile.TemporaryFile("a+b", dir=self._folder)  # noqa: SIM115
                file = self._files[name]
                file.write(column[:].tobytes())
                file.flush()  # a full disk is found here
                self.columns[name] = StoredColumn(partial(_read, file), 0, count, column.dtype, PATIENCE)
        except OSError as error:
            remedy = "free space there" if self._folder else "free space there, or set TMPDIR"
            raise DataError(
                f"{self._folder or tempfile.gettempdir()}: the rows of {count} samples cannot be kept for the"
                f" index ({error.strerror}): {remedy}, and run the same command again"
            ) from None


def _read(file: IO[bytes], start: int, stop: int, _patience: Patience) -> NDArray[np.uint8]:
    return np.frombuffer(os.pread(file.fileno(), stop - start, start), np.uint8)
