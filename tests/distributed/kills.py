"""SIGKILL at seeded moments: of one rank, of all ranks, and in the middle of a save."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ig_dist.checkpoints.manifest import MANIFEST
from tests.forked import Process
from tests.waiting import wait_until

KINDS = ("one", "all", "save")
ENDS_S = 60.0  # in which the ranks that are left end by themselves


class Kill(NamedTuple):
    run: str
    kind: str
    step: int
    """It is killed once it has done this step since it was started."""
    extra_s: float
    victim: int
    """The rank that is killed alone."""


def kills(runs: Sequence[str], count: int, last_step: int, ranks: int) -> list[Kill]:
    """So many moments, spread over the runs in their order, of all kinds in turn."""
    draw = random.Random(count)
    of = [runs[number * len(runs) // count] for number in range(count)]
    steps = {run: sorted(draw.sample(range(1, last_step), of.count(run))) for run in runs}
    return [
        Kill(run, KINDS[number % 3], steps[run].pop(0), draw.uniform(0, 0.02), draw.randrange(ranks))
        for number, run in enumerate(of)
    ]


def carry_out(kill: Kill, ranks: Sequence[Process], log: Path, run: Path) -> bool:
    """Kill when the moment has come, and return when all ranks are gone: whether it left a save that is torn.

    The moment is told by what rank 0 says (``log``): the metrics hold steps of earlier starts too.
    """
    wait_until(lambda: last_step(log, run) >= kill.step, *ranks, what=kill, every_s=0.002)
    wait_until(lambda: kill.kind != "save" or torn_saves(run), *ranks, what=kill, every_s=0.001)
    time.sleep(kill.extra_s)
    for rank in [ranks[kill.victim]] if kill.kind == "one" else ranks:
        rank.kill()
    for rank in ranks:
        assert rank.wait(ENDS_S), f"{kill}: a rank ended as if nothing had happened"
    return bool(torn_saves(run))


def last_step(log: Path, run: Path) -> int:
    """The last step that rank 0 says it has done of a run."""
    _, _, said = log.read_text().partition(f"{run.name}: ")
    return max((int(step) for step in re.findall(r"^step (\d+)/", said, re.MULTILINE)), default=0)


def torn_saves(run: Path) -> list[Path]:
    return [folder for folder in run.glob("checkpoints/step_*") if not (folder / MANIFEST).exists()]
