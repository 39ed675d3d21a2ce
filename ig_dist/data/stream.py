"""Streaming: from shards to the batches of this rank, in the order that ``order.py`` defines.

A window is read with few ranged reads, and its samples are copied once, in the order in which they are seen, so that a
batch takes a slice of each stream's window. Reader threads (reading, CRC and copying release the GIL) run ahead of the
training loop; what they run ahead is dropped at a stop, and a restart reads at most one window per stream again.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ig_dist.data.index import ShardIndex
from ig_dist.data.order import SampleOrder, Window
from ig_dist.data.reader import ShardReader
from ig_dist.errors import ConfigError, DataError
from ig_dist.rng import Purpose, bernoulli

BATCHES_AHEAD = 2


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


@dataclass(frozen=True)
class _LoadedWindow:
    """A window's samples in the order in which they are seen."""

    window: Window
    latents: NDArray[Any]  # (n, *stored shape)
    ids: NDArray[np.int64]  # (n,)
    labels: NDArray[np.int32]  # (n,)


class _Cursor:
    """A stream's place: the window in use, and the next one under way.

    Args:
        fetch: begins to read the window that holds a sample, and returns what waits for it.
        number: the stream's first sample.
    """

    def __init__(self, fetch: Callable[[int], Callable[[], _LoadedWindow]], number: int) -> None:
        self._fetch, self._number = fetch, number
        self._following = fetch(number)
        self._loaded: _LoadedWindow | None = None

    def take(self, count: int) -> Iterator[tuple[_LoadedWindow, slice]]:
        """Where the next ``count`` samples are: slices of one or several windows."""
        while count:
            loaded = self._loaded
            if loaded is None or self._number == loaded.window.stop:
                self._loaded = loaded = None  # its memory is free before the next window is read
                self._loaded = loaded = self._following()
                self._following = self._fetch(loaded.window.stop)
            start = self._number - loaded.window.first
            taken = min(count, loaded.window.stop - self._number)
            yield loaded, slice(start, start + taken)
            self._number, count = self._number + taken, count - taken


class BatchStream:
    """Iterates over this rank's batches from a given global batch on, for ever.

    Args:
        index: the opened shard index.
        order: the order of samples.
        rank: this process; it owns C / world_size consecutive streams.
        world_size: number of processes, divides the number of streams.
        start: first global batch.
        workers: reader threads; 0: the thread that assembles the batches reads too. The batches do not depend on it.
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
        per_stream = self._order.samples_per_stream
        streams = [_Cursor(partial(self._fetch, stream), self._start * per_stream) for stream in self._streams]
        rows = len(streams) * per_stream
        number = self._start
        shape, dtype = (rows, *self._index.info.latent.stored_shape), self._index.info.latent.dtype
        while True:
            # what goes to the device: pinned, it is copied there while the processor does something else
            tensors = _new(shape, dtype), _new((rows,), "int64"), _new((rows,), "int64")
            latents, labels, positions = (tensor.numpy() for tensor in tensors)
            ids, epochs = np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.int64)
            row = 0
            for stream in streams:
                for loaded, part in stream.take(per_stream):
                    to = slice(row, row + part.stop - part.start)
                    latents[to], labels[to] = loaded.latents[part], loaded.labels[part]
                    ids[to], epochs[to] = loaded.ids[part], loaded.window.epoch
                    row = to.stop
            first = number * self._order.global_batch_size + self._streams.start * per_stream
            positions[:] = np.arange(first, first + rows)
            yield Batch(
                latents=tensors[0],
                labels=tensors[1],
                ids=torch.from_numpy(ids),
                positions=tensors[2],
                epochs=torch.from_numpy(epochs),
            )
            number += 1

    def _fetch(self, stream: int, number: int) -> Callable[[], _LoadedWindow]:
        """Begin to read a window; the call of what is returned waits for it (without threads: reads it)."""
        if self._pool is None:
            return partial(self._load, stream, number)
        return self._pool.submit(self._load, stream, number).result

    def _load(self, stream: int, number: int) -> _LoadedWindow:
        window = self._order.window(stream, number)
        ids = self._order.ids(window)
        flips = self._flips(stream, window)
        count = len(ids)
        latents = np.empty((count, *self._index.info.latent.stored_shape), self._index.info.latent.dtype)
        places, good = np.empty(count, np.int64), np.empty(count, dtype=bool)
        labels = np.empty(count, np.int32)
        places[window.permutation] = np.arange(count)
        at = 0
        for piece in window.pieces:
            here = slice(at, at + piece.stop - piece.start)
            good[places[here]] = self.reader.read(*piece, flipped=flips[here], out=latents, places=places[here])[1]
            labels[places[here]] = self.reader.labels(*piece)
            at = here.stop
        if not good.all():
            whole = np.flatnonzero(good)
            if not len(whole):
                raise DataError(
                    f"all {count} samples of a window are damaged, near sample {ids[0]}:"
                    " restore the shards (ig-dist encode writes them again)"
                )
            stand_in = whole[np.searchsorted(whole, np.arange(count)) % len(whole)]  # the next good one, around
            latents, ids, labels = latents[stand_in], ids[stand_in], labels[stand_in]
        return _LoadedWindow(window, latents, ids, labels)

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


def check_window_memory(index: ShardIndex, *, streams: int, window_samples: int, window_bytes: int, nodes: int) -> None:
    """Raise ConfigError when two windows (in use, read ahead) of every stream of a node exceed the bound."""
    per_sample = index.info.latent.stored_bytes
    on_node = -(-streams // nodes)
    need = 2 * on_node * min(window_samples, -(-index.num_samples // streams)) * per_sample
    if need > window_bytes:
        fits = max(1, window_bytes // (2 * on_node * per_sample))
        raise ConfigError(
            f"data.window_samples {window_samples} needs {need / 2**20:.0f} MiB a node, data.window_bytes allows"
            f" {window_bytes / 2**20:.0f}: use data.window_samples={fits} or data.window_bytes={need}"
        )
