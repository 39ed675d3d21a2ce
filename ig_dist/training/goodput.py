"""The goodput ledger: where the time of a run went, over all of its starts.

``goodput.jsonl`` is appended to and never cut: what a start did beyond the checkpoint that the next one went on from is
in it, and is its lost work.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from ig_dist.storage.json_lines import LineFile, read_lines
from ig_dist.terminal import console
from ig_dist.training.phases import Phases

NAME = "goodput.jsonl"
LEAST_PERCENT = 0.05  # of the time; less is not told
SHORTEST_SAVE_S = 0.001  # less is what follows a save until the next step begins
KINDS = {
    "step": "training",
    "lost": "lost work",
    "start-up": "start-up",
    "compile": "warm-up and compilation",
    "data": "waiting for data",
    "checkpoint": "checkpoints",
    "validation": "validation",
    "sampling": "sample grids",
    "scoring": "scores",
}
"""Kinds of time and what they are called. ``step`` is the productive one."""


Seconds = Annotated[float, Field(ge=0, lt=2**40)]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class Line(BaseModel):
    """What a start has spent until a step."""

    began: Seconds
    from_step: Count
    step: Count
    seconds: dict[str, Seconds]


@dataclass(frozen=True)
class Goodput:
    """Where the time of a run went."""

    starts: int
    seconds: dict[str, float]  # of each of ``KINDS``
    lost_steps: int  # steps that were done again
    between_s: float
    """From the last line of a start to the beginning of the next: the job did not run, or was killed between lines."""

    @property
    def running_s(self) -> float:
        """Wall-clock time of all starts."""
        return sum(self.seconds.values())

    def percent(self, kind: str) -> float:
        """Share of the wall-clock time of all starts."""
        return 100 * self.seconds[kind] / max(self.running_s, 1e-9)

    def __str__(self) -> str:
        shares = ((name, self.percent(kind)) for kind, name in KINDS.items())
        parts = [f"{name} {percent:.1f}%" for name, percent in shares if percent >= LEAST_PERCENT]
        starts = f"{self.starts} start{'s' if self.starts > 1 else ''}"
        return f"goodput {self.percent('step'):.1f}% of {duration(self.running_s)} in {starts}: {', '.join(parts)}"


class Ledger:
    """Writes the ledger of one start; on ranks but the first (``path`` is None) it does nothing."""

    def __init__(self, path: Path | None, phases: Phases, start: int) -> None:
        self._lines = None if path is None else LineFile(path / NAME)
        self._path = path
        self._phases, self._start, self._step = phases, start, start
        self.note(start)

    def note(self, step: int) -> None:
        """Append what the time has gone to until now, after ``step``; the phase in progress begins anew."""
        self._step = step
        if self._lines is None:
            return
        self._phases.settle()
        line = {
            "began": round(self._phases.began_at, 3),
            "from_step": self._start,
            "step": step,
            "seconds": {kind: round(seconds, 4) for kind, seconds in self._phases.seconds.items()},
        }
        self._lines.append(line)

    def close(self) -> None:
        """The last line of the start, and one for the user."""
        self.note(self._step)
        if self._path is not None and (found := read_goodput(self._path)) is not None:
            console.print(str(found))


def read_goodput(run: Path) -> Goodput | None:
    """The ledger of a run, added up; None where there is none."""
    lines = _read_ledger(run)
    return add_up(lines) if lines else None


def read_saves(run: Path) -> dict[int, float]:
    """Seconds that the loop stood still for the save of each step, in the order of steps."""
    saves: dict[int, float] = {}
    before: Line | None = None
    for line in _read_ledger(run):
        known = before.seconds.get("checkpoint", 0.0) if before and before.began == line.began else 0.0
        if (spent := line.seconds.get("checkpoint", 0.0) - known) >= SHORTEST_SAVE_S:
            saves[line.step] = saves.get(line.step, 0.0) + spent
        before = line
    return dict(sorted(saves.items()))


def _read_ledger(run: Path) -> list[Line]:
    """Its lines; those that were cut off are passed over."""
    lines = []
    for line in read_lines(run / NAME):
        with suppress(ValidationError):
            lines.append(Line.model_validate(line))
    return lines


def add_up(lines: Sequence[Line]) -> Goodput:
    """Where the time went, from the ledger's lines: each holds what its start has spent until then."""
    starts: dict[float, list[Line]] = {}
    for line in lines:
        starts.setdefault(line.began, []).append(line)
    ordered = list(starts.values())
    seconds, lost_steps, between = dict.fromkeys(KINDS, 0.0), 0, 0.0
    for number, start in enumerate(ordered):
        for kind in KINDS:
            seconds[kind] += start[-1].seconds.get(kind, 0.0)
        # a later start that began before this one's end did some of its steps again
        kept = min([start[-1].step, *(later[0].from_step for later in ordered[number + 1 :])])
        lost_steps += start[-1].step - max(kept, start[0].from_step)
        worked: dict[int, float] = {}  # until each step; the first line that tells of it, for what follows is not saved
        for line in start:
            worked.setdefault(line.step, line.seconds.get("step", 0.0))
        lost = start[-1].seconds.get("step", 0.0) - float(np.interp(kept, list(worked), list(worked.values())))
        seconds["step"] -= lost
        seconds["lost"] += lost
    for before, after in pairwise(ordered):
        ended = before[-1].began + sum(before[-1].seconds.values())
        between += max(0.0, after[0].began - ended)
    return Goodput(len(ordered), seconds, lost_steps, between)


def duration(seconds: float) -> str:
    """The two largest units, e.g. ``2 h 5 min``."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 1:
        return f"{int(days)} d {int(hours % 24)} h"
    if hours >= 1:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{int(minutes)} min {int(seconds % 60)} s" if minutes >= 1 else f"{seconds:.0f} s"
