"""The processes of a machine: started, signalled, waited for, and none of theirs left behind."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from ig_dist.errors import DataError, StorageError
from ig_dist.launching.endings import ASKED, STOPPED, explaining
from ig_dist.launching.node import Node
from ig_dist.terminal import to_stderr

GRACE_S = 10.0
"""For the ranks that are left after one has failed: they find out by themselves, as a rule, and say so."""
ORDERLY = (STOPPED, DataError.exit_code, StorageError.exit_code)
"""All ranks agree on these ends, after a save."""
TOLD = signal.SIGUSR2
"""Asks a training to stop, and ends other jobs at once, as SIGTERM does."""
HELPERS_S = 2.0
POLL_S = 0.05
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None)


class Asked:
    """What this process was told by signals, and passes on to the ranks."""

    def __init__(self) -> None:
        self.number = 0  # the first signal; 0: none has come
        self.since = float("inf")
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.told = False  # whether the ranks were told to stop before any signal came

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. A second one goes through too: a rank that is saving then ends at once."""
        known = self.told and not self.number  # for the ranks it would be the second one
        if not self.number:
            self.number, self.since = number, time.monotonic()
        for rank in [] if known else self.ranks:
            rank.send_signal(number)

    def tell(self) -> None:
        """Another machine was asked to stop: so are the ranks of this one, which may not find out by themselves."""
        if not self.told and not self.number:
            self.told = True
            for rank in self.ranks:
                rank.send_signal(TOLD)

    @property
    def code(self) -> int:
        """The exit code of who stops before there is anything to save."""
        return 128 + signal.SIGINT if self.number == signal.SIGINT else STOPPED


@contextmanager
def signals_passed_on() -> Iterator[Asked]:
    """Signals are for the ranks while this lasts; what they leave behind becomes this process's to end."""
    asked = Asked()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    former = {
        number: signal.signal(number, asked.note)
        for number in numbers
        if signal.getsignal(number) != signal.SIG_IGN  # as a shell has Ctrl-C for what runs in the background
    }
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield asked
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def run_ranks(
    arguments: Sequence[str], node: Node, port: int, grace_s: float, asked: Asked, others_code: Callable[[int], int]
) -> int:
    """Run ``python ARGUMENTS`` in each rank of this machine, to the end of all; the code that explains a failure, or 0.

    They meet those of all machines at ``port``, and have ``grace_s`` for a save, after a signal or a rank's orderly
    end. ``others_code`` is called again and again with the code that explains how ranks of this machine have ended, 0
    until then; it is that of other machines.
    """
    before = set(_children())
    ranks = asked.ranks = []
    parent = os.getpid()

    def end_with_launcher() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)

    try:
        for local_rank in range(node.processes):
            environment = rank_environment(node, local_rank, port)
            command = [sys.executable, *arguments]
            ranks.append(subprocess.Popen(command, env=environment, preexec_fn=end_with_launcher))
        if asked.number:  # while some had not been started
            for rank in ranks:
                rank.send_signal(asked.number)
        return _wait(ranks, node, grace_s, asked, others_code)
    finally:
        asked.ranks, asked.told = [], False
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
        _end_helpers(before, port)


