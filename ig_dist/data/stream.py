"""Streaming: from shards to the batches of this rank, in the order that ``order.py`` defines.

    stream > window (order.py: what is shuffled) > part (half a window: one read) > sample
    spot: where a sample's bytes lie in a shard; place: where they are held in memory; cursor: where a stream is

Windows are read ahead by threads, a half at a time, as consecutive bytes of shards. Where a disk has them and the
kernel keeps what it reads, that is all: a batch reads its samples out of the kernel's memory, straight into its rows.
Elsewhere they are held, each in the place of one that has been used, so that a stream holds 1.5 windows at most. The
first batch after a start waits for no window: its samples are read each by itself, and all else after it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ig_dist.data.index import ShardIndex
from ig_dist.data.order import SampleOrder, Window
from ig_dist.data.reader import SPOT, ShardReader, Spots
from ig_dist.errors import ConfigError, DataError
from ig_dist.rng import Purpose, bernoulli

BATCHES_AHEAD = 2

T = TypeVar("T")

_PARTS = 2  # of a window, each read at once: as many samples are held beyond a window
_LEAST = 2**23  # bytes of a part: in requests for 5 MB the requests are half of the reader's work


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one global batch."""

    latents: Tensor  # (R, *stored shape), as stored
    labels: Tensor  # (R,) int64
    ids: Tensor  # (R,) int64, ids of the samples
    positions: Tensor  # (R,) int64, position of each row in the run: the key of all its randomness
    epochs: Tensor  # (R,) int64

    def split(self, count: int) -> list[Batch]:
        """``count`` micro-batches: consecutive slices of equal length."""
        parts = [getattr(self, field.name).chunk(count) for field in fields(self)]
        return [Batch(*columns) for columns in zip(*parts, strict=True)]


@dataclass
class _Window:
    """A window under way. Its samples are numbered in the order in which they are seen."""

    window: Window
    spots: Spots  # (n,); "place": where in the cursor's memory each is held; -1: it is not, and must be picked
    todo: deque[NDArray[np.int64]]  # parts that nobody reads yet: samples that lie together in a shard


class _Part(NamedTuple):
    """A part of a window that is being read."""

    of: _Window
    samples: NDArray[np.int64]
    places: list[int]  # that are kept for them
    good: Future[NDArray[np.bool_] | None]  # which of them are; None: they are not held, for the kernel does


class _Cursor:
    """A stream's place: the window in use, the one after it, and what is held of both.

    Samples are given out (``number``) <= held ("place") <= being read (``coming``) <= found (``windows``).
    ``find`` finds the window that holds a sample, ``do`` runs a function in a reader thread. ``capacity`` samples may
    be held, whose memory is not used before.
    """

    def __init__(
        self,
        reader: ShardReader,
        find: Callable[[int], _Window],
        do: Callable[[Callable[[], Any]], Future[Any]],
        number: int,
        capacity: int,
    ) -> None:
        self._reader, self._find, self._do, self._number = reader, find, do, number
        self._windows: deque[Future[_Window]] = deque([do(partial(find, number))])
        self._coming: deque[_Part] = deque()
        self._memory = np.empty((capacity, reader.sample_bytes), np.uint8)
        self._rows, self._free = reader.rows(self._memory), list(range(capacity))

    def take(self, spots: Spots, rows: NDArray[np.uint8], *, read: bool) -> None:
        """The spots of the next samples; of those that are held the bytes, (n, bytes), and they are held no longer.

        ``read``: it waits until the windows that they are in have been read.
        """
        row = 0
        while row < len(spots):
            window = self._in_use()
            while read and (window.todo or any(part.of is window for part in self._coming)):
                self.ahead()
                if self._coming:
                    self._take_part()
            here = window.spots[self._number - window.window.first :][: len(spots) - row]
            to = slice(row, row + len(here))
            spots[to], places = here, here["place"]
            held = places >= 0
            if held.any():
                np.take(self._memory, places, axis=0, out=rows[to], mode="clip")  # what is not held is yet to come
                self._free += places[held].tolist()
            self._number, row = self._number + len(here), to.stop

    def ahead(self) -> None:
        """Begin to read all that there is room for, of the window in use, then of the next."""
        while self._coming and self._coming[0].good.done():
            self._take_part()
        window = self._in_use()
        if self._begin(window):
            if len(self._windows) == 1:
                self._windows.append(self._do(partial(self._find, window.window.stop)))
            if self._windows[1].done():
                self._begin(self._windows[1].result())

    def _begin(self, window: _Window) -> bool:
        """Begin to read the parts of a window that there is room for; whether these are all."""
        while window.todo and len(window.todo[0]) <= len(self._free):
            samples = window.todo.popleft()
            places, self._free = self._free[: len(samples)], self._free[len(samples) :]
            self._coming.append(_Part(window, samples, places, self._do(partial(self._read, window, samples, places))))
        return not window.todo

    def _in_use(self) -> _Window:
        """The window that holds the next sample."""
        if self._windows[0].result().window.stop == self._number:
            self._windows.popleft()
            if not self._windows:
                self._windows.append(self._do(partial(self._find, self._number)))
        return self._windows[0].result()

    def _read(self, window: _Window, samples: NDArray[np.int64], places: list[int]) -> NDArray[np.bool_] | None:
        spots = window.spots[samples]
        return None if self._reader.warm(spots) else self._reader.read_run(spots, [self._rows[n] for n in places])

    def _take_part(self) -> None:
        """Wait for the part that was begun first."""
        window, samples, places, coming = self._coming.popleft()
        good, kept = coming.result(), np.array(places)
        holds = np.zeros(len(samples), bool) if good is None else good & (samples >= self._number - window.window.first)
        window.spots["place"][samples[holds]] = kept[holds]
        self._free += kept[~holds].tolist()


