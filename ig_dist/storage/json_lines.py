"""Files of JSON lines, which are appended to: metrics, the goodput ledger, provenance, the history of a submission."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from ig_dist.errors import DataError
from ig_dist.terminal import console

MOST_LINE_BYTES = 2**20  # what is longer was not written by us


def append(file: Path, line: Mapping[str, Any]) -> None:
    """Add a line, whole or not at all; one that a kill cut off before it is ended.

    Raises:
        OSError: there is no space, no folder, or no right to it.
    """
    _append(file, _encoded(line))


def read_lines(file: Path, *, last_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """Objects of a file; what was cut off, is being written or is no object is passed over.

    Args:
        file: of no lines where none is, or no regular one: a pipe would be waited for.
        last_bytes: only those in so many bytes at its end.

    Raises:
        OSError: it cannot be read.
    """
    if not file.is_file():
        return
    with file.open("rb") as lines:
        if last_bytes is not None:
            lines.seek(max(0, file.stat().st_size - last_bytes))
        for line in iter(partial(lines.readline, MOST_LINE_BYTES), b""):
            with suppress(ValueError, RecursionError):
                found = json.loads(line)
                if isinstance(found, dict):
                    yield found


class LineFile:
    """A file that a run appends to. A line that finds no space waits for the next; then one is told."""

    def __init__(self, file: Path) -> None:
        self._file, self._waiting = file, b""

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line, whole or not at all."""
        told = bool(self._waiting)
        self._waiting += _encoded(line)
        try:
            _append(self._file, self._waiting)
        except FileNotFoundError:
            raise DataError(f"run.dir {self._file.parent} is gone while the run goes on: start it again") from None
        except OSError as error:
            if not told:
                console.print(f"{self._file}: {error.strerror}: the run goes on, and its lines wait for space")
        else:
            self._waiting = b""


def _encoded(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _append(file: Path, lines: bytes) -> None:
    with file.open("a+b", buffering=0) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size and os.pread(opened.fileno(), 1, size - 1) != b"\n":
            lines = b"\n" + lines
        try:
            if opened.write(lines) != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            opened.truncate(size)
            raise
