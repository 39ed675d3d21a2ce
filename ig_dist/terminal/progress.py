"""How far a command is: a bar on a terminal, else a line a minute; of several processes rank 0 shows it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ig_dist.terminal import console, is_first_process

LOG_EVERY_S = 60.0


class Advance(Protocol):
    """Called with the units that this process has done since the last call."""

    def __call__(self, count: int, done: int | None = None) -> None:
        """``done``: the units that are done in all, where other processes work on the same."""


def bar(what: str, total: int | None, done: int = 0, *, in_bytes: bool = False, hidden: bool = False) -> Progress:
    """A bar with one task, whose field ``rate`` is a text beside it; only the first process of a terminal shows it."""
    amount = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn(what), BarColumn(), amount, TextColumn("{task.fields[rate]}"))
    hidden = hidden or not is_first_process() or not console.is_terminal
    shown = Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console, disable=hidden)
    shown.add_task(what, total=total, completed=done, rate="")
    return shown


@contextmanager
def progress(what: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
    """Progress of ``total`` units, and the rate of this process; the unit is as in "3 images/s", bytes are MB."""
    divisor, name = (1e6, "MB") if unit == "bytes" else (1, unit)
    shown = bar(what, total, done, in_bytes=unit == "bytes")
    task = shown.task_ids[0]
    began = logged = time.monotonic()
    made, first, now_done, lock = 0, done, done, threading.Lock()

    def advance(count: int, done: int | None = None) -> None:
        nonlocal made, now_done, logged
        with lock:
            made, now_done = made + count, now_done + count if done is None else done
            now = time.monotonic()
            rate = made / max(now - began, 1e-9)
            said = f"{rate / divisor:,.0f} {name}/s"
            shown.update(task, completed=now_done, rate=said)
            if not console.is_terminal and is_first_process() and now - logged > LOG_EVERY_S:
                logged = now
                left = (total - now_done) / max((now_done - first) / (now - began), rate, 1e-9)
                amounts = f"{now_done / divisor:,.0f} of {total / divisor:,.0f} {name}"
                console.print(f"{what}: {amounts}, {said} here, {timedelta(seconds=round(left))} left")

    with shown:
        yield advance