class BatchStream:
    """Iterates over this rank's batches from a given global batch on, for ever.

    Args:
        index: the opened shard index.
        order: the order of samples.
        rank: this process; it owns C / world_size consecutive streams.
        world_size: number of processes, divides the number of streams.
        start: first global batch.
        workers: threads that read ahead; 0: the thread that assembles batches does. The batches do not depend on it.
        reader: reads the samples. Where it skips a damaged one (``on_corrupt="skip"``), the next good sample of the
            window fills the place.
        flip: give each sample mirrored or not, by a fair draw keyed by its position; the shards must hold both.
    """

    def __init__(
        self,
        index: ShardIndex,
        order: SampleOrder,
        *,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        workers: int = 0,
        reader: ShardReader | None = None,
        flip: bool = False,
    ) -> None:
        self._index, self._order, self._start, self._flip = index, order, start, flip
        self.reader = reader or ShardReader(index)
        per_rank = order.streams // world_size
        self._streams = range(rank * per_rank, (rank + 1) * per_rank)
        self._ready: deque[Future[Batch]] = deque()
        self._to_come = self._batches()
        self._assembler = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="reader") if workers else None

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self.get()) is not None:
            yield batch

    def get(self, timeout_s: float | None = None) -> Batch | None:
        """The next batch; None: it has not come in this time. An error of the reading surfaces here, at each call."""
        while len(self._ready) <= BATCHES_AHEAD:
            self._ready.append(self._assembler.submit(next, self._to_come))
        if not wait(list(self._ready)[:1], timeout_s).done:
            return None
        batch = self._ready[0].result()
        self._ready.popleft()
        return batch

    def close(self) -> None:
        """Stop the threads and drop what they had read.

        Waits for them: a thread that is still inside torch when the interpreter ends aborts the process.
        """
        self.reader.patience.stop.set()
        for threads in (self._pool, self._assembler):
            if threads:
                threads.shutdown(cancel_futures=True)

    def _batches(self) -> Iterator[Batch]:
        latent, per_stream = self._index.info.latent, self._order.samples_per_stream
        self._part, capacity = _held(
            self._order.window_samples, self._order.streams, self._order.num_samples, latent.stored_bytes
        )
        begin = self._start * per_stream
        cursors = [_Cursor(self.reader, partial(self._find, one), self._do, begin, capacity) for one in self._streams]
        rows = len(cursors) * per_stream
        for number in itertools.count(self._start):
            # what goes to the device: pinned, it is copied there while the processor does something else
            tensors = _new((rows, *latent.stored_shape), latent.dtype), _new((rows,), "int64"), _new((rows,), "int64")
            latents, labels, positions = (tensor.numpy() for tensor in tensors)
            stored, memory = latents.view(np.uint8).reshape(rows, -1), self.reader.rows(latents)
            spots = np.empty(rows, SPOT)
            for row, cursor in zip(range(0, rows, per_stream), cursors, strict=True):
                mine = slice(row, row + per_stream)
                cursor.take(spots[mine], stored[mine], read=number > self._start)  # the first batch waits for no window
            picked = np.flatnonzero(spots["place"] < 0).tolist()
            damaged = self.reader.pick(spots[picked], [memory[row] for row in picked])
            for bad in (picked[which] for which in damaged):
                stream, sample = divmod(bad, per_stream)
                spots[bad] = self._stand_in(self._streams[stream], number * per_stream + sample, memory[bad])
            labels[:] = spots["label"]
            first = number * self._order.global_batch_size + self._streams.start * per_stream
            positions[:] = np.arange(first, first + rows)
            yield Batch(
                latents=tensors[0],
                labels=tensors[1],
                ids=torch.from_numpy(spots["id"].copy()),
                positions=tensors[2],
                epochs=torch.from_numpy(spots["epoch"].copy()),
            )
            for cursor in cursors:
                cursor.ahead()

    def _do(self, work: Callable[[], T]) -> Future[T]:
        """Do something in a reader thread; without these, at once."""
        if self._pool is not None:
            return self._pool.submit(work)
        future: Future[T] = Future()
        future.set_result(work())
        return future

    def _find(self, stream: int, number: int) -> _Window:
        """The window that holds a stream's sample, of which it and those after it are wanted."""
        window = self._order.window(stream, number)
        flips, seen = self._flips(stream, window), np.argsort(window.permutation)  # of each sample as they lie
        spots, todo, at = list[Spots](), deque[NDArray[np.int64]](), 0
        for stretch in window.stretches:
            lie = seen[at : at + stretch.stop - stretch.start]
            spots.append(self.reader.find(*stretch, flips[at : at + len(lie)]))
            parts = (lie[start : start + self._part] for start in range(0, len(lie), self._part))
            todo += [left for part in parts if len(left := part[part >= number - window.first])]
            at += len(lie)
        in_order = np.concatenate(spots)[window.permutation]
        in_order["epoch"], in_order["place"] = window.epoch, -1
        return _Window(window, in_order, todo)

    def _stand_in(self, stream: int, number: int, row: memoryview) -> Any:
        """In place of a damaged sample of a stream: the spot of the next good one of its window, around."""
        window = self._find(stream, number)
        count, sample = len(window.spots), number - window.window.first
        for other in (*range(sample + 1, count), *range(sample)):
            if not len(self.reader.pick(window.spots[[other]], [row])):
                return window.spots[other]
        raise DataError(
            f"all {count} samples of a window are damaged, near sample {window.spots['id'][0]}:"
            " restore the shards (ig-dist encode writes them again)"
        )

    def _flips(self, stream: int, window: Window) -> NDArray[np.bool_]:
        """Which samples of the window are wanted mirrored, in the order of its stretches."""
        flips = np.zeros(len(window.permutation), dtype=bool)
        if self._flip:
            positions = self._order.positions(stream, np.arange(window.first, window.stop))
            flips[window.permutation] = bernoulli(self._order.seed, Purpose.FLIP, torch.from_numpy(positions), 0.5)
        return flips


