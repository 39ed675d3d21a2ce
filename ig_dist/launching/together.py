"""The launchers of several machines begin each start together, and end it together.

The ranks of a start meet in a store of rank 0's process, on a port of its own for each start: what is left of one start
cannot be taken for a part of the next. The launcher of the first machine tells the port; the others are connected to
it. They tell one another at once when a rank has failed, since ranks may not find out by themselves: a collective on
a GPU waits for a peer that is dead until it times out.
"""

from __future__ import annotations

import errno
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from ig_dist.errors import ConfigError, HangError
from ig_dist.launching.endings import explaining
from ig_dist.launching.line import Line, door, free_port
from ig_dist.launching.node import Node
from ig_dist.launching.ranks import POLL_S, Asked

JOIN_S = 1800.0
"""A machine may have to be made, and to fetch an image of many gigabytes."""
PORT_S = 10.0
"""The launcher of another job may be about to let go of it."""
TWIN_S = 35.0
"""A line to a machine that has vanished is closed within half a minute (line.py)."""
LOST = 1
"""The code of a machine that is gone: that of a rank that has lost its peer."""


class Next(NamedTuple):
    """What all launchers do after a start."""

    code: int
    """That explains how the start ended."""
    again: bool
    pause_s: float


Decide = Callable[[int], Next]
"""From the code of a start to what comes next."""


class StoppedError(Exception):
    """The job ends while no rank runs."""

    def __init__(self, code: int) -> None:
        self.code = code


class Together:
    """A launcher among those of all machines; this one is of the only machine."""

    def __init__(self, node: Node, asked: Asked, grace_s: float, decide: Decide) -> None:
        self._node, self._asked, self._grace_s, self._decide = node, asked, grace_s, decide

    def begin(self) -> int:
        """The port of the next start's store, once all machines are there.

        Raises:
            ConfigError: they were not started alike.
            HangError: some did not come.
            StoppedError: asked to stop meanwhile.
        """
        if self._asked.number:
            raise StoppedError(self._asked.code)
        return free_port("127.0.0.1")

    def others(self, code: int) -> int:
        """Tell the code that explains how ranks here have ended, 0 until one has failed; that of other machines."""
        return 0

    def end(self, code: int) -> Next:
        """Tell how all ranks here have ended, wait for the others, and hear what comes next."""
        return self._decide(code)

    def close(self, code: int) -> None:
        """Leave, with this code."""


def join(node: Node, asked: Asked, grace_s: float, decide: Decide) -> Together:
    """The launcher of this machine.

    Args:
        node: this machine.
        asked: the signals.
        grace_s: for how long ranks are waited for once some have ended.
        decide: what comes next: by the first machine, or by one that has lost it.
    """
    kind = Together if node.nodes == 1 else _First if node.rank == 0 else _Other
    return kind(node, asked, grace_s, decide)


