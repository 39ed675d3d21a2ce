"""Ranks that are slower than the others: by the time of what each of them does alone.

The steps of all ranks take the same time, since they wait for each other in the collectives.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

SLOW, COSTLY = 1.5, 0.1
IN_A_ROW = 2


class OwnWork:
    """The time of this rank's own work: on a GPU between events, which nothing waits for until it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts what is done inside; no collective may be among it."""
        if not self._on_gpu:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        yield
        end.record()
        self._events.append((begin, end))

    def take(self) -> float:
        """Seconds since the last call. Waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
        seconds = self._seconds + sum(float(begin.elapsed_time(end)) for begin, end in self._events) / 1e3
        self._seconds, self._events = 0.0, []
        return seconds


class Slowest(NamedTuple):
    """The slowest rank of some steps."""

    rank: int
    ratio: float
    """Its own work's time over the median rank's."""
    cost: float
    """By how much it makes all steps longer, as a share of them."""


def slowest(own: Sequence[float], elapsed: float) -> Slowest:
    """The slowest of all ranks.

    Args:
        own: seconds of each rank's own work.
        elapsed: seconds of all the steps.
    """
    rank = max(range(len(own)), key=own.__getitem__)
    middle = statistics.median_low(own)
    return Slowest(rank, own[rank] / middle if middle else 1.0, (own[rank] - middle) / elapsed)


class Watch:
    """Says once of a rank that it is slow: when it was in two lines of metrics in a row, and matters."""

    def __init__(self) -> None:
        self._rank, self._times = -1, 0

    def sees(self, found: Slowest) -> bool:
        """Whether to say it now."""
        if found.ratio < SLOW or found.cost < COSTLY:
            self._times = 0
        else:
            self._times = self._times + 1 if found.rank == self._rank else 1
        self._rank = found.rank
        return self._times == IN_A_ROW
