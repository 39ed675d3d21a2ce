"""The order of samples: a pure function of (shard sizes, streams, batch size, window, seed, batch number).

In epoch e the shards are permuted by (seed, e) and laid end to end: a line of N samples, cut into C segments, one
per stream. A segment has floor(N / C) samples; the r = N mod C extra ones go round robin over streams and epochs, so
that streams never differ by more than one. Within a segment, samples are permuted in windows. Each stream gives B / C
samples to every batch and runs on into its next epoch. Ranks, workers and restarts do not appear here at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ig_dist.errors import ConfigError
from ig_dist.rng import Purpose, permutation


class Stretch(NamedTuple):
    """Samples ``start`` to ``stop`` (exclusive) of one shard."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Consecutive samples of one stream's segment in one epoch, and the order in which they are seen.

    The stream's sample number ``first + k`` is item ``permutation[k]`` of the stretches laid end to end.
    """

    epoch: int
    first: int
    stretches: tuple[Stretch, ...]
    permutation: NDArray[np.int64]

    @property
    def stop(self) -> int:
        """The stream's sample number after the last one of this window."""
        return self.first + len(self.permutation)


class SampleOrder:
    """Which sample stands at which place of which batch.

    Args:
        shard_sizes: samples of each shard, in index order. The id of a sample is its place in that order.
        streams: C.
        global_batch_size: B, a multiple of C.
        window_samples: samples that are shuffled together.
        seed: seed of the run.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int] | NDArray[np.int64],
        *,
        streams: int,
        global_batch_size: int,
        window_samples: int,
        seed: int,
    ) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self._sizes.sum())
        if streams > self.num_samples:
            raise ConfigError(
                f"data.streams {streams} is more than the {self.num_samples} samples of the data:"
                f" use data.streams of at most {self.num_samples}"
            )
        self.streams, self.window_samples, self.seed = streams, window_samples, seed
        self.global_batch_size = global_batch_size
        self.samples_per_stream = global_batch_size // streams
        self._first_id = np.concatenate([[0], np.cumsum(self._sizes)])
        self._layout = lru_cache(maxsize=4)(self._epoch_layout)

    def window(self, stream: int, number: int) -> Window:
        """The window that holds the stream's sample ``number`` (counted from the start of the run)."""
        epoch = number * self.streams // self.num_samples
        while self._samples_before(stream, epoch) > number:
            epoch -= 1
        while self._samples_before(stream, epoch + 1) <= number:
            epoch += 1
        epoch_first = self._samples_before(stream, epoch)
        length = self._samples_before(stream, epoch + 1) - epoch_first
        index = (number - epoch_first) // self.window_samples
        start = index * self.window_samples
        stop = min(start + self.window_samples, length)
        segment = self._segment_start(stream, epoch)
        order = permutation(self.seed, Purpose.WINDOW_ORDER, epoch << 32 | index, stop - start, step=stream)
        return Window(
            epoch=epoch,
            first=epoch_first + start,
            stretches=tuple(self._stretches(epoch, segment + start, segment + stop)),
            permutation=order.numpy(),
        )

    def ids(self, window: Window) -> NDArray[np.int64]:
        """Sample ids of a window, in the order in which they are seen."""
        line = [self._first_id[shard] + np.arange(start, stop) for shard, start, stop in window.stretches]
        return np.concatenate(line)[window.permutation]

    def positions(self, stream: int, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Position in the run, the key of all randomness, of a stream's samples by their number in the stream."""
        per_stream = self.samples_per_stream
        return numbers // per_stream * self.global_batch_size + stream * per_stream + numbers % per_stream

    def batch(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and epochs of global batch ``number``, each (B,): row c B/C + j is sample j of stream c."""
        ids, epochs = list[NDArray[np.int64]](), list[NDArray[np.int64]]()
        for stream in range(self.streams):
            n, stop = number * self.samples_per_stream, (number + 1) * self.samples_per_stream
            while n < stop:
                window = self.window(stream, n)
                ids.append(self.ids(window)[n - window.first :][: stop - n])
                epochs.append(np.full(len(ids[-1]), window.epoch))
                n += len(ids[-1])
        return np.concatenate(ids), np.concatenate(epochs)

    def _samples_before(self, stream: int, epoch: int) -> int:
        """Samples that a stream has had before an epoch begins."""
        whole, extra = divmod(self.num_samples, self.streams)
        return epoch * whole + max(0, -((stream - epoch * extra) // self.streams))

    def _segment_start(self, stream: int, epoch: int) -> int:
        """Where the stream's segment begins on the epoch's line: after those of the streams before it."""
        return sum(self._samples_before(c, epoch + 1) - self._samples_before(c, epoch) for c in range(stream))

    def _epoch_layout(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch's shards in order, and where each begins on the line (one more entry: N)."""
        shards = permutation(self.seed, Purpose.SHARD_ORDER, epoch, len(self._sizes)).numpy()
        return shards, np.concatenate([[0], np.cumsum(self._sizes[shards])])

    def _stretches(self, epoch: int, start: int, stop: int) -> list[Stretch]:
        shards, begins = self._layout(epoch)
        stretches = []
        at = int(np.searchsorted(begins, start, side="right")) - 1
        while start < stop:
            begin, end = int(begins[at]), int(begins[at + 1])
            upto = min(stop, end)
            if upto > start:  # a shard may hold no sample
                stretches.append(Stretch(int(shards[at]), start - begin, upto - begin))
            start, at = upto, at + 1
        return stretches
