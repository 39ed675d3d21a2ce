"""Whole shards: found by folder, glob or brace expression, and read once, front to back."""

import glob
import hashlib
import io
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from braceexpand import braceexpand

from ig_dist.data.index import KeyInfo, LatentInfo, SampleTable
from ig_dist.data.shards import scan_shard
from ig_dist.data.statistics import ChannelSums
from ig_dist.data.tar import DamagedTar
from ig_dist.errors import ConfigError
from ig_dist.storage.faults import Patience, unreadable
from ig_dist.storage.files import REQUEST_BYTES, list_sizes, open_url, read_range
from ig_dist.storage.urls import full_url

_PIECE = 2**23  # bytes of a request; as many of each shard are in memory


class FileReader(io.RawIOBase):
    """A file for who reads and seeks, in requests that are made again after a fault, until ``patience.stop`` is set.

    Each of ``passing`` is called with every part that was read, in turn.
    """

    def __init__(
        self, fs: Any, path: str, size: int, patience: Patience, *passing: Callable[[memoryview], object]
    ) -> None:
        super().__init__()
        self._fs, self._path, self._size, self._patience, self._passing = fs, path, size, patience, passing
        self._at = 0

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:  # noqa: D102
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; less of it at the end of the file."""
        data = memoryview(buffer)[: max(0, self._size - self._at)]
        for start in range(0, len(data), REQUEST_BYTES):
            if self._patience.stop.is_set():
                raise CancelledError
            into = data[start : start + REQUEST_BYTES]
            part = read_range(self._fs, self._path, self._at, self._at + len(into), self._patience, into=into)
            self._at += len(part)
            for call in self._passing:
                call(part)
        return len(data)


def in_pieces(file: FileReader) -> io.BufferedReader:
    """For who reads a file from front to back, a little at a time."""
    return io.BufferedReader(file, _PIECE)


class ShardContent(NamedTuple):
    """What is in a shard."""

    rows: SampleTable
    sha256: str
    sums: ChannelSums
    problem: ConfigError | DamagedTar | None  # why it could not be read to its end; there are no rows then


def read_shard(
    fs: Any,
    path: str,
    size: int,
    latent: LatentInfo,
    keys: KeyInfo,
    patience: Patience,
    advance: Callable[[int], None] = lambda _: None,
) -> ShardContent:
    """Read a shard once: its samples, its hash and the sums of its latents. ``advance`` hears of the bytes read.

    Raises:
        DataError: the storage fails.
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    file = in_pieces(FileReader(fs, path, size, patience, digest.update, lambda part: advance(len(part))))
    sums = ChannelSums(latent.kind, latent.shape[0])
    rows, problem = SampleTable.from_rows([]), None
    try:
        found = scan_shard(
            file,
            np.dtype(latent.dtype),
            latent.stored_shape,
            latent_suffix=f".{keys.latent}",
            flip_suffix=f".{keys.flip}" if latent.flips else None,
            label_suffix=f".{keys.label}",
            visit=sums.add,
        )
        rows = SampleTable.from_rows(found)
    except (ConfigError, DamagedTar) as error:
        problem = error
    sums.close()
    while file.read(_PIECE):  # what comes after a problem counts for the hash
        pass
    return ShardContent(rows, digest.hexdigest(), sums, problem)


class FoundShards(NamedTuple):
    """Shards of one folder."""

    fs: Any
    folder: str  # in the file system
    sizes: dict[str, int]  # names, sorted, and bytes


def find_shards(expression: str) -> FoundShards:
    """The shards that a folder, glob or brace expression names: a path or any fsspec URL.

    Raises:
        ConfigError: there are none, or not all are in one folder.
    """
    fs, path = open_url(expression, "--shards")
    try:
        return _find(expression, fs, path)
    except OSError as error:
        raise unreadable(fs, path, error) from None


def _find(expression: str, fs: Any, path: str) -> FoundShards:
    apart = "an index and its shards lie in one folder; move them there, or index each folder by itself"
    if fs.isdir(path):
        if below := fs.glob(f"{glob.escape(path)}/*/*.tar"):
            raise ConfigError(f"--shards {expression} has shards in sub-folders ({full_url(fs, below[0])}): {apart}")
        files = [f"{path}/{name}" for name in list_sizes(fs, path) if name.endswith(".tar")]
    else:
        try:
            parts = list(braceexpand(path))
        except ValueError as error:
            raise ConfigError(f"--shards {expression}: {error}: mend the brace expression") from None
        files = [file for part in parts for file in (fs.glob(part) if glob.has_magic(part) else [part])]
    if not files:
        raise ConfigError(
            f"--shards {expression} names no shards: use a folder of .tar files, a glob ('data/*.tar') or a brace"
            " expression ('data/{000000..000127}.tar')"
        )
    folders = sorted({str(PurePosixPath(file).parent) for file in files})
    if len(folders) > 1:
        some = f"{folders[0]}, {folders[1]}, ..."
        raise ConfigError(f"--shards {expression} names files in {len(folders)} folders ({some}): {apart}")
    found, there = sorted({PurePosixPath(file).name for file in files}), list_sizes(fs, folders[0])
    missing = [name for name in found if name not in there]
    if missing:
        raise ConfigError(
            f"--shards {expression}: {full_url(fs, f'{folders[0]}/{missing[0]}')} is not there, or no plain file"
            + (f" (and {len(missing) - 1} more)" if missing[1:] else "")
            + ": mend the expression, or copy the shard there"
        )
    return FoundShards(fs, folders[0], {name: there[name] for name in found})
