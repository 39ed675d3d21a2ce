"""How far the device has come: the host of a GPU runs ahead of it, and a device that hangs stops all hosts alike."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from ig_dist.training.phases import Now


class Event(Protocol):
    """A place in the device's queue of work, as ``torch.cuda.Event``."""

    def record(self) -> None:
        """Stand at the queue's end; returns at once."""

    def synchronize(self) -> None:
        """Wait, without the interpreter's lock, until the device has come here.

        Raises:
            RuntimeError: the device has failed.
        """


class Marks:
    """Events that the host leaves in the device's queue as it enters phases, and a thread that waits for them in order.

    The thread waits, and nobody for it: asking an event of a device that hangs may not return either, and keeps the
    interpreter's lock meanwhile (``torch.cuda.Event.query`` does). It looks once in ``every_s``, since each look costs
    the loop's thread a moment of that lock.

    Args:
        event: makes one.
        every_s: how often to look.
        stop: ends the thread.
        begin: what the thread does first.
    """

    def __init__(
        self,
        event: Callable[[], Event],
        every_s: float,
        stop: threading.Event,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._event, self._every_s, self._stop, self._begin = event, every_s, stop, begin
        self._free: deque[Event] = deque()
        self._ahead: deque[tuple[Now, Event]] = deque()
        self._reached: Now | None = None
        self._failed = False
        threading.Thread(target=self._follow, name="device's marks", daemon=True).start()

    def put(self, now: Now) -> None:
        """Leave a mark: the host begins this. Costs some microseconds; waits for nothing."""
        if not self._failed:  # the loop meets the error at its next call
            event = self._free.popleft() if self._free else self._event()
            event.record()
            self._ahead.append((now, event))

    @property
    def behind(self) -> Now | None:
        """What the device is in; None: all that the host has entered, or not known."""
        return self._reached if self._ahead else None

    def _follow(self) -> None:
        try:
            self._begin()
            while not self._stop.wait(self._every_s):
                for _ in range(len(self._ahead)):  # no more: a host that stays ahead would be followed mark by mark
                    now, event = self._ahead[0]
                    event.synchronize()
                    self._reached = now
                    self._free.append(self._ahead.popleft()[1])
        except RuntimeError:
            self._failed = True
            self._ahead.clear()


def device_marks(device: torch.device, every_s: float, stop: threading.Event) -> Marks | None:
    """Marks in the queue of a GPU; None: the host does the work itself."""
    if device.type != "cuda":
        return None
    # a thread begins with device 0, and would make a context there: half a gigabyte of it for each rank of a machine
    begin = partial(torch.cuda.set_device, device)
    return Marks(partial(torch.cuda.Event, blocking=True), every_s, stop, begin)  # blocking: the thread does not spin
