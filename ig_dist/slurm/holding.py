"""One start of a run at a time: a new one waits for the run's lock, and one that is cut off lets go of it."""

import fcntl
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ig_dist.slurm.commands import SlurmError, slurm
from ig_dist.slurm.record import Folder, Submission, size

LOOK_S, LOOKS = 15.0, 4
"""So often it is tried, and so many times in a row nobody is there, before a node counts as cut off."""


def lock_is_free(folder: Folder, submission: Submission, given: list[str], ended: Callable[[], bool]) -> bool:
    """Wait until no process of an earlier start holds the run: one may live on where the network was cut."""
    began, said = time.time(), False
    while submission.hold and not ended() and (held := _held(Path(submission.hold))):
        if time.time() - began > submission.hold_s:
            reason = f"{held} for {submission.hold_s:.0f} s: not started; end it, then resume"
            print(reason)
            folder.add_event("waited", code=1, reason=reason, next="stop")
            return False
        if not said:
            print(f"{held}: waiting for up to {submission.hold_s:.0f} s")
            until, log = began + submission.hold_s, size(folder.batch_log())
            folder.add_event("wait", nodes=given, log=log, until=until)
        said = True
        time.sleep(0.5)
    if said and not ended():
        reason = f"waited {time.time() - began:.0f} s for a process of another start that held {submission.hold}"
        folder.add_event("waited", code=None, reason=reason, next="")
    return True


def _held(file: Path) -> str:
    """That a process of another start has this lock, and which; empty: none has, or there are no locks there."""
    if not file.exists():
        return ""
    with file.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock.fileno(), 99, 0).decode(errors="replace").strip()
            known = f" ({holder})" if holder and holder.isprintable() else ""
            return f"{file} is held by a process of another start{known}"
        except OSError:  # the trainer says so
            pass
    return ""


class CutOff:
    """Whether this node's network is gone while its job lives on: neither another node of it nor SLURM's answers.

    A refused connection is an answer too: the machine is there. Where there is no other node nobody can tell, for the
    controller's machine may be off; nor where one of both kinds did not answer at the start, as behind a firewall.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._places: list[tuple[str, int]] = []
        self._next, self._missed = time.monotonic() + LOOK_S, 0
        nodes = _answering(hosts[1:4])
        if nodes:
            try:
                told = slurm("scontrol", "show", "config")
            except SlurmError:  # it is away now
                return
            found = re.findall(r"^SlurmctldHost\S* *= *([^(\s]+)(?:\(([^)]+)\))?", told, re.MULTILINE)
            controllers = _answering([address or name for name, address in found])
            self._places = [*nodes, *controllers] if controllers else []

    def is_cut_off(self) -> bool:
        """Looks around every ``LOOK_S``."""
        if not self._places or time.monotonic() < self._next:
            return False
        self._missed = 0 if any(_is_there(place) for place in self._places) else self._missed + 1
        self._next = time.monotonic() + LOOK_S
        return self._missed >= LOOKS


def _answering(names: Sequence[str]) -> list[tuple[str, int]]:
    return [place for name in names if _is_there(place := (name, 9))]  # any port will do


def _is_there(place: tuple[str, int]) -> bool:
    try:
        socket.create_connection(place, timeout=2).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


def end_ranks_here(folder: Path) -> None:
    """Kill the job's ranks on this node, which srun can do no more."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "ig_dist.slurm.rank" in words and str(folder) in words and "srun" not in words[0]:
            try:
                os.kill(int(entry.parent.name), signal.SIGKILL)
            except OSError:
                continue
