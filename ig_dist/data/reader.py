"""Reading samples of a shard by byte range, checked: from storage or the node's cache, under retries and deadlines."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from ig_dist.data.cache import BlockCache
from ig_dist.data.index import SampleTable, ShardIndex
from ig_dist.errors import DataError
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import REQUEST_BYTES, open_url, read_range
from ig_dist.storage.urls import full_url

Samples = NDArray[Any]

_READ_AGAIN = 3
_SHARDS_CUT = 256  # whose blocks are remembered


class _Part(NamedTuple):
    """Consecutive samples of a shard that are read at once, and the bytes that hold them."""

    start: int
    stop: int
    begin: int
    end: int


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
        self.table = index.table.under(self.patience)
        """That of the index, read under the same patience."""
        self._first_id = index.first_ids
        self._request_bytes = request_bytes
        self._blocks = lru_cache(_SHARDS_CUT)(self._cut_shard)  # of shards that the cache keeps
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
        table = self._rows(shard, start, stop)
        parts = self._cut(table, start)
        if self._cache and self._cache.holds(shard):  # it keeps whole blocks
            parts = (block for block in self._blocks(shard) if block.start < stop and block.stop > start)
        for part in parts:
            wanted = range(max(part.start, start), min(part.stop, stop))
            here = slice(wanted.start - start, wanted.stop - start)
            good[here] = self._fetch(shard, part, table[here], flips[here], rows, to[here])
            for _ in range(_READ_AGAIN):
                # it may have suffered on the way, or in the cache; what was good stays
                bad = np.flatnonzero(~good[here])
                if not len(bad):
                    break
                again = self._fetch(shard, part, table[here], flips[here], rows, to[here], only=bad)
                good[here.start + bad] = again
            for i in np.flatnonzero(~good[here]):
                self._quarantine(shard, wanted[i])
        return rows, good

    def labels(self, shard: int, start: int, stop: int) -> NDArray[np.int32]:
        """Labels of samples ``start`` to ``stop`` (exclusive) of a shard."""
        first = int(self._first_id[shard])
        labels: NDArray[np.int32] = self.table.label[first + start : first + stop]
        return labels

    def read_ids(self, start: int, stop: int) -> tuple[Samples, NDArray[np.bool_]]:
        """Samples of consecutive ids, ``start`` to ``stop`` (exclusive), of one shard or several; as ``read``."""
        rows, good = np.empty((stop - start, *self._shape), self._dtype), np.empty(stop - start, dtype=bool)
        at = start
        while at < stop:
            shard = int(np.searchsorted(self._first_id, at, side="right")) - 1
            begin, after = int(self._first_id[shard]), min(stop, int(self._first_id[shard + 1]))
            places = np.arange(at - start, after - start)
            good[places] = self.read(shard, at - begin, after - begin, out=rows, places=places)[1]
            at = after
        return rows, good

    def _rows(self, shard: int, start: int, stop: int) -> SampleTable:
        """Rows of the table, of samples ``start`` to ``stop`` (exclusive) of a shard."""
        first = int(self._first_id[shard])
        return self.table[first + start : first + stop]

    def _cut_shard(self, shard: int) -> list[_Part]:
        return list(self._cut(self._rows(shard, 0, int(self._index.shard_sizes[shard])), 0))

    def _cut(self, table: SampleTable, start: int) -> Iterator[_Part]:
        """Consecutive samples, from ``start`` on, whose bytes fit into one request, with whatever lies between them."""
        offsets = np.asarray(table.offset)
        flips = offsets if table.flip_offset is None else np.asarray(table.flip_offset)
        # where a sample begins and ends, both of its latents
        begins, ends = np.minimum(offsets, flips), np.maximum(offsets, flips) + self._size
        lowest = np.minimum.accumulate(begins[::-1])[::-1]  # of it and all after it
        highest = np.maximum.accumulate(ends)
        first = 0
        while first < len(ends):
            fits = int(np.searchsorted(highest, lowest[first] + self._request_bytes, side="right"))
            after = max(first + 1, fits)
            span = slice(first, after)
            yield _Part(start + first, start + after, int(begins[span].min()), int(ends[span].max()))
            first = after

    def _fetch(
        self,
        shard: int,
        part: _Part,
        table: SampleTable,
        flips: NDArray[np.bool_],
        out: Samples,
        places: NDArray[np.int64],
        only: NDArray[np.int64] | None = None,
    ) -> NDArray[np.bool_]:
        """Read a part of a shard and put its wanted samples into their places; which of them have the right CRC.

        ``table``: rows of the wanted. ``only``: those of them that are read once more, not from the cache.
        """
        chosen = np.arange(len(table)) if only is None else only
        flips, offsets, crcs = flips[chosen], table.offset[chosen], table.crc32[chosen]
        if table.flip_offset is not None and table.flip_crc32 is not None:
            offsets = np.where(flips, table.flip_offset[chosen], offsets)
            crcs = np.where(flips, table.flip_crc32[chosen], crcs)
        to = out.view(np.uint8).reshape(len(out), self._size)
        filling = _Rows((offsets - part.begin).tolist(), places[chosen].tolist(), to)

        cache = self._cache if self._cache and self._cache.holds(shard) else None
        if cache and only is not None:
            cache.drop(shard, part.start)
        kept = cache.get(shard, part.start, part.end - part.begin) if cache else None
        if kept is not None:
            filling.fill(kept, len(kept))
        else:
            data = self._request(shard, part.begin, part.end, filling)
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
                f"{self._url(shard)}: sample {sample} at byte {self.table.offset[sample]} is damaged (its CRC"
                " differs): restore the shard, or train without such samples (data.on_corrupt=skip)"
            )
        self.quarantined.add(sample)

    def _url(self, shard: int) -> str:
        return full_url(self._fs, f"{self._path}/{self._index.info.shards[shard].name}")
