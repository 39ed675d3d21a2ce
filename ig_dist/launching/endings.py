"""What comes after an exit code (docs/running.md): one table for SLURM, `ig-dist launch` and Kubernetes."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from enum import Enum

from ig_dist.errors import (
    ConfigError,
    DataError,
    HangError,
    NodeError,
    NonFiniteError,
    OutOfMemoryError,
    Preempted,
    StorageError,
)

STOPPED = Preempted.exit_code
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 600.0


class After(Enum):
    """What a job is given after it has ended."""

    DONE = "done"
    NEVER = "never"
    """Nothing: it would end in the same way."""
    ASKED = "asked"
    """Whoever stopped it starts it again."""
    ELSEWHERE = "elsewhere"
    """Another start, on other machines."""
    LATER = "later"
    """Another start, after a pause that grows."""
    AGAIN = "again"
    """Another start."""


_AFTER = {
    0: After.DONE,
    ConfigError.exit_code: After.NEVER,
    NonFiniteError.exit_code: After.NEVER,
    DataError.exit_code: After.NEVER,
    HangError.exit_code: After.AGAIN,
    NodeError.exit_code: After.ELSEWHERE,
    OutOfMemoryError.exit_code: After.NEVER,
    StorageError.exit_code: After.LATER,
    STOPPED: After.ASKED,
    128 + signal.SIGINT: After.ASKED,  # Ctrl-C, on one of several machines
}


def after(code: int) -> After:
    """What comes after an exit code, or a negative number of a signal. Others are tried again: kills, lost peers."""
    return _AFTER.get(code, After.AGAIN)


def codes(what: After) -> tuple[int, ...]:
    """The exit codes that are followed by this."""
    return tuple(code for code, follows in _AFTER.items() if follows is what)


def pause_s(failures: int) -> float:
    """How long to wait before the next start, after so many failures in a row before this one."""
    return min(FIRST_PAUSE_S * 2.0 ** min(failures, 30), LONGEST_PAUSE_S)


def explaining(ended: Iterable[int]) -> int:
    """Of the codes of processes that worked together, the one that explains the others; 0 of none.

    A kill comes before a code, a code that needs the user before the rest, and any before the 1 of those who lost their
    peer. An abort comes after them: threads of NCCL abort a process whose peer has failed.
    """

    def place(code: int) -> int:
        if code in (-signal.SIGABRT, 128 + signal.SIGABRT):
            return 3
        if code < 0 or code > 128:
            return 0
        return {After.NEVER: 1, After.ASKED: 4}.get(after(code), 5 if code == 1 else 2)

    return min((code for code in ended if code), key=place, default=0)
