"""Whole shards: found by folder, glob or brace expression, and read once, front to back, several at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple, cast

import numpy as np

from ig_dist.data.index import KeyInfo, LatentInfo, SampleTable
from ig_dist.data.shards import scan_shard
from ig_dist.data.statistics import ChannelSums
from ig_dist.data.tar import DamagedTar
from ig_dist.errors import ConfigError
from ig_dist.storage.faults import Patience, unreadable
from ig_dist.storage.files import list_sizes, open_url, read_range
from ig_dist.storage.urls import full_url

_PIECE = 2**23  # bytes of a request; as many of each file are in memory


class ShardFile:
    """A file that is read once, front to back, in requests that are made again after a fault; hashed on the way.

    Args:
        fs: the file system.
        path: the file in it.
        size: its bytes.
        patience: how long faults are borne; its ``stop`` ends the reading.
        advance: called with the number of bytes that were read.
    """

    def __init__(
        self, fs: Any, path: str, size: int, patience: Patience, advance: Callable[[int], None] = lambda _: None
    ) -> None:
        self._fs, self._path, self._size, self._patience, self._advance = fs, path, size, patience, advance
        self._hash = hashlib.sha256()
        self._next = 0  # of the piece that is not read yet
        self._memory = np.empty(min(size, _PIECE), np.uint8).data
        self._piece, self._at = self._memory[:0], 0

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes; fewer at the end of the file."""
        parts = []
        while count and (self._at < len(self._piece) or self._read_piece()):
            part = bytes(self._piece[self._at : self._at + count])  # the next piece comes into the same memory
            parts.append(part)
            self._at += len(part)
            count -= len(part)
        return b"".join(parts)

    def sha256(self) -> str:
        """Hash of the whole file, of which the rest is read."""
        while self._read_piece():
            pass
        return self._hash.hexdigest()

    def _read_piece(self) -> bool:
        if self._patience.stop.is_set():
            raise CancelledError
        stop = min(self._next + _PIECE, self._size)
        if stop == self._next:
            return False
        into = self._memory[: stop - self._next]
        self._piece = read_range(self._fs, self._path, self._next, stop, self._patience, into=into)
        self._hash.update(self._piece)
        self._advance(stop - self._next)
        self._next, self._at = stop, 0
        return True


class ShardContent(NamedTuple):
    """What is in a shard."""

    rows: SampleTable
    sha256: str
    sums: ChannelSums
    problem: ConfigError | DamagedTar | None
    """Why it could not be read to its end; there are no rows then."""


def read_shard(file: ShardFile, latent: LatentInfo, keys: KeyInfo) -> ShardContent:
    """Read a shard once: its samples, its hash and the sums of its latents.

    Raises:
        DataError: the storage fails.
        OSError: the file cannot be read.
    """
    sums = ChannelSums(latent.kind, latent.shape[0])
    rows, problem = SampleTable.from_rows([]), None
    try:
        found = scan_shard(
            cast(IO[bytes], file),
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
    return ShardContent(rows, file.sha256(), sums, problem)


class FoundShards(NamedTuple):
    """Shards of one folder."""

    fs: Any
    folder: str
    """In the file system."""
    sizes: dict[str, int]
    """Names, sorted, and bytes."""


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
    if fs.isdir(path):
        below = [*_glob(fs, f"{_literal(path)}/*/*.tar")]
        if below:
            raise ConfigError(
                f"--shards {expression} has shards in sub-folders ({full_url(fs, below[0])}): an index and its shards"
                " lie in one folder; move them there, or index each folder by itself"
            )
        folder, found = path, [name for name in list_sizes(fs, path) if name.endswith(".tar")]
    else:
        from webdataset.shardlists import expand_urls

        try:
            parts = expand_urls(path)
        except ValueError as error:
            raise ConfigError(f"--shards {expression}: {error}: mend the brace expression") from None
        files = [file for part in parts for file in (_glob(fs, part) if _has_magic(part) else [part])]
        folders = sorted({str(PurePosixPath(file).parent) for file in files})
        if len(folders) > 1:
            raise ConfigError(
                f"--shards {expression} names files in {len(folders)} folders ({folders[0]}, {folders[1]}, ...): an"
                " index and its shards lie in one folder; move them there, or index each folder by itself"
            )
        folder, found = (folders or [""])[0], [PurePosixPath(file).name for file in files]
    if not found:
        raise ConfigError(
            f"--shards {expression} names no shards: use a folder of .tar files, a glob ('data/*.tar') or a brace"
            " expression ('data/{000000..000127}.tar')"
        )
    there = list_sizes(fs, folder)
    missing = sorted(set(found) - there.keys())
    if missing:
        raise ConfigError(
            f"--shards {expression}: {full_url(fs, f'{folder}/{missing[0]}')} is not there, or no plain file"
            + (f" (and {len(missing) - 1} more)" if missing[1:] else "")
            + ": mend the expression, or copy the shard there"
        )
    return FoundShards(fs, folder, {name: there[name] for name in sorted(set(found))})


def _has_magic(path: str) -> bool:
    return any(letter in path for letter in "*?[")


def _literal(path: str) -> str:
    """A path as a glob that matches it alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)


def _glob(fs: Any, pattern: str) -> list[str]:
    return [str(file) for file in fs.glob(pattern)]
