"""What the training loop is doing now and for how long: what the watchdog watches and the goodput ledger adds up."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

STEP = ("forward", "backward", "optimizer", "log")
"""Phases that are the training itself; the others stand beside it."""


class Now(NamedTuple):
    """A moment of a run."""

    entered: int
    """Phases entered and beats since the start; every rank goes through the same ones in the same order."""
    phase: str
    step: int
    """Global batches consumed once the step in progress is done; 0 before the first one."""
    began: float
    """On the monotonic clock."""


class Phases:
    """The clock of a start. The loop enters phases one after the other; each lasts until the next one is entered.

    Args:
        age_s: seconds since the start began; None: it began with the process.
    """

    def __init__(self, age_s: float | None = None) -> None:
        age_s = process_age_s() if age_s is None else age_s
        self.now = Now(0, "start-up", 0, time.monotonic() - age_s)  # replaced whole: other threads read it
        self.began_at = time.time() - age_s
        """When the start began, on the wall clock."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Time in phases that have ended, of the ledger's kinds."""
        self.last_warm_up = 0
        """The step until which compilation and first-time costs are expected."""
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
