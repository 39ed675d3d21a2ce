"""Streaming: from shards to the batches of this rank, in the order that ``order.py`` defines.

Windows are read ahead by threads, a half at a time, as consecutive bytes of shards. Where a disk has them and the
kernel keeps what it reads, that is all: a batch reads its samples out of the kernel's memory, straight into its rows.
Elsewhere they are held, each in the place of one that has been used, so that a stream holds 1.5 windows at most. The
first batch after a start waits for no window: its samples are read each by itself, and all else after it.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ig_dist.data.index import ShardIndex
from ig_dist.data.order import SampleOrder, Window
from ig_dist.data.reader import ShardReader, Spot
from ig_dist.errors import ConfigError, DataError
from ig_dist.rng import Purpose, bernoulli

BATCHES_AHEAD = 2

T = TypeVar("T")

_PARTS = 2  # of a window, each read at once: as many samples are held beyond a window
_LEAST = 2**23  # bytes of a part: in requests for 5 MB the requests are half of the reader's work


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one global batch."""

    latents: Tensor
    """(R, *stored shape), as stored."""
    labels: Tensor
    """(R,) int64."""
    ids: Tensor
    """(R,) int64, ids of the samples."""
    positions: Tensor
    """(R,) int64, position of each row in the run: the key of all its randomness."""
    epochs: Tensor
    """(R,) int64."""

    def split(self, count: int) -> list[Batch]:
        """``count`` micro-batches: consecutive slices of equal length."""
        parts = [getattr(self, field.name).chunk(count) for field in fields(self)]
        return [Batch(*columns) for columns in zip(*parts, strict=True)]


@dataclass
class _Window:
    """A window under way. Its samples are numbered in the order in which they are seen."""

    window: Window
    ids: NDArray[np.int64]  # (n,)
    labels: NDArray[np.int32]  # (n,)
    spots: list[Spot]
    places: list[int]
    """Where in the cursor's memory each is held; -1: it is not, and must be picked."""
    todo: deque[list[int]]
    """Parts that nobody reads yet: samples that lie together in a shard."""
    unread: int
    """Samples of these parts, and of those that are being read."""


class _Part(NamedTuple):
    """A part of a window that is being read."""

    of: _Window
    samples: list[int]
    places: list[int]
    """That are kept for them."""
    good: Future[list[bool] | None]
    """Which of them are; None: they are not held, for the kernel does."""


