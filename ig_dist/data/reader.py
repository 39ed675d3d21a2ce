"""Reading samples of a shard by byte range, checked: from storage or the node's cache, under retries and deadlines."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from ig_dist.data.cache import BlockCache
from ig_dist.data.index import ShardIndex
from ig_dist.errors import DataError
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import REQUEST_BYTES, open_url, read_range
from ig_dist.storage.urls import full_url

Samples = NDArray[Any]

_READ_AGAIN = 3


class _Rows:
    """Rows of an array that are filled from the bytes of a request, in order, as these arrive.

    What has just arrived is still in the processor's cache, and the storage sends the next part meanwhile.
    """

    def __init__(self, offsets: list[int], places: list[int], out: NDArray[np.uint8]) -> None:
        self._todo = zip(offsets, places, strict=True)
        self._next = next(self._todo, None)
        self._out, self._size = out, out.shape[1]
        self.crcs: list[int] = []

    def fill(self, data: memoryview, arrived: int) -> None:
        """Copy the samples that are whole, and take their CRCs."""
        raw = np.frombuffer(data, np.uint8)
        while self._next and self._next[0] + self._size <= arrived:
            at, place = self._next
            sample = raw[at : at + self._size]
            self.crcs.append(zlib_ng.crc32(sample.data))
            self._out[place] = sample
            self._next = next(self._todo, None)


class ShardReader:
    """Reads consecutive samples of a shard with few ranged reads. Safe to call from several threads.

    Args:
        index: the opened shard index.
        on_corrupt: ``fail`` raises DataError at a damaged sample; ``skip`` marks and remembers it.
        patience: how long faults of the storage are borne.
        cache: the node's cache, if any.
        request_bytes: the most that is read, and held, at once; a single sample may be larger.
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
        table = index.table
        self._first_id = np.concatenate([[0], np.cumsum(index.shard_sizes)])
        # where a sample begins and ends, both of its latents
        flips = table.offset if table.flip_offset is None else table.flip_offset
        self._begins = np.minimum(table.offset, flips)
        self._ends = np.maximum(table.offset, flips) + self._size
        self._request_bytes = request_bytes
        self._blocks: dict[int, list[range]] = {}  # of shards that the cache keeps
        self._memory = threading.local()  # new memory for each request would cost the kernel as much as the reading

    def read(
        self,
        shard: int,
        start: int,
        stop: int,
        *,
        flipped: NDArray[np.bool_] | None = None,
        out: Samples | None = None,
        places: NDArray[np.int64] | None = None,
    ) -> tuple[Samples, NDArray[np.bool_]]:
        """Samples ``start`` to ``stop`` (exclusive) of a shard, and which of them are good.

        Args:
            shard: number of the shard.
            start: first sample.
            stop: sample after the last.
            flipped: (stop - start,), which samples are wanted mirrored; None: none.
            out: (n, *stored shape), C-contiguous, where to put them; None: a new array of stop - start.
            places: (stop - start,), the row of ``out`` for each sample; None: in order.

        Returns:
            ``out``, and (stop - start,) bool: False for a damaged sample, whose row is undefined.

        Raises:
            DataError: the shard is gone, the storage fails beyond the deadline, or a sample is damaged and
                ``on_corrupt`` is ``fail``.
        """
        count = stop - start
        flips = np.zeros(count, dtype=bool) if flipped is None else flipped
        rows = np.empty((count, *self._shape), self._dtype) if out is None else out
        to = np.arange(count) if places is None else places
        good = np.empty(count, dtype=bool)
        for part in self._parts(shard, start, stop):
            wanted = range(max(part.start, start), min(part.stop, stop))
            here = slice(wanted.start - start, wanted.stop - start)
            good[here] = self._fetch(shard, part, wanted, flips[here], rows, to[here])
            for _ in range(_READ_AGAIN):
                # it may have suffered on the way, or in the cache; what was good stays
                bad = np.flatnonzero(~good[here])
                if not len(bad):
                    break
                again = self._fetch(shard, part, wanted, flips[here], rows, to[here], only=bad)
                good[here.start + bad] = again
            for i in np.flatnonzero(~good[here]):
                self._quarantine(shard, wanted[i])
        return rows, good

    def read_ids(self, start: int, stop: int) -> tuple[Samples, NDArray[np.bool_]]:
        """Samples of consecutive ids, ``start`` to ``stop`` (exclusive), of one shard or several; as ``read``."""
        rows, good = np.empty((stop - start, *self._shape), self._dtype), np.empty(stop - start, dtype=bool)
        for shard in range(len(self._index.shard_sizes)):
            first, after = max(start, int(self._first_id[shard])), min(stop, int(self._first_id[shard + 1]))
            if first < after:
                places, begin = np.arange(first - start, after - start), int(self._first_id[shard])
                good[places] = self.read(shard, first - begin, after - begin, out=rows, places=places)[1]
        return rows, good

    def _parts(self, shard: int, start: int, stop: int) -> Iterator[range]:
        """The samples that are read at once: exactly those asked for, or whole blocks where the cache keeps them."""
        if not (self._cache and self._cache.holds(shard)):
            yield from self._cut(shard, start, stop)
            return
        if shard not in self._blocks:
            self._blocks[shard] = list(self._cut(shard, 0, self._index.shard_sizes[shard]))
        yield from (block for block in self._blocks[shard] if block.start < stop and block.stop > start)

    def _cut(self, shard: int, start: int, stop: int) -> Iterator[range]:
        """Consecutive samples whose bytes fit into one request, with whatever lies between them in the shard."""
        rows = slice(self._first_id[shard] + start, self._first_id[shard] + stop)
        begins = np.minimum.accumulate(self._begins[rows][::-1])[::-1]  # of it and all after it
        ends = np.maximum.accumulate(self._ends[rows])
        first = 0
        while first < len(ends):
            fits = int(np.searchsorted(ends, begins[first] + self._request_bytes, side="right"))
            after = max(first + 1, fits)
            yield range(start + first, start + after)
            first = after

    def _fetch(
        self,
        shard: int,
        part: range,
        wanted: range,
        flips: NDArray[np.bool_],
        out: Samples,
        places: NDArray[np.int64],
        only: NDArray[np.int64] | None = None,
    ) -> NDArray[np.bool_]:
        """Read a part of a shard and put its wanted samples into their places; which of them have the right CRC.

        ``only``: those of the wanted that are read once more, not from the cache.
        """
        table, chosen = self._index.table, np.arange(len(wanted)) if only is None else only
        ids, flips = int(self._first_id[shard]) + wanted.start + chosen, flips[chosen]
        offsets, crcs = table.offset[ids], table.crc32[ids]
        if table.flip_offset is not None and table.flip_crc32 is not None:
            offsets = np.where(flips, table.flip_offset[ids], offsets)
            crcs = np.where(flips, table.flip_crc32[ids], crcs)
        span = slice(self._first_id[shard] + part.start, self._first_id[shard] + part.stop)
        begin, end = int(self._begins[span].min()), int(self._ends[span].max())
        to = out.view(np.uint8).reshape(len(out), self._size)
        filling = _Rows((offsets - begin).tolist(), places[chosen].tolist(), to)

        cache = self._cache if self._cache and self._cache.holds(shard) else None
        if cache and only is not None:
            cache.drop(shard, part.start)
        kept = cache.get(shard, part.start, end - begin) if cache else None
        if kept is not None:
            filling.fill(kept, len(kept))
        else:
            data = self._request(shard, begin, end, filling)
            if cache:
                cache.put(shard, part.start, data)
        return np.asarray(np.array(filling.crcs, np.uint32) == crcs)

    def _request(self, shard: int, begin: int, end: int, filling: _Rows) -> memoryview:
        """Read bytes of a shard into this thread's memory, where they stay until its next request."""
        if not hasattr(self._memory, "buffer") or len(self._memory.buffer) < end - begin:
            self._memory.buffer = np.empty(end - begin, np.uint8).data
        path = f"{self._path}/{self._index.info.shards[shard].name}"
        try:
            return read_range(self._fs, path, begin, end, self.patience, into=self._memory.buffer, arrived=filling.fill)
        except FileNotFoundError:
            raise DataError(f"{self._url(shard)} is gone: restore the shard and run again") from None
        except OSError as error:
            what = " ".join(str(error).split())
            raise DataError(f"{self._url(shard)}: {what}: mend the storage and run again") from None

    def _quarantine(self, shard: int, number: int) -> None:
        sample = int(self._first_id[shard]) + number
        if self._on_corrupt == "fail":
            raise DataError(
                f"{self._url(shard)}: sample {sample} at byte {self._index.table.offset[sample]} is damaged (its CRC"
                " differs): restore the shard, or train without such samples (data.on_corrupt=skip)"
            )
        self.quarantined.add(sample)

    def _url(self, shard: int) -> str:
        return full_url(self._fs, f"{self._path}/{self._index.info.shards[shard].name}")