class _First(Together):
    """The launcher of the first machine, which the others come to."""

    def __init__(self, *about: Any) -> None:
        super().__init__(*about)
        self._door: socket.socket | None = None
        self._others: dict[int, Line] = {}
        self._strangers: dict[Line, float] = {}
        """Who has not been let in yet, and since when."""
        self._start, self._told = 0, False

    def begin(self) -> int:
        self._door = self._door or self._open()
        deadline = time.monotonic() + JOIN_S
        while True:
            self._others = {rank: line for rank, line in self._others.items() if line.heard("node") and not line.closed}
            doubtful = [self._twin(line.heard("node")) for line in self._strangers]
            missing = [str(rank) for rank in range(1, self._node.nodes) if rank not in self._others or rank in doubtful]
            if not missing:
                break
            self._let_in()
            _wait_on(self._asked, deadline, f"node {', '.join(missing)} did not come to {_place(self._node)}")
        self._start, self._told = self._start + 1, False
        port = free_port()
        for line in self._others.values():
            line.say(start=[self._start, port])
        return port

    def others(self, code: int) -> int:
        theirs = explaining([self._code(line, "failing") or self._code(line, "ended") or 0 for line in self._lines()])
        if (code or theirs) and not self._told:
            self._told = True
            for line in self._lines():
                line.say(failing=[self._start, explaining([code, theirs])])
        return theirs

    def end(self, code: int) -> Next:
        deadline = float("inf")
        while None in (ended := [self._code(line, "ended") for line in self._lines()]) and time.monotonic() < deadline:
            told = code or _stopped(self._asked)
            if deadline == float("inf") and (self.others(told) or told):
                deadline = time.monotonic() + 2 * self._grace_s  # each of them keeps to it by itself
            time.sleep(POLL_S)
        what = self._decide(explaining([code, *(LOST if code is None else code for code in ended)]))
        for line in self._lines():
            line.say(next=[self._start, *what])
        return what

    def close(self, code: int) -> None:
        for line in (*self._lines(), *self._strangers):
            line.say(next=[self._start, code, False, 0.0])
            line.close()
        if self._door is not None:
            self._door.close()

    def _open(self) -> socket.socket:
        deadline = time.monotonic() + PORT_S
        while True:
            try:
                return door(self._node.port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    raise ConfigError(
                        f"port {self._node.port}: {error.strerror}; give all nodes another --master HOST:PORT"
                    ) from None
            _wait_on(self._asked, float("inf"))

    def _lines(self) -> list[Line]:
        return list(self._others.values())

    def _code(self, line: Line, word: str) -> int | None:
        """What a machine said of this start; None: nothing yet."""
        start, code = line.heard(word) or (0, 0)
        return int(code) if start == self._start else LOST if line.closed else None

    def _let_in(self) -> None:
        assert self._door is not None
        with suppress(OSError):  # nobody more, or one that has gone again
            while True:
                self._strangers[Line(self._door.accept()[0])] = time.monotonic()
        for line, since in [*self._strangers.items()]:
            told = line.heard("node")
            if self._twin(told) and not line.closed and time.monotonic() < since + TWIN_S:
                continue  # in place of one that has vanished without a word?
            if told is not None or line.closed:
                del self._strangers[line]
            if told is not None:
                self._take(line, told)

    def _twin(self, told: Any) -> int:
        """The rank that somebody says to have, if another one has it; else 0."""
        match told:
            case [int(), int(rank), int()] if rank in self._others and not self._others[rank].closed:
                return rank
        return 0

    def _take(self, line: Line, told: Any) -> None:
        mine, refused = self._node, ""
        match told:
            case [int(nodes), int(rank), int(processes)]:
                if (nodes, processes) != (mine.nodes, mine.processes):
                    refused = (
                        f"node {rank} was started for {nodes} nodes of {processes} processes, node 0 for {mine.nodes}"
                        f" of {mine.processes}: give all of them the same --nodes and --processes"
                    )
                elif not 0 < rank < nodes or self._twin(told):
                    refused = f"two nodes were started with --node-rank {rank}: give each its own, 0 to {nodes - 1}"
                else:
                    self._others[rank] = line
            case _:
                refused = "node 0 does not understand this one: is its ig_dist of another version?"
        if refused:
            print(f"warning: refused: {refused}", file=sys.stderr, flush=True)
            line.say(refused=refused)
            line.close()


class _Other(Together):
    """The launcher of another machine than the first."""

    def __init__(self, *about: Any) -> None:
        super().__init__(*about)
        self._first: Line | None = None
        self._start, self._told = 0, False

    def begin(self) -> int:
        deadline = time.monotonic() + JOIN_S
        self._told = False
        while True:
            if self._first is None or self._first.closed:
                self._first = self._connect()
            if self._first is not None:
                if refused := self._first.heard("refused"):
                    raise ConfigError(refused)
                start, port = self._first.heard("start") or (0, 0)
                if start > self._start:
                    self._start = start
                    return int(port)
                if (said := self._first.heard("next")) and not said[2]:  # node 0 has left
                    raise StoppedError(int(said[1]))
            _wait_on(self._asked, deadline, f"node 0 did not begin at {_place(self._node)}")

    def others(self, code: int) -> int:
        assert self._first is not None
        if code and not self._told:
            self._told = True
            self._first.say(failing=[self._start, code])
        start, failing = self._first.heard("failing") or (0, 0)
        return int(failing) if start == self._start else LOST if self._first.closed else 0

    def end(self, code: int) -> Next:
        assert self._first is not None
        self._first.say(ended=[self._start, code])
        while True:
            start, *what = self._first.heard("next") or [0]
            if start == self._start:
                return Next(int(what[0]), bool(what[1]), float(what[2]))
            if self._first.closed:  # it may come back
                return self._decide(code)
            self.others(code or _stopped(self._asked))
            time.sleep(POLL_S)

    def close(self, code: int) -> None:
        if self._first is not None:
            self._first.close()

    def _connect(self) -> Line | None:
        try:
            line = Line(socket.create_connection((self._node.host, self._node.port), timeout=5.0))
        except OSError:  # not there yet, or not yet known by its name
            return None
        line.say(node=[self._node.nodes, self._node.rank, self._node.processes])
        self._start = 0
        return line


def _stopped(asked: Asked) -> int:
    """What the others are told once ranks here are done: theirs stop too, and are started again with these."""
    return asked.code if asked.number else 0


def _wait_on(asked: Asked, deadline: float, otherwise: str = "") -> None:
    if asked.number:
        raise StoppedError(asked.code)
    if time.monotonic() > deadline:
        raise HangError(f"{otherwise} within {JOIN_S:.0f} s: see what it says, then start the job again")
    time.sleep(POLL_S)


def _place(node: Node) -> str:
    return f"{node.host}:{node.port}"