class _Cursor:
    """A stream's place: the window in use, the one after it, and what is held of both.

    Args:
        reader: reads the samples.
        find: finds the window that holds a sample.
        do: does something, perhaps later.
        number: the stream's first sample.
        memory: (capacity, bytes of a sample); none of it is used before something is held.
    """

    def __init__(
        self,
        reader: ShardReader,
        find: Callable[[int], _Window],
        do: Callable[[Callable[[], Any]], Future[Any]],
        number: int,
        memory: NDArray[np.uint8],
    ) -> None:
        self._reader, self._find, self._do, self._number = reader, find, do, number
        self._windows: deque[_Window] = deque()
        self._next: Future[_Window] | None = do(partial(find, number))
        self._coming: deque[_Part] = deque()
        self.held, self.free = reader.rows(memory), list(range(len(memory)))[::-1]

    def take(self, count: int, *, read: bool) -> Iterator[tuple[_Window, slice]]:
        """Where the next ``count`` samples are: in one or several windows; ``read``: which have been read."""
        while count:
            window = self._in_use(read)
            start = self._number - window.window.first
            taken = min(count, window.window.stop - self._number)
            yield window, slice(start, start + taken)
            self._number, count = self._number + taken, count - taken

    def ahead(self) -> None:
        """Begin to read all that there is room for, of the window in use, then of the next."""
        while self._coming and self._coming[0].good.done():
            self._take_part()
        self._drop_used()
        while True:
            last = self._windows[-1] if self._windows else None
            if last and last.todo:
                if len(last.todo[0]) > len(self.free):
                    return
                samples = last.todo.popleft()
                places = [self.free.pop() for _ in samples]
                self._coming.append(_Part(last, samples, places, self._do(partial(self._read, last, samples, places))))
            elif len(self._windows) < 2:
                self._next = self._next or self._do(partial(self._find, last.window.stop if last else self._number))
                if not self._next.done():
                    return
                self._open_next()
            else:
                return

    def _in_use(self, read: bool) -> _Window:
        self._drop_used()
        if not self._windows:
            self._open_next()
        while read and self._windows[0].unread:
            self.ahead()
            if self._coming:
                self._take_part()
        return self._windows[0]

    def _drop_used(self) -> None:
        while self._windows and self._windows[0].window.stop == self._number:
            self._windows.popleft()

    def _open_next(self) -> None:
        self._windows.append(self._next.result() if self._next else self._find(self._number))
        self._next = None

    def _read(self, window: _Window, samples: list[int], places: list[int]) -> list[bool] | None:
        spots = [window.spots[sample] for sample in samples]
        if self._reader.warm(spots):
            return None
        good: list[bool] = self._reader.read_run(spots, [self.held[place] for place in places]).tolist()
        return good

    def _take_part(self) -> None:
        """Wait for the part that was begun first."""
        window, samples, places, coming = self._coming.popleft()
        good = coming.result()
        used = self._number - window.window.first
        for number, (sample, place) in enumerate(zip(samples, places, strict=True)):
            if good is not None and good[number] and sample >= used:
                window.places[sample] = place
            else:
                self.free.append(place)
        window.unread -= len(samples)


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
        self._stopped = threading.Event()
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(BATCHES_AHEAD)
        self._assembler: threading.Thread | None = None
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="reader") if workers else None

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self.get()) is not None:
            yield batch

    def get(self, timeout_s: float | None = None) -> Batch | None:
        """The next batch; None: it has not come in this time. An error of the reading surfaces here."""
        if self._assembler is None:
            self._assembler = threading.Thread(target=self._assemble, name="batches", daemon=True)
            self._assembler.start()
        try:
            item = self._ready.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            self._ready.put(item)  # nothing else will come, however often one asks
            raise item
        return item

    def close(self) -> None:
        """Stop the threads and drop what they had read.

        Waits for them: a thread that is still inside torch when the interpreter ends aborts the process.
        """
        self._stopped.set()
        self.reader.patience.stop.set()
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._assembler:
            self._assembler.join()

    def _assemble(self) -> None:
        """In a thread of its own: batches, as far ahead as the queue is long."""
        try:
            for batch in self._batches():
                if not self._put(batch):
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: Batch | BaseException) -> bool:
        """Whether there was a place for it before the stop."""
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def _batches(self) -> Iterator[Batch]:
        latent, per_stream = self._index.info.latent, self._order.samples_per_stream
        self._part, capacity = _held(
            self._order.window_samples, self._order.streams, self._order.num_samples, latent.stored_bytes
        )
        streams = [
            _Cursor(
                self.reader,
                partial(self._find, stream),
                self._do,
                self._start * per_stream,
                np.empty((capacity, latent.stored_bytes), np.uint8),
            )
            for stream in self._streams
        ]
        rows = len(streams) * per_stream
        for number in itertools.count(self._start):
            # what goes to the device: pinned, it is copied there while the processor does something else
            tensors = _new((rows, *latent.stored_shape), latent.dtype), _new((rows,), "int64"), _new((rows,), "int64")
            latents, labels, positions = (tensor.numpy() for tensor in tensors)
            ids, epochs = np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.int64)
            memory, picked, row = self.reader.rows(latents), list[tuple[_Window, int, int]](), 0
            for stream in streams:
                # the first batch waits for no window
                for window, part in stream.take(per_stream, read=number > self._start):
                    to = slice(row, row + part.stop - part.start)
                    ids[to], labels[to], epochs[to] = window.ids[part], window.labels[part], window.window.epoch
                    for row, sample in zip(range(to.start, to.stop), range(part.start, part.stop), strict=True):
                        if (place := window.places[sample]) < 0:
                            picked.append((window, sample, row))
                        else:
                            memory[row][:] = stream.held[place]
                            stream.free.append(place)
                    row = to.stop
            found = [window.spots[sample] for window, sample, _ in picked]
            for bad in self.reader.pick(found, [memory[row] for _, _, row in picked]):
                window, sample, row = picked[bad]
                other = self._stand_in(window, sample, memory[row])
                ids[row], labels[row] = window.ids[other], window.labels[other]
            first = number * self._order.global_batch_size + self._streams.start * per_stream
            positions[:] = np.arange(first, first + rows)
            yield Batch(
                latents=tensors[0],
                labels=tensors[1],
                ids=torch.from_numpy(ids),
                positions=tensors[2],
                epochs=torch.from_numpy(epochs),
            )
            for stream in streams:
                stream.ahead()

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
        flips, most = self._flips(stream, window), self._part
        seen = np.argsort(window.permutation)  # of each sample as they lie
        spots, labels, todo, at = list[Spot](), [], deque[list[int]](), 0
        for piece in window.pieces:
            after = at + piece.stop - piece.start
            spots += self.reader.find(*piece, flips[at:after])
            labels.append(self.reader.labels(*piece))
            parts = [seen[start : min(start + most, after)].tolist() for start in range(at, after, most)]
            todo += [left for part in parts if (left := [sample for sample in part if sample >= number - window.first])]
            at = after
        return _Window(
            window,
            self._order.ids(window),
            np.concatenate(labels)[window.permutation],
            [spots[place] for place in window.permutation.tolist()],
            [-1] * at,
            todo,
            sum(map(len, todo)),
        )

    def _stand_in(self, window: _Window, sample: int, row: memoryview) -> int:
        """The next good sample of a window, around, in place of a damaged one."""
        count = len(window.ids)
        for other in (*range(sample + 1, count), *range(sample)):
            if not self.reader.pick([window.spots[other]], [row]):
                return int(other)
        raise DataError(
            f"all {count} samples of a window are damaged, near sample {window.ids[0]}:"
            " restore the shards (ig-dist encode writes them again)"
        )

    def _flips(self, stream: int, window: Window) -> NDArray[np.bool_]:
        """Which samples of the window are wanted mirrored, in the order of its pieces."""
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
