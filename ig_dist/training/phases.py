"""What the training loop is doing now and for how long: what the watchdog watches and the goodput ledger adds up.

The host of a GPU runs ahead of it, and a device that hangs stops all hosts alike: marks in its queue say how far it is.
"""

import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

STEP = ("forward", "backward", "optimizer", "log")  # phases that are the training itself; the others stand beside it


class Now(NamedTuple):
    """A moment of a run."""

    entered: int  # phases entered and beats since the start; every rank goes through the same ones in the same order
    phase: str
    step: int  # global batches consumed once the step in progress is done; 0 before the first one
    began: float  # on the monotonic clock


class Phases:
    """The clock of a start. The loop enters phases one after the other; each lasts until the next one is entered.

    It began ``age_s`` ago; None: with the process.
    """

    def __init__(self, age_s: float | None = None) -> None:
        age_s = process_age_s() if age_s is None else age_s
        self.now = Now(0, "start-up", 0, time.monotonic() - age_s)  # replaced whole: other threads read it
        self.began_at = time.time() - age_s  # when the start began, on the wall clock
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Time in phases that have ended, of the ledger's kinds."""
        self.last_warm_up = 0  # the step until which compilation and first-time costs are expected
        self.on_change: Callable[[Now], None] | None = None
        """Called with each phase that is another than the one before."""

    @property
    def warm(self) -> bool:
        """Whether the first step of this start is done."""
        return self.now.step > self.last_warm_up > 0

    def enter(self, phase: str, step: int | None = None) -> None:
        """The phase before ends, this one begins; of ``step`` from here on, if given."""
        self.settle()
        now = self.now
        self.now = Now(now.entered + 1, phase, now.step if step is None else step, now.began)
        if self.on_change is not None and phase != now.phase:
            self.on_change(self.now)

    def settle(self) -> None:
        """Put the time of the phase in progress down in ``seconds``, as far as it has gone; it goes on."""
        now, at = self.now, time.monotonic()
        self.seconds[self._kind(now)] += at - now.began
        self.now = now._replace(began=at)

    def beat(self) -> None:
        """A sign of life in a phase that may last long. To be given by all ranks alike."""
        self.enter(self.now.phase)

    def _kind(self, now: Now) -> str:
        if now.phase not in STEP:
            return now.phase
        return "step" if now.step > self.last_warm_up else "compile"


def process_age_s() -> float:
    """Seconds since this process began: what Python and torch take to load is time of the run too."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError):  # not Linux
        return time.process_time()


class Marks:
    """Events that the host leaves in the device's queue as it enters phases, and a thread that waits for them in order.

    The thread waits, and nobody for it: asking an event of a device that hangs may not return either, and keeps the
    interpreter's lock meanwhile (``torch.cuda.Event.query`` does; ``synchronize`` does not). It looks once in
    ``every_s``, since each look costs the loop's thread a moment of that lock. First of all it calls ``begin``.
    """

    def __init__(
        self, event: Callable[[], Any], every_s: float, stop: threading.Event, begin: Callable[[], None] = lambda: None
    ) -> None:
        self._event, self._every_s, self._stop, self._begin = event, every_s, stop, begin
        self._free: deque[Any] = deque()  # reached: to destroy one asks the driver, which may not answer
        self._ahead: deque[tuple[Now, Any]] = deque()
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
        except RuntimeError:  # the device has failed
            self._failed = True
            self._ahead.clear()


def device_marks(device: torch.device, every_s: float, stop: threading.Event) -> Marks | None:
    """Marks in the queue of a GPU; None: the host does the work itself."""
    if device.type != "cuda":
        return None
    # a thread begins with device 0, and would make a context there: half a gigabyte of it for each rank of a machine
    begin = partial(torch.cuda.set_device, device)
    return Marks(partial(torch.cuda.Event, blocking=True), every_s, stop, begin)  # blocking: the thread does not spin
