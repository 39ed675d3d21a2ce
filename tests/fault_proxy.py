"""A reverse proxy with faults, to stand between an S3 client and its server.

Requests pass through byte by byte, the Host header too, so that a request signed for the proxy's address is valid at
the server. Rules decide which of them go wrong, and how:

    with FaultProxy(store.endpoint) as proxy:
        proxy.add(Fault("status503", share=0.05), Fault("cut", next=2, path=r"\\.tar", after_bytes=1000))

| kind | what the client sees |
|---|---|
| ``status403``, ``status404``, ``status500``, ``status503`` | this answer; the server never sees the request |
| ``reset`` | the connection is reset; the server never sees the request |
| ``lost`` | the same, but the server has done what was asked |
| ``hang`` | no answer; the server never sees the request |
| ``cut`` | the connection closes after ``after_bytes`` bytes of the body |
| ``stall`` | the body stops there, the connection stays |
| ``flip`` | one bit of the byte at ``after_bytes`` is another |
| ``short`` | the body ends there, and Content-Length agrees |

The last four act on the body of the request where it has one (a PUT: then it is the server that sees them; not
``short``), otherwise on that of a successful answer, and only on bodies longer than ``after_bytes``.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
import struct
import threading
from asyncio import StreamReader, StreamWriter
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import urlsplit

CODES = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}
EARLY = {*(f"status{code}" for code in CODES), "reset", "lost", "hang"}
UPLOAD = {"cut", "stall", "flip"}
DOWNLOAD = UPLOAD | {"short"}
CHUNK = 2**18


@dataclass
class Fault:
    """What goes wrong with the requests of ``method`` whose path and query ``path`` is found in."""

    kind: str
    share: float = 1.0  # of the requests that match
    next: int | None = None  # only so many times
    method: str | None = None
    path: str = ""
    after_bytes: int = 0

    def __post_init__(self) -> None:
        if self.kind not in EARLY | DOWNLOAD:
            raise ValueError(f"no fault is called {self.kind!r}")


class Event(NamedTuple):
    kind: str
    method: str
    path: str


class Head:
    """The head of a request or an answer."""

    def __init__(self, raw: bytes) -> None:
        first, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
        self.raw = raw
        self.words = first.split(" ", 2)
        fields = (line.partition(":") for line in lines)
        self.fields = {name.strip().lower(): value.strip().lower() for name, _, value in fields}
        self.size = int(self.fields["content-length"]) if "content-length" in self.fields else None
        self.chunked = "chunked" in self.fields.get("transfer-encoding", "")
        self.closes = "close" in self.fields.get("connection", "") or "HTTP/1.0" in first


class Hangup(Exception):  # noqa: N818 (no error)
    """Close the connection to the client."""


class FaultProxy:
    """The proxy, in a thread of its own while the context lasts; ``log`` lists the faults, ``requests`` everything."""

    def __init__(self, upstream: str, seed: int = 0) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname, parts.port)
        self._random = random.Random(seed)
        self._rules: list[Fault] = []
        self.log: list[Event] = []
        self.requests: list[tuple[str, str]] = []
        self.delay = 0.0  # seconds before each request, as a store that is far away

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def add(self, *faults: Fault) -> None:
        """More rules; the first that applies to a request counts."""
        self._rules = [*self._rules, *faults]

    def clear(self) -> None:
        """No more faults; the log stays."""
        self._rules = []

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self, ready: threading.Event) -> None:
        server = await asyncio.start_server(self._client, "127.0.0.1", 0, limit=4 * CHUNK)
        self._port = server.sockets[0].getsockname()[1]
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        ready.set()
        await self._stop.wait()
        server.close()  # connections end with their tasks, as the loop does

    async def _client(self, reader: StreamReader, writer: StreamWriter) -> None:
        """One connection of a client, with at most one to the server behind it."""
        connection = Connection(self, reader, writer)
        try:
            while await connection.exchange():
                pass
        except (Hangup, asyncio.CancelledError):
            pass
        except (OSError, EOFError):  # one of the sides is gone: the other shall not take what it has for whole
            reset(writer)
        finally:
            connection.drop_server()
            writer.close()

    async def connect(self) -> tuple[StreamReader, StreamWriter]:
        return await asyncio.open_connection(*self._upstream, limit=4 * CHUNK)

    def choose(self, kinds: set[str], request: Head, size: int | None = None) -> Fault | None:
        """The fault that this request gets, if any, for a body of ``size`` bytes."""
        method, path = request.words[:2]
        for rule in self._rules:
            if rule.kind not in kinds or rule.next == 0 or rule.method not in (None, method):
                continue
            if rule.kind in DOWNLOAD and not (size or 0) > rule.after_bytes:
                continue
            if not re.search(rule.path, path) or self._random.random() >= rule.share:
                continue
            if rule.next is not None:
                rule.next -= 1
            self.log.append(Event(rule.kind, method, path))
            return rule
        return None


class Connection:
    def __init__(self, proxy: FaultProxy, reader: StreamReader, writer: StreamWriter) -> None:
        self.proxy, self.reader, self.writer = proxy, reader, writer
        self.server: tuple[StreamReader, StreamWriter] | None = None

    def drop_server(self) -> None:
        if self.server:
            self.server[1].close()
            self.server = None

    async def exchange(self) -> bool:
        """One request and its answer; False when the connection ends after it."""
        try:
            request = Head(await self.reader.readuntil(b"\r\n\r\n"))
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return False
        self.proxy.requests.append((request.words[0], request.words[1]))
        await asyncio.sleep(self.proxy.delay)
        early = self.proxy.choose(EARLY, request)
        if early and early.kind != "lost":
            return await self.refuse(early.kind, request)
        upload = None if early else self.proxy.choose(UPLOAD, request, request.size)

        self.server = self.server or await self.proxy.connect()
        reader, writer = self.server
        writer.write(request.raw)
        if upload and upload.kind != "flip":
            await self.stop_upload(upload, request)
        sending = asyncio.create_task(body(self.reader, writer, request, upload))

        def sent(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception():  # the client is gone: the server need not wait for the rest
                reset(writer)

        sending.add_done_callback(sent)
        try:
            while True:
                answer = Head(await reader.readuntil(b"\r\n\r\n"))
                if not answer.words[1].startswith("1"):
                    break
                self.writer.write(answer.raw)
            if early:
                reset(self.writer)
                raise Hangup
            await self.answer(request, answer)
            # an answer to half a request is the last one: what follows on this connection is still that request
            _, unsent = await asyncio.wait({sending}, timeout=0.1)
            return not (unsent or sending.exception() or request.closes or answer.closes)
        finally:
            sending.cancel()

    async def refuse(self, kind: str, request: Head) -> bool:
        """A fault before the server sees the request."""
        if kind == "reset":
            reset(self.writer)
            raise Hangup
        if kind == "hang":
            await self.hold()
        code = int(kind.removeprefix("status"))
        waits = "expect" in request.fields  # with its body, which now never comes
        text = f"<?xml version='1.0'?><Error><Code>{CODES[code]}</Code><Message>A fault on purpose</Message></Error>"
        if not waits:
            await body(self.reader, None, request)
        self.writer.write(
            f"HTTP/1.1 {code} {CODES[code]}\r\nContent-Type: application/xml\r\nContent-Length: {len(text)}\r\n"
            f"Connection: {'close' if waits else 'keep-alive'}\r\n\r\n".encode()
        )
        self.writer.write(b"" if request.words[0] == "HEAD" else text.encode())
        await self.writer.drain()
        return not (waits or request.closes)

    async def stop_upload(self, fault: Fault, request: Head) -> None:
        assert self.server
        if "expect" in request.fields:
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await copy(self.reader, self.server[1], fault.after_bytes)
        if fault.kind == "stall":
            await self.hold()
        raise Hangup

    async def answer(self, request: Head, answer: Head) -> None:
        """The answer's head and body to the client."""
        assert self.server
        reader, _ = self.server
        bare = request.words[0] == "HEAD" or answer.words[1] in ("204", "304")
        eligible = not bare and not request.size and answer.words[1].startswith("2")
        fault = self.proxy.choose(DOWNLOAD, request, answer.size) if eligible else None
        if fault and fault.kind == "short":
            length = b"\\g<1>%d" % fault.after_bytes
            self.writer.write(re.sub(rb"(?i)(\r\nContent-Length: *)\d+", length, answer.raw))
        else:
            self.writer.write(answer.raw)
        if fault and fault.kind != "flip":
            await copy(reader, self.writer, fault.after_bytes)
            self.drop_server()  # the rest of this body is in the way of the next answer
            if fault.kind == "stall":
                await self.hold()
            if fault.kind == "cut":
                raise Hangup
        elif bare:
            await self.writer.drain()
        elif answer.size is None and not answer.chunked:
            await copy(reader, self.writer, None)
            raise Hangup
        else:
            await body(reader, self.writer, answer, fault)

    async def hold(self) -> None:
        """Wait until the client has enough of it."""
        while await self.reader.read(CHUNK):
            pass
        raise Hangup


