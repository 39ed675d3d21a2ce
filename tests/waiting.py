"""Waiting for what other processes do, and asking after them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests.forked import Process


def wait_until(
    true: Callable[[], object],
    *running: Process,
    what: object = "it never came",
    timeout_s: float = 120.0,
    every_s: float = 0.01,
) -> None:
    """Wait until something is true; no process may fail before, and one must still run.

    The limit is for what hangs: it is far above what a busy machine takes.
    """
    deadline = time.monotonic() + timeout_s
    while not true():
        for process in running:
            assert process.poll() in (None, 0), process.communicate()
        assert not running or any(process.poll() is None for process in running), what
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(every_s)


def children(process: Process) -> list[int]:
    """Of a launcher: its ranks."""
    return [*map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())]


def alive(process: int) -> bool:
    """Whether a process runs; one that ended may have no parent that asks for its end."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