def _new(shape: tuple[int, ...], dtype: str) -> Tensor:
    """A tensor that is to be filled, pinned where there is a GPU.

    The pinned tensor itself must go to the device, not one made of an array on it: its memory is used again as soon as
    no copy is under way that began from it.
    """
    if torch.cuda.is_available():
        return torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=True)
    return torch.from_numpy(np.empty(shape, dtype))  # numpy asks for huge pages, torch does not


def _held(window_samples: int, streams: int, samples: int, sample_bytes: int) -> tuple[int, int]:
    """Samples of a part of a window, and those that a stream holds at most."""
    window = min(window_samples, -(-samples // streams))
    part = min(window, max(-(-window // _PARTS), -(-_LEAST // sample_bytes)))
    return part, window + part


def check_window_memory(index: ShardIndex, *, streams: int, window_samples: int, window_bytes: int, nodes: int) -> None:
    """Raise ConfigError when what the streams of a node hold, or the kernel for them, exceeds the bound."""
    per_sample, on_node = index.info.latent.stored_bytes, -(-streams // nodes)
    need = on_node * per_sample * _held(window_samples, streams, index.num_samples, per_sample)[1]
    if need > window_bytes:
        fits = max(1, window_bytes // (2 * on_node * per_sample))
        raise ConfigError(
            f"data.window_samples {window_samples} needs {need / 2**20:.0f} MiB a node, data.window_bytes allows"
            f" {window_bytes / 2**20:.0f}: use data.window_samples={fits} or data.window_bytes={need}"
        )
