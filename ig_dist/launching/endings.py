"""What comes after an exit code (docs/running.md): the same for SLURM, `ig-dist launch` and Kubernetes."""

import signal
from collections.abc import Iterable

from ig_dist.errors import (
    ConfigError,
    DataError,
    NodeError,
    NonFiniteError,
    OutOfMemoryError,
    Preempted,
    StorageError,
)

FINAL = (ConfigError.exit_code, NonFiniteError.exit_code, DataError.exit_code, OutOfMemoryError.exit_code)
"""Another start would end in the same way."""
STOPPED = Preempted.exit_code
ASKED = (STOPPED, 128 + signal.SIGINT)  # Ctrl-C, on one of several machines
"""Whoever stopped it starts it again."""
ELSEWHERE = NodeError.exit_code  # another start may help on other machines
LATER = StorageError.exit_code  # and that one after a pause that grows
# all other codes, and signals, are tried again: kills, hangs, lost peers
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 600.0


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
        return 1 if code in FINAL else 4 if code in ASKED else 5 if code == 1 else 2

    return min((code for code in ended if code), key=place, default=0)
