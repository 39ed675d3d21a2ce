"""The launchers of several machines begin each start together, and end it together.

The ranks of a start meet in a store of rank 0's process, on a port of its own for each start: what is left of one start
cannot be taken for a part of the next. The launcher of the first machine tells the port; the others are connected to
it. They tell one another at once when a rank has failed, since ranks may not find out by themselves: a collective on
a GPU waits for a peer that is dead until it times out.
"""

import errno
import json
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from ig_dist.errors import ConfigError, HangError
from ig_dist.launching.endings import explaining
from ig_dist.launching.node import Node
from ig_dist.launching.ranks import POLL_S, Asked
from ig_dist.terminal import to_stderr

JOIN_S = 1800.0  # a machine may have to be made, and to fetch an image of many gigabytes
PORT_S = 10.0  # the launcher of another job may be about to let go of it
TWIN_S = 35.0  # a line to a machine that has vanished is closed within half a minute
LONGEST = 65536  # bytes that a line may keep unread
LOST = 1  # the code of a machine that is gone: that of a rank that has lost its peer


class Next(NamedTuple):
    """What all launchers do after a start."""

    code: int  # that explains how the start ended
    again: bool
    pause_s: float


class StoppedError(Exception):
    """The job ends while no rank runs."""

    def __init__(self, code: int) -> None:
        self.code = code


class Line:
    """A connection between two launchers: each says words, with a value, and hears the other's newest of each.

    It never waits for the other side, but for a few seconds where that takes nothing more.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)  # Python's own time-outs would make reading wait
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 5, 0))
        # a machine may vanish without a word: then this is closed within half a minute
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
        self._connection, self._unread = connection, b""
        self._heard: dict[str, Any] = {}
        self.closed = False

    def heard(self, word: str) -> Any:
        """The newest value of a word; None: never heard. What was said before the end of a connection counts."""
        if not self.closed:
            try:
                while len(self._unread) <= LONGEST and (data := self._connection.recv(LONGEST, socket.MSG_DONTWAIT)):
                    self._unread += data
                self.close()  # its end, or a stranger
            except BlockingIOError:
                pass
            except OSError:
                self.close()
            *lines, self._unread = self._unread.split(b"\n")
            try:
                for line in lines:
                    self._heard.update(json.loads(line))
            except (TypeError, ValueError, RecursionError):  # a stranger
                self.close()
        return self._heard.get(word)

    def say(self, **words: Any) -> None:
        """Say words, if somebody is still there."""
        with suppress(OSError):
            if not self.closed:
                self._connection.sendall(json.dumps(words).encode() + b"\n")

    def close(self) -> None:
        """Hang up."""
        self.closed = True
        self._connection.close()


def door(port: int) -> socket.socket:
    """Where lines come in, over IPv6 too where there is such a thing; does not wait.

    Raises:
        OSError: the port is taken.
    """
    try:
        server = socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    except (OSError, ValueError):
        server = socket.create_server(("", port), backlog=1024)
    server.setblocking(False)
    return server


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class First:
    """The launcher of the first machine, which the others come to; there may be none.

    It waits for others ``grace_s`` once some ranks have ended; ``decide`` says after a start what comes next.
    """

    def __init__(self, node: Node, asked: Asked, grace_s: float, decide: Callable[[int], Next]) -> None:
        self._node, self._asked, self._grace_s, self._decide = node, asked, grace_s, decide
        self._door: socket.socket | None = None
        self._others: dict[int, Line] = {}
        self._strangers: dict[Line, float] = {}  # who has not been let in yet, and since when
        self._start, self._told = 0, False

    def begin(self) -> int:
        """The port of the next start's store, once all machines are there.

        Raises:
            ConfigError: they were not started alike.
            HangError: some did not come.
            StoppedError: asked to stop meanwhile.
        """
        if self._asked.number:
            raise StoppedError(self._asked.code)
        deadline = time.monotonic() + JOIN_S
        while missing := self._missing():
            self._let_in()
            _wait_on(self._asked, deadline, f"node {', '.join(missing)} did not come to {_place(self._node)}")
        self._start, self._told = self._start + 1, False
        port = free_port()
        for line in self._lines():
            line.say(start=[self._start, port])
        return port

    def others(self, code: int) -> int:
        """Tell the code that explains how ranks here have ended, 0 until one has failed; that of other machines."""
        theirs = explaining(code or 0 for code in [*self._said("failing"), *self._said("ended")])
        if (code or theirs) and not self._told:
            self._told = True
            for line in self._lines():
                line.say(failing=[self._start, explaining([code, theirs])])
        return theirs

    def end(self, code: int) -> Next:
        """Tell how all ranks here have ended, wait for the others, and decide what comes next."""
        deadline = float("inf")
        while None in (ended := self._said("ended")) and time.monotonic() < deadline:
            told = code or _stopped(self._asked)
            if deadline == float("inf") and (self.others(told) or told):
                deadline = time.monotonic() + 2 * self._grace_s  # each of them keeps to it by itself
            time.sleep(POLL_S)
        what = self._decide(explaining([code, *(LOST if code is None else code for code in ended)]))
        for line in self._lines():
            line.say(next=[self._start, *what])
        return what

    def close(self, code: int) -> None:
        """Leave, with this code."""
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

    def _said(self, word: str) -> list[int | None]:
        return [_code(line, word, self._start) for line in self._lines()]

    def _missing(self) -> list[str]:
        """Machines that are not there, or that one which has come may be in place of."""
        self._others = {rank: line for rank, line in self._others.items() if line.heard("node") and not line.closed}
        doubtful = [self._twin(line.heard("node")) for line in self._strangers]
        return [str(rank) for rank in range(1, self._node.nodes) if rank not in self._others or rank in doubtful]

    def _let_in(self) -> None:
        self._door = self._door or self._open()
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
            to_stderr(f"warning: refused: {refused}")
            line.say(refused=refused)
            line.close()


class Other:
    """The launcher of another machine, as ``First``; it decides by itself where it has lost the first one."""

    def __init__(self, node: Node, asked: Asked, grace_s: float, decide: Callable[[int], Next]) -> None:
        self._node, self._asked, self._decide = node, asked, decide
        self._first: Line | None = None
        self._start, self._told = 0, False

    def begin(self) -> int:
        """As that of the first one."""
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
        """As those of the first one."""
        assert self._first is not None
        if code and not self._told:
            self._told = True
            self._first.say(failing=[self._start, code])
        return _code(self._first, "failing", self._start) or 0

    def end(self, code: int) -> Next:
        """Tell how all ranks here have ended, and hear what comes next."""
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
        """Leave."""
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


def _code(line: Line, word: str, start: int) -> int | None:
    """What another machine said of a start; None: nothing yet."""
    said, code = line.heard(word) or (0, 0)
    return int(code) if said == start else LOST if line.closed else None


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
