"""A connection between two launchers: each says words, with a value, and hears the other's newest of each."""

from __future__ import annotations

import json
import socket
import struct
from contextlib import suppress
from typing import Any

LONGEST = 65536


class Line:
    """Never waits for the other side, but for a few seconds where that takes nothing more."""

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


def free_port(host: str = "") -> int:
    """A port that nobody has now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