def rank_environment(node: Node, local_rank: int, port: int) -> dict[str, str]:
    """The environment of a rank, in torchrun's words."""
    # or every rank would start a thread per core
    threads = max(1, len(os.sched_getaffinity(0)) // node.processes)
    # `python -m` would put the working directory first, and a random.py there before the real one
    safe_path = {} if {"", str(Path.cwd())} & set(sys.path) else {"PYTHONSAFEPATH": "1"}
    # not for localhost, which the first of several machines may be told to call itself: joining.py finds the way
    alone = {"GLOO_SOCKET_IFNAME": "lo"} if node.host.startswith("127.") else {}
    return {
        "OMP_NUM_THREADS": str(threads),
        **alone,
        **safe_path,
        **os.environ,
        "RANK": str(node.rank * node.processes + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(node.nodes * node.processes),
        "LOCAL_WORLD_SIZE": str(node.processes),
        "MASTER_ADDR": node.host,
        "MASTER_PORT": str(port),
    }


def _wait(
    ranks: Sequence[subprocess.Popen[bytes]],
    node: Node,
    grace_s: float,
    asked: Asked,
    others_code: Callable[[int], int],
) -> int:
    """Wait for all. After the first failure, here or elsewhere, the others get a moment, then they are killed.

    After an orderly end they get as long as a save may take: theirs may be under way.
    """
    own = {rank.pid for rank in ranks}
    deadline, why, others = float("inf"), "", 0
    # each is asked every time: of a child that is not asked it is not known that it ended
    while None in (codes := [rank.poll() for rank in ranks]) and time.monotonic() < deadline:
        reap(own)
        ended = [code for code in codes if code]
        others = others_code(explaining(ended))
        if others in ASKED:
            asked.tell()
        for code in (*ended, *([others] if others else [])):
            allowed = grace_s if code in ORDERLY else GRACE_S
            if time.monotonic() + allowed < deadline:
                deadline, why = time.monotonic() + allowed, f"{allowed:.0f} s of the first failure"
        if asked.since + grace_s < deadline:
            deadline, why = asked.since + grace_s, f"{grace_s:.0f} s of the signal (--grace)"
        time.sleep(POLL_S)
    late = [place for place, rank in enumerate(ranks) if rank.poll() is None]
    codes = [rank.returncode for rank in ranks]
    # What cannot speak for itself: who was killed from outside, and who did not end when another one had.
    first = node.rank * node.processes
    passed_on = {-TOLD: STOPPED} if asked.told else {}
    passed_on[-asked.number] = asked.code
    said = [
        f"rank {first + place} was killed by signal {-code}{' (SIGKILL: out of memory?)' * (-code == signal.SIGKILL)}"
        for place, code in enumerate(codes)
        if code and code < 0 and code not in passed_on
    ]
    said += [f"rank {first + place} did not end within {why} and was killed" for place in late]
    if said:
        to_stderr(f"error: {'; '.join(said)}")
    # a rank that was signalled before it could say a word had nothing to save, and no other can have begun without it
    saveless = any(code in passed_on for code in codes if code)
    code = explaining([passed_on.get(code, code) for code in codes if code])
    if late and code in (0, STOPPED) and not (saveless and others in (0, STOPPED)):
        # nothing that these could say: a rank that is killed may not have saved
        code = -signal.SIGKILL if others in (0, STOPPED) else others
    return 128 - code if code < 0 else code


def reap(ranks: Collection[int]) -> None:
    """Let go of processes that others have left to this one, as the first of a container must; not of the ``ranks``."""
    with suppress(ChildProcessError):  # none at all
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in ranks:
            os.waitpid(ended.si_pid, 0)


def _children() -> Iterator[int]:
    """The processes whose parent is this one, also by adoption."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                    yield int(folder.name)


def _end_helpers(before: Collection[int], port: int) -> None:
    """End what the ranks have left: decoders, servers. They end by themselves within a moment, or are killed.

    Not what a user's shell has left to the first process of a container.
    """
    kill_at = time.monotonic() + HELPERS_S
    while True:
        reap(())
        left = [process for process in set(_children()) - set(before) if _is_of_ranks(process, port)]
        now = time.monotonic()
        if not left or now > kill_at + HELPERS_S:
            return
        if now > kill_at:
            for process in left:
                with suppress(OSError):  # gone, or another user's
                    os.kill(process, signal.SIGKILL)
        time.sleep(POLL_S)


def _is_of_ranks(process: int, port: int) -> bool:
    """Whether a process has the environment of ranks that met there; or none any more, as it ends."""
    with suppress(OSError):
        environment = Path(f"/proc/{process}/environ").read_bytes()
        return not environment or f"MASTER_PORT={port}".encode() in environment.split(b"\0")
    return False
