"""Starts the ranks of this machine, and starts them again where that may help."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence

from ig_dist.errors import IgDistError
from ig_dist.launching.endings import After, after, pause_s
from ig_dist.launching.node import Node
from ig_dist.launching.ranks import POLL_S, Asked, rank_environment, run_ranks, signals_passed_on
from ig_dist.launching.together import Next, StoppedError, join
from ig_dist.this_process import LOCK_WAIT_VARIABLE

GRACE_S = 300.0
LONG_S = 3600.0


def supervise(
    arguments: Sequence[str], node: Node, *, restarts: int = 0, grace_s: float = GRACE_S, asked: Asked | None = None
) -> int:
    """Run ``python ARGUMENTS`` in the ranks of all machines; the code that explains a failure of any, or 0.

    Args:
        arguments: of Python.
        node: this machine.
        restarts: failures in a row after which the ranks are started again, where the exit code says that it may help.
            A start that ran for an hour begins the row anew.
        grace_s: for a save, after a signal or another rank's orderly end.
        asked: the signals, if they are handled already.

    Raises:
        ConfigError: the machines were not started alike.
        HangError: some machines did not come.
    """
    if asked is None:
        with signals_passed_on() as asked:
            return supervise(arguments, node, restarts=restarts, grace_s=grace_s, asked=asked)
    failures, began = 0, time.monotonic()
    if restarts:
        os.environ.setdefault(LOCK_WAIT_VARIABLE, "120")

    def decide(code: int) -> Next:
        what = after(code)
        if asked.number or failures >= restarts or what not in (After.AGAIN, After.LATER):
            return Next(code, False, 0.0)
        return Next(code, True, pause_s(failures) if what is After.LATER else 0.0)

    together, code = join(node, asked, grace_s, decide), 1
    try:
        while True:
            port, code, began = together.begin(), 1, time.monotonic()
            code = run_ranks(arguments, node, port, grace_s, asked, together.others)
            if time.monotonic() - began > LONG_S:
                failures = 0
            code, again, pause = together.end(code)
            _say(code, again, pause, failures, restarts)
            if not again:
                return code
            failures += 1
            _sleep(pause, asked)
    except StoppedError as stopped:
        code = stopped.code
        return code
    except IgDistError as error:
        code = error.exit_code
        raise
    finally:
        together.close(code)


def describe(arguments: Sequence[str], node: Node) -> str:
    """What ``supervise`` would start, a line for each rank."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    lines = [f"node {node.rank} of {node.nodes}"]
    lines[0] += f"; its launcher meets the others at {node.host}:{node.port}" if node.nodes > 1 else ""
    for local_rank in range(node.processes):
        environment = rank_environment(node, local_rank, 0)
        lines.append(shlex.join([*(f"{name}={environment[name]}" for name in names), sys.executable, *arguments]))
    return "\n".join(lines)


def _say(code: int, again: bool, pause: float, failures: int, restarts: int) -> None:
    if again:
        when = f" in {pause:.0f} s" if pause else ""
        print(f"exit code {code}: started again{when}, {failures + 1} of {restarts}", file=sys.stderr, flush=True)
    elif restarts and failures >= restarts and code:
        print(f"exit code {code}: not started again, {restarts} failures in a row", file=sys.stderr, flush=True)


def _sleep(seconds: float, asked: Asked) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not asked.number:
        time.sleep(POLL_S)