async def body(reader: StreamReader, writer: StreamWriter | None, head: Head, flip: Fault | None = None) -> None:
    """The body that belongs to a head."""
    if not head.chunked:
        return await copy(reader, writer, head.size or 0, flip)
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        if writer:
            writer.write(line)
        await copy(reader, writer, size)
        while (end := await reader.readuntil(b"\r\n")) != b"\r\n":  # fields after the last chunk
            if writer:
                writer.write(end)
        if writer:
            writer.write(end)
            await writer.drain()
        if not size:
            return None


async def copy(reader: StreamReader, writer: StreamWriter | None, size: int | None, flip: Fault | None = None) -> None:
    """``size`` bytes, or all that come, with one bit flipped at will."""
    at = 0
    while size is None or at < size:
        data = await reader.read(CHUNK if size is None else min(CHUNK, size - at))
        if not data:
            if size is None:
                return
            raise EOFError
        if flip and at <= flip.after_bytes < at + len(data):
            changed = bytearray(data)
            changed[flip.after_bytes - at] ^= 1
            data = bytes(changed)
        at += len(data)
        if writer:
            writer.write(data)
            await writer.drain()


def reset(writer: StreamWriter) -> None:
    """Close with RST."""
    with suppress(OSError):  # the other side has closed it
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
