"""What a campaign of faults is made of: its draw and tallies, the ways to hurt a command, and the promise it breaks."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests import forked

WELL = {0}
PREEMPTED = 75


@dataclass
class Tally:
    """Of one kind of fault."""

    faults: int = 0
    failures: list[str] = field(default_factory=list)
    lost_s: float = 0.0
    """By which its rounds took longer than without faults, shared out among these."""


@dataclass
class Campaign:
    """What is drawn, where it happens, and what came of it."""

    folder: Path
    index: Path
    draw: random.Random
    ends_s: float = 90.0
    """By which a command that was hurt has ended."""
    tallies: dict[str, Tally] = field(default_factory=dict)
    whole: dict[str, Path] = field(default_factory=dict)
    """Runs that nothing happened to."""
    seconds: dict[str, float] = field(default_factory=dict)
    """That a round's command takes when nothing happens to it."""
    rounds: int = 0

    @property
    def faults(self) -> int:
        return sum(tally.faults for tally in self.tallies.values())

    def count(self, kind: str) -> str:
        self.tallies.setdefault(kind, Tally()).faults += 1
        return kind

    def failed(self, kinds: Sequence[str], what: str) -> None:
        print(f"FAILED {', '.join(kinds)}: {what}", flush=True)
        self.tallies.setdefault(kinds[-1] if kinds else "none", Tally()).failures.append(what)


class Broken(Exception):  # noqa: N818  (a promise)
    """A promise that did not hold."""


def moment(campaign: Campaign, process: forked.Process, longest_s: float) -> bool:
    """Wait for a moment that is drawn; whether the command is still there."""
    deadline = time.monotonic() + campaign.draw.uniform(0.02, 0.7 * longest_s)
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    return process.poll() is None


def family(pid: int) -> list[int]:
    """A process and all that came from it."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for member in found:
        found += parents.get(member, [])
    return found


def kill_all(campaign: Campaign, process: forked.Process) -> None:
    for pid in family(process.pid or 0):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_one(campaign: Campaign, process: forked.Process) -> None:
    members = family(process.pid or 0)
    with suppress(ProcessLookupError):
        os.kill(campaign.draw.choice(members[1:] or members), signal.SIGKILL)


def stand_still(campaign: Campaign, process: forked.Process) -> None:
    """SIGSTOP of one process, and later SIGCONT: nothing ends by it."""
    pid = campaign.draw.choice(family(process.pid or 0))
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(campaign.draw.uniform(0.05, 0.6))
        os.kill(pid, signal.SIGCONT)


def ask(number: int, campaign: Campaign, process: forked.Process) -> None:
    process.send_signal(number)


Act = Callable[[Campaign, forked.Process], None]
ENDING: dict[str, tuple[Act, set[int] | None]] = {
    "SIGKILL of all": (kill_all, None),
    "SIGKILL of one": (kill_one, None),
    "SIGTERM": (partial(ask, signal.SIGTERM), {0, PREEMPTED, -signal.SIGTERM}),
    "SIGUSR2": (partial(ask, signal.SIGUSR2), {0, PREEMPTED, -signal.SIGUSR2}),
}
STILL = "SIGSTOP and SIGCONT"
PASSING: dict[str, Act] = {STILL: stand_still}
"""Faults that a command lives through."""
FOR_ANY = ("SIGKILL of all", "SIGKILL of one", STILL)


def under_faults(
    campaign: Campaign,
    start: Callable[[], forked.Process],
    kinds: Sequence[str],
    longest_s: float,
    between: Callable[[], str | None] = lambda: None,
    passing: Mapping[str, Act] = PASSING,
) -> list[str]:
    """Start a command until it ends well, hurt a few times on the way; the faults.

    Raises:
        Broken: it says a traceback, hangs, or ends with a code that it must not.
    """
    suffered: list[str] = []
    most = campaign.draw.randrange(3, 9)
    while True:
        process = start()
        codes: set[int] | None = WELL
        while len(suffered) < most and moment(campaign, process, longest_s):
            kind = campaign.draw.choice(kinds)
            if kind in passing:
                passing[kind](campaign, process)
            else:
                act, codes = ENDING[kind]
                act(campaign, process)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(campaign.ends_s)
            suffered.append(campaign.count(kind))
            if kind not in passing:
                break
        try:
            out, err = process.communicate(campaign.ends_s)
        except FileNotFoundError:  # it was killed before it had a file to write to
            out = err = ""
        except subprocess.TimeoutExpired:
            kill_all(campaign, process)
            raise Broken(f"hangs after {suffered}") from None
        code = process.wait()
        if "Traceback" in out + err:
            raise Broken(f"traceback after {suffered}: {(out + err)[-1500:]}")
        if codes is not None and code not in codes:
            raise Broken(f"exit code {code} after {suffered}: {err[-600:]}")
        if code == 0:
            return suffered
        if between() is not None:
            suffered.append(campaign.count("damaged checkpoint"))
