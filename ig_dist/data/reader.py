"""Reading samples of a shard by byte range, checked: from storage or the node's cache, under retries and deadlines."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from ig_dist.data.cache import BlockCache
from ig_dist.data.index import ShardIndex
from ig_dist.errors import ConfigError, DataError, first_line
from ig_dist.storage.background import in_parallel
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import REQUEST_BYTES, open_url, read_range
from ig_dist.storage.urls import full_url, is_local

Samples = NDArray[Any]
SPOT = np.dtype(
    [("shard", "i8"), ("offset", "i8"), ("crc", "u4"), ("id", "i8"), ("label", "i8"), ("epoch", "i8"), ("place", "i8")]
)
"""Where a sample lies: its shard, and its first byte there; what it must be, and is. Last, what streams note of it."""
Spots = NDArray[np.void]

_READ_AGAIN = 5  # a link that flips a bit in every fifth request condemns one sample in 16,000
_FILES_OPEN = 256
_AT_ONCE = 32  # requests for single samples: each takes as long as the way to the server
_ROOM = 2**18  # bytes that are read, checked and copied before the next: they stay in the processor's cache


class _File:
    """An open file of a disk, closed when nobody uses it any more; ``begin``: byte of the shard that is its first.

    Raises:
        OSError: it is not there, or of another size; None: of any.
    """

    def __init__(self, path: str, begin: int, size: int | None) -> None:
        self.number, self.begin = -1, begin
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not block
        if size is not None and os.fstat(self.number).st_size != size:
            raise FileNotFoundError(path)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class _Rows:
    """Rows of memory that are filled from the bytes of a request, as these arrive: one for each ascending offset."""

    def __init__(self, offsets: list[int], rows: list[memoryview]) -> None:
        self._todo = iter(zip(offsets, rows, strict=True))
        self._next = next(self._todo, None)
        self._seen, self._filled, self._crc = 0, 0, 0
        self.crcs: list[int] = []

    def take(self, data: memoryview) -> None:
        """Copy what the next bytes hold of samples, and take their CRCs."""
        while self._next:
            offset, row = self._next
            begin = max(0, offset + self._filled - self._seen)
            part = data[begin : begin + len(row) - self._filled]
            if not part:
                break
            self._crc = zlib_ng.crc32(part, self._crc)
            row[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == len(row):
                self.crcs.append(self._crc)
                self._next, self._filled, self._crc = next(self._todo, None), 0, 0
        self._seen += len(data)


class ShardReader:
    """Reads samples of shards by byte range. Safe to call from several threads.

    Args:
        index: the opened shard index.
        on_corrupt: ``fail`` raises DataError at a damaged sample; ``skip`` marks and remembers it.
        patience: how long faults of the storage are borne.
        cache: the node's cache, if any.
        request_bytes: the most that is asked for at once, and of a block of the cache; a sample may be larger.

    Raises:
        ConfigError: an index whose latents are larger than its shards.
    """

    def __init__(
        self,
        index: ShardIndex,
        on_corrupt: Literal["fail", "skip"] = "fail",
        *,
        patience: Patience | None = None,
        cache: BlockCache | None = None,
        request_bytes: int = REQUEST_BYTES,
    ) -> None:
        self.quarantined: set[int] = set()
        self.patience = patience or Patience()
        self._index, self._on_corrupt, self._cache = index, on_corrupt, cache
        self._fs, self._path = open_url(index.folder, "data.index", self.patience)
        self._shape, self._dtype = index.info.latent.stored_shape, np.dtype(index.info.latent.dtype)
        self.sample_bytes = index.info.latent.stored_bytes  # of its array
        if self.sample_bytes > max(shard.bytes for shard in index.info.shards):
            raise ConfigError(
                f"{index.folder}: latents of shape {index.info.latent.shape} are larger than its shards:"
                f" {index.info.remake}"
            )
        self.table = index.table.under(self.patience)  # that of the index, read under the same patience
        self._first_id = index.first_ids
        self._request_bytes = request_bytes
        self._kept = cache.shards if cache else 0  # the first shards, whose blocks the cache keeps
        self._open = lru_cache(_FILES_OPEN)(self._open_file)

    def read_ids(self, start: int, stop: int, *, flipped: bool = False) -> tuple[Samples, NDArray[np.bool_]]:
        """Samples of consecutive ids, ``start`` to ``stop`` (exclusive), of one shard or several, and which are good.

        Returns:
            (n, *stored shape), all mirrored or none, and (n,) bool: False for a damaged sample, whose row is undefined.

        Raises:
            DataError: the shard is gone, the storage fails beyond the deadline, or a sample is damaged and
                ``on_corrupt`` is ``fail``.
        """
        samples, good = np.empty((stop - start, *self._shape), self._dtype), np.empty(stop - start, dtype=bool)
        rows, ends = self.rows(samples), self._first_id
        for shard in range(int(np.searchsorted(ends, start, side="right")) - 1, int(np.searchsorted(ends, stop))):
            begin, after = max(start, int(ends[shard])), min(stop, int(ends[shard + 1]))
            here, first = slice(begin - start, after - start), int(ends[shard])
            spots = self.find(shard, begin - first, after - first, np.full(after - begin, flipped))
            good[here] = self.read_run(spots, rows[here])
        return samples, good

    def find(self, shard: int, start: int, stop: int, flipped: NDArray[np.bool_]) -> Spots:
        """Where samples ``start`` to ``stop`` (exclusive) of a shard lie; ``flipped``: (n,) bool, which mirrored."""
        first = int(self._first_id[shard])
        table, spots = self.table[first + start : first + stop], np.zeros(stop - start, SPOT)
        spots["shard"], spots["id"], spots["label"] = shard, np.arange(first + start, first + stop), table.label
        spots["offset"], spots["crc"] = table.offset, table.crc32
        if table.flip_offset is not None and table.flip_crc32 is not None:
            np.copyto(spots["offset"], np.asarray(table.flip_offset), where=flipped)
            np.copyto(spots["crc"], np.asarray(table.flip_crc32), where=flipped)
        return spots

    def rows(self, samples: Samples) -> list[memoryview]:
        """The memory of each sample of an array, (n, *stored shape) or (n, bytes)."""
        data = samples.view(np.uint8).reshape(-1).data
        return [data[at : at + self.sample_bytes] for at in range(0, len(data), self.sample_bytes)]

    def pick(self, spots: Spots, rows: Sequence[memoryview]) -> list[int]:
        """Read samples each by itself, wherever they lie, into a row each.

        Returns:
            Which are damaged, by their place in ``spots``; their rows are undefined.
        """
        left = []
        for number, (shard, offset, crc, *_) in enumerate(spots.tolist()):
            row, block = rows[number], offset // self._request_bytes if shard < self._kept else 0
            with suppress(OSError):  # there is no such block yet: not all of it is worth while for one sample
                file = self._open(shard, block)
                if os.preadv(file.number, [row], offset - file.begin) == len(row) and zlib_ng.crc32(row) == crc:
                    continue
            left.append(number)

        def again(number: int) -> bool:
            return bool(self.read_run(spots[[number]], [rows[number]], keep=False)[0])

        good = in_parallel(again, left, _AT_ONCE, self.patience.stop)
        return [number for number, whole in zip(left, good, strict=True) if not whole]

    def read_run(self, spots: Spots, rows: Sequence[memoryview], *, keep: bool = True) -> NDArray[np.bool_]:
        """Read samples of one shard that lie together with few requests, into a row each.

        Args:
            spots: where they lie.
            rows: one for each.
            keep: the cache keeps what is read from the source; it always does in place of what is damaged in it.

        Returns:
            Which are good.
        """
        good = np.zeros(len(spots), dtype=bool)
        left = np.argsort(spots["offset"])
        for attempt in range(1 + _READ_AGAIN):  # it may have suffered on the way, or in the cache; what was good stays
            for part in self._cut(spots["offset"], left):
                offsets = spots["offset"][part]
                begin, end = int(offsets[0]), int(offsets[-1]) + self.sample_bytes
                filling = _Rows((offsets - begin).tolist(), [rows[number] for number in part])
                self._bytes(int(spots["shard"][0]), begin, end, filling, fresh=attempt > 0, keep=keep or attempt > 0)
                good[part] = spots["crc"][part] == filling.crcs
            left = left[~good[left]]
            if not len(left):
                break
        for spot in spots[left]:
            if self._on_corrupt == "fail":
                raise DataError(
                    f"{self._url(spot['shard'])}: sample {spot['id']} at byte {spot['offset']} is damaged (its CRC"
                    " differs): restore the shard, or train without such samples (data.on_corrupt=skip)"
                )
            self.quarantined.add(int(spot["id"]))
        return good

    def warm(self, spots: Spots) -> bool:
        """Read the part of a shard that holds samples, so that ``pick`` finds it in this machine's memory.

        Returns:
            Whether it does: not where there is no file on a disk, nor where the kernel does not keep what it reads (as
            with some network file systems), or does not say so.
        """
        shard, offsets, room = int(spots["shard"][0]), spots["offset"], np.empty(_ROOM, np.uint8).data
        begin, end = int(offsets.min()), int(offsets.max()) + self.sample_bytes
        try:
            for block, start, stop in self._blocks(shard, begin, end):
                if shard < self._kept and not self._cached(shard, block, fetch=True):
                    return False
                file = self._open(shard, block)
                os.preadv(file.number, [room[:1]], start - file.begin)
                os.preadv(file.number, [room[:1]], start - file.begin, os.RWF_NOWAIT)  # raises if it is not in memory
                for at in range(start, stop, _ROOM):
                    os.preadv(file.number, [room[: stop - at]], at - file.begin)
        except OSError:  # whoever reads the samples says what it is
            self._open.cache_clear()
            return False
        return True

    def _cut(self, offsets: NDArray[np.int64], left: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Samples, ascending in the shard, whose bytes fit into one request, with whatever lies between them."""
        while len(left):
            most = offsets[left[0]] + self._request_bytes - self.sample_bytes
            count = max(1, int(np.searchsorted(offsets[left], most, side="right")))
            yield left[:count]
            left = left[count:]

    def _blocks(self, shard: int, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The cache's blocks that hold bytes of a shard, and which of these bytes; one of all where it keeps none."""
        size = self._request_bytes if shard < self._kept else end
        for block in range(begin // size, -(-end // size)):
            yield block, max(begin, block * size), min(end, (block + 1) * size)

    def _bytes(self, shard: int, begin: int, end: int, filling: _Rows, *, fresh: bool, keep: bool) -> None:
        """Fill rows from bytes of a shard: by way of the cache where it keeps them."""
        if shard >= self._kept or not self._cache:
            self._request(shard, begin, end, filling)
            return
        for block, start, stop in self._blocks(shard, begin, end):
            if fresh:
                self._cache.drop(shard, block)
                self._open.cache_clear()
            if self._cached(shard, block, fetch=keep):
                data = np.empty(stop - start, np.uint8).data
                with suppress(OSError):  # what is missing has another CRC
                    os.preadv(self._open(shard, block).number, [data], start - block * self._request_bytes)
                filling.take(data)
                del data  # before the next block comes
            else:
                self._request(shard, start, stop, filling)

    def _cached(self, shard: int, block: int, *, fetch: bool) -> bool:
        """Whether the cache has a block; with ``fetch`` it is brought there, if there is room."""
        with suppress(OSError):
            return bool(self._open(shard, block))
        if not (fetch and self._cache and not self._cache.full):
            return False
        begin, size = self._block(shard, block)
        self._cache.put(shard, block, self._request(shard, begin, begin + size))
        return self._cached(shard, block, fetch=False)

    def _block(self, shard: int, block: int) -> tuple[int, int]:
        """Where a block begins in its shard, and its bytes."""
        begin = block * self._request_bytes
        return begin, min(self._request_bytes, self._index.info.shards[shard].bytes - begin)

    def _open_file(self, shard: int, block: int) -> _File:
        if self._cache and shard < self._kept:
            return _File(self._cache.path(shard, block), *self._block(shard, block))
        if not is_local(self._fs):
            raise FileNotFoundError
        return _File(f"{self._path}/{self._index.info.shards[shard].name}", 0, None)

    def _request(self, shard: int, begin: int, end: int, filling: _Rows | None = None) -> memoryview:
        """Read bytes of a shard from the storage: into rows as they come, or else into new memory."""
        path = f"{self._path}/{self._index.info.shards[shard].name}"
        taking: dict[str, Any] = {"into": np.empty(_ROOM, np.uint8).data, "taken": filling.take} if filling else {}
        try:
            return read_range(self._fs, path, begin, end, self.patience, **taking)
        except FileNotFoundError:
            raise DataError(f"{self._url(shard)} is gone: restore the shard and run again") from None
        except OSError as error:
            raise DataError(f"{self._url(shard)}: {first_line(error)}: mend the storage and run again") from None

    def _url(self, shard: int) -> str:
        return full_url(self._fs, f"{self._path}/{self._index.info.shards[shard].name}")
