"""Reading samples of a shard by byte range, checked: from storage or the node's cache, under retries and deadlines."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from ig_dist.background import in_parallel
from ig_dist.data.cache import BlockCache
from ig_dist.data.index import ShardIndex
from ig_dist.errors import ConfigError, DataError
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import REQUEST_BYTES, open_url, read_range
from ig_dist.storage.urls import full_url, is_local

Samples = NDArray[Any]
Spot = tuple[int, int, int, int]
"""Where a sample lies: shard, first byte, CRC-32, id."""

_READ_AGAIN = 5  # a link that flips a bit in every fifth request condemns one sample in 16,000
_FILES_OPEN = 256
_AT_ONCE = 32  # requests for single samples: each takes as long as the way to the server
_ROOM = 2**18  # bytes that are read, checked and copied before the next: they stay in the processor's cache


class _File:
    """An open file of a disk, closed when nobody uses it any more.

    Args:
        path: of it.
        begin: byte of the shard that is its first.
        size: that it must have; None: any.

    Raises:
        OSError: it is not there, or of another size.
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
    """Rows of memory that are filled from the bytes of a request, in order, as these arrive.

    Args:
        offsets: of the samples in the request, ascending.
        rows: one for each.
    """

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
        self._size = index.info.latent.stored_bytes
        if self._size > max(shard.bytes for shard in index.info.shards):
            raise ConfigError(
                f"{index.folder}: latents of shape {index.info.latent.shape} are larger than its shards:"
                f" {index.info.remake}"
            )
        self.table = index.table.under(self.patience)
        """That of the index, read under the same patience."""
        self._first_id = index.first_ids
        self._request_bytes = request_bytes
        self._kept = cache.shards if cache else 0  # the first shards, whose blocks the cache keeps
        self._open = lru_cache(_FILES_OPEN)(self._open_file)
        self._memory = threading.local()  # new memory for each request would cost the kernel as much as the reading

    def read(
        self, shard: int, start: int, stop: int, *, flipped: NDArray[np.bool_] | None = None
    ) -> tuple[Samples, NDArray[np.bool_]]:
        """Samples ``start`` to ``stop`` (exclusive) of a shard, and which of them are good.

        Args:
            shard: number of the shard.
            start: first sample.
            stop: sample after the last.
            flipped: (stop - start,), which samples are wanted mirrored; None: none.

        Returns:
            (n, *stored shape), and (n,) bool: False for a damaged sample, whose row is undefined.

        Raises:
            DataError: the shard is gone, the storage fails beyond the deadline, or a sample is damaged and
                ``on_corrupt`` is ``fail``.
        """
        samples = np.empty((stop - start, *self._shape), self._dtype)
        return samples, self.read_run(self.find(shard, start, stop, flipped), self.rows(samples))

    def read_ids(self, start: int, stop: int) -> tuple[Samples, NDArray[np.bool_]]:
        """Samples of consecutive ids, ``start`` to ``stop`` (exclusive), of one shard or several; as ``read``."""
        samples, good = np.empty((stop - start, *self._shape), self._dtype), np.empty(stop - start, dtype=bool)
        rows, at = self.rows(samples), start
        while at < stop:
            shard = int(np.searchsorted(self._first_id, at, side="right")) - 1
            begin, after = int(self._first_id[shard]), min(stop, int(self._first_id[shard + 1]))
            here = slice(at - start, after - start)
            good[here] = self.read_run(self.find(shard, at - begin, after - begin), rows[here])
            at = after
        return samples, good

    def labels(self, shard: int, start: int, stop: int) -> NDArray[np.int32]:
        """Labels of samples ``start`` to ``stop`` (exclusive) of a shard."""
        first = int(self._first_id[shard])
        labels: NDArray[np.int32] = self.table.label[first + start : first + stop]
        return labels

    def find(self, shard: int, start: int, stop: int, flipped: NDArray[np.bool_] | None = None) -> list[Spot]:
        """Where samples ``start`` to ``stop`` (exclusive) of a shard lie; ``flipped`` as for ``read``."""
        first = int(self._first_id[shard])
        table = self.table[first + start : first + stop]
        offsets, crcs = np.asarray(table.offset), np.asarray(table.crc32)
        if flipped is not None and table.flip_offset is not None and table.flip_crc32 is not None:
            offsets = np.where(flipped, np.asarray(table.flip_offset), offsets)
            crcs = np.where(flipped, np.asarray(table.flip_crc32), crcs)
        ids = range(first + start, first + stop)
        return list(zip([shard] * len(ids), offsets.tolist(), crcs.tolist(), ids, strict=True))

    def rows(self, samples: Samples) -> list[memoryview]:
        """The memory of each sample of an array, (n, *stored shape) or (n, bytes)."""
        data = samples.view(np.uint8).reshape(-1).data
        return [data[at : at + self._size] for at in range(0, len(data), self._size)]

    def pick(self, spots: Sequence[Spot], rows: Sequence[memoryview]) -> list[int]:
        """Read samples each by itself, wherever they lie, into a row each.

        Returns:
            Which are damaged, by their place in ``spots``; their rows are undefined.

        Raises:
            DataError: as ``read``.
        """
        left = []
        for number, (shard, offset, crc, _) in enumerate(spots):
            row, block = rows[number], offset // self._request_bytes if shard < self._kept else 0
            damaged = False
            with suppress(OSError):  # there is no such block yet: not all of it is worth while for one sample
                file = self._open(shard, block)
                if os.preadv(file.number, [row], offset - file.begin) == len(row) and zlib_ng.crc32(row) == crc:
                    continue
                damaged = len(list(self._blocks(shard, offset, offset + self._size))) == 1  # else it lies in two
            left.append((number, damaged))
        if not left:
            return []

        def again(item: tuple[int, bool]) -> bool:
            number, damaged = item
            return bool(self.read_run([spots[number]], [rows[number]], fresh=damaged, keep=damaged)[0])

        good = in_parallel(again, left, _AT_ONCE, self.patience.stop)
        return [number for (number, _), whole in zip(left, good, strict=True) if not whole]

    def read_run(
        self, spots: Sequence[Spot], rows: Sequence[memoryview], *, fresh: bool = False, keep: bool = True
    ) -> NDArray[np.bool_]:
        """Read samples of one shard that lie together with few requests, into a row each.

        Args:
            spots: where they lie.
            rows: one for each.
            fresh: what the cache has of them is read from the source again.
            keep: the cache keeps what is read from the source.

        Returns:
            Which are good.

        Raises:
            DataError: as ``read``.
        """
        good = np.zeros(len(spots), dtype=bool)
        left = sorted(range(len(spots)), key=lambda number: spots[number][1])
        for attempt in range(1 + _READ_AGAIN):  # it may have suffered on the way, or in the cache; what was good stays
            for part in self._cut(spots, left):
                shard, begin = spots[part[0]][:2]
                offsets = [spots[number][1] - begin for number in part]
                filling = _Rows(offsets, [rows[number] for number in part])
                self._bytes(shard, begin, begin + offsets[-1] + self._size, filling, fresh or attempt > 0, keep)
                good[part] = [crc == spots[number][2] for number, crc in zip(part, filling.crcs, strict=True)]
            left = [number for number in left if not good[number]]
            if not left:
                break
        for number in left:
            self._quarantine(spots[number])
        return good

    def warm(self, spots: Sequence[Spot]) -> bool:
        """Read the part of a shard that holds samples, so that ``pick`` finds it in this machine's memory.

        Returns:
            Whether it does: not where there is no file on a disk, nor where the kernel does not keep what it reads (as
            with some network file systems), or does not say so.
        """
        shard, offsets = spots[0][0], [spot[1] for spot in spots]
        begin, end, room = min(offsets), max(offsets) + self._size, self._room()
        try:
            for block, start, stop in self._blocks(shard, begin, end):
                if shard < self._kept and not self._has(shard, block):
                    if not self._cache or self._cache.full:
                        return False
                    self._fetch(shard, block)
                file = self._open(shard, block)
                os.preadv(file.number, [room[:1]], start - file.begin)
                os.preadv(file.number, [room[:1]], start - file.begin, os.RWF_NOWAIT)  # raises if it is not in memory
                for at in range(start, stop, _ROOM):
                    os.preadv(file.number, [room[: stop - at]], at - file.begin)
        except OSError:  # whoever reads the samples says what it is
            self._open.cache_clear()
            return False
        return True

    def _cut(self, spots: Sequence[Spot], order: list[int]) -> Iterator[list[int]]:
        """Samples, ascending in the shard, whose bytes fit into one request, with whatever lies between them."""
        first = 0
        for number in range(1, len(order)):
            if spots[order[number]][1] + self._size - spots[order[first]][1] > self._request_bytes:
                yield order[first:number]
                first = number
        if order:
            yield order[first:]

    def _blocks(self, shard: int, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The cache's blocks that hold bytes of a shard, and which of these bytes; one of all where it keeps none."""
        if shard >= self._kept:
            yield 0, begin, end
            return
        size = self._request_bytes
        for block in range(begin // size, -(-end // size)):
            yield block, max(begin, block * size), min(end, (block + 1) * size)

    def _bytes(self, shard: int, begin: int, end: int, filling: _Rows, fresh: bool, keep: bool) -> None:
        """Fill rows from bytes of a shard: by way of the cache where it keeps them."""
        if shard >= self._kept or not self._cache:
            self._request(shard, begin, end, filling)
            return
        for block, start, stop in self._blocks(shard, begin, end):
            if fresh and keep:
                self._cache.drop(shard, block)
                self._open.cache_clear()
            if (fresh and not keep) or ((self._cache.full or not keep) and not self._has(shard, block)):
                self._request(shard, start, stop, filling)
            else:
                filling.take(self._kept_bytes(shard, block, start, stop))

    def _kept_bytes(self, shard: int, block: int, start: int, stop: int) -> memoryview:
        """Bytes of a block that the cache has, or has now."""
        if not self._has(shard, block):
            first = block * self._request_bytes
            return self._fetch(shard, block)[start - first : stop - first]
        file, data = self._open(shard, block), np.empty(stop - start, np.uint8).data
        with suppress(OSError):  # what is missing has another CRC
            os.preadv(file.number, [data], start - file.begin)
        return data

    def _fetch(self, shard: int, block: int) -> memoryview:
        """A block from the storage, which the cache keeps."""
        begin, size = self._block(shard, block)
        data = self._request(shard, begin, begin + size)
        if self._cache:
            self._cache.put(shard, block, data)
        return data

    def _block(self, shard: int, block: int) -> tuple[int, int]:
        """Where a block begins in its shard, and its bytes."""
        begin = block * self._request_bytes
        return begin, min(self._request_bytes, self._index.info.shards[shard].bytes - begin)

    def _has(self, shard: int, block: int) -> bool:
        try:
            return self._open(shard, block) is not None
        except OSError:
            return False

    def _open_file(self, shard: int, block: int) -> _File:
        if self._cache and shard < self._kept:
            return _File(self._cache.path(shard, block), *self._block(shard, block))
        if not is_local(self._fs):
            raise FileNotFoundError
        return _File(f"{self._path}/{self._index.info.shards[shard].name}", 0, None)

    def _room(self) -> memoryview:
        """This thread's memory for what has just been read."""
        if not hasattr(self._memory, "room"):
            self._memory.room = np.empty(_ROOM, np.uint8).data
        room: memoryview = self._memory.room
        return room

    def _request(self, shard: int, begin: int, end: int, filling: _Rows | None = None) -> memoryview:
        """Read bytes of a shard from the storage: into rows as they come, or else into new memory."""
        path = f"{self._path}/{self._index.info.shards[shard].name}"
        taking: dict[str, Any] = {"into": self._room(), "taken": filling.take} if filling else {}
        try:
            return read_range(self._fs, path, begin, end, self.patience, **taking)
        except FileNotFoundError:
            raise DataError(f"{self._url(shard)} is gone: restore the shard and run again") from None
        except OSError as error:
            what = " ".join(str(error).split())
            raise DataError(f"{self._url(shard)}: {what}: mend the storage and run again") from None

    def _quarantine(self, spot: Spot) -> None:
        shard, offset, _, sample = spot
        if self._on_corrupt == "fail":
            raise DataError(
                f"{self._url(shard)}: sample {sample} at byte {offset} is damaged (its CRC differs): restore the shard,"
                " or train without such samples (data.on_corrupt=skip)"
            )
        self.quarantined.add(sample)

    def _url(self, shard: int) -> str:
        return full_url(self._fs, f"{self._path}/{self._index.info.shards[shard].name}")
