"""Starts the ranks of this machine, and starts them again where that may help."""

import os
import shlex
import sys
import time
from collections.abc import Sequence

from ig_dist.errors import IgDistError
from ig_dist.launching.endings import ASKED, ELSEWHERE, FINAL, LATER, pause_s
from ig_dist.launching.node import Node
from ig_dist.launching.ranks import POLL_S, Asked, rank_environment, run_ranks
from ig_dist.launching.together import First, Next, Other, StoppedError
from ig_dist.terminal import to_stderr
from ig_dist.this_process import LOCK_WAIT_VARIABLE

LONG_S = 3600.0


def supervise(arguments: Sequence[str], node: Node, asked: Asked, *, restarts: int = 0, grace_s: float = 300.0) -> int:
    """Run ``python ARGUMENTS`` in the ranks of all machines; the code that explains a failure of any, or 0.

    After so many ``restarts`` in a row none follows; a start that ran for an hour begins the row anew. Ranks have
    ``grace_s`` for a save, after a signal or another rank's orderly end.

    Raises:
        ConfigError: the machines were not started alike.
        HangError: some machines did not come.
    """
    failures = 0
    if restarts:
        os.environ.setdefault(LOCK_WAIT_VARIABLE, "120")

    def decide(code: int) -> Next:
        over = asked.number or failures >= restarts or code in (0, ELSEWHERE, *FINAL, *ASKED)
        return Next(code, not over, pause_s(failures) if code == LATER and not over else 0.0)

    together, code = (Other if node.rank else First)(node, asked, grace_s, decide), 1
    try:
        while True:
            port, code, began = together.begin(), 1, time.monotonic()
            code = run_ranks(arguments, node, port, grace_s, asked, together.others)
            if time.monotonic() - began > LONG_S:
                failures = 0
            code, again, pause = together.end(code)
            if again:
                when = f" in {pause:.0f} s" if pause else ""
                to_stderr(f"exit code {code}: started again{when}, {failures + 1} of {restarts}")
            elif restarts and failures >= restarts and code:
                to_stderr(f"exit code {code}: not started again, {restarts} failures in a row")
            if not again:
                return code
            failures += 1
            deadline = time.monotonic() + pause
            while time.monotonic() < deadline and not asked.number:
                time.sleep(POLL_S)
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
