"""Whose fault it was: what a job tells its launcher when some of its ranks are to blame for its end."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

VARIABLE = "IG_DIST_BLAME"  # a launcher that wants to know names a file here: ranks are appended to it, one a line

_FAILURE_NAME = "failure"


def blame(ranks: Iterable[int]) -> None:
    """Name ranks to the launcher, where there is one that asks."""
    if file := os.environ.get(VARIABLE):
        with Path(file).open("a", encoding="utf-8") as stream:
            stream.writelines(f"{rank}\n" for rank in ranks)


def note_failure(rank: int, text: str) -> None:
    """Leave the launcher that asks for it the line of the first rank that failed."""
    if file := os.environ.get(VARIABLE):
        with contextlib.suppress(OSError), Path(file).with_name(_FAILURE_NAME).open("x", encoding="utf-8") as stream:
            stream.write(f"rank {rank}: {text}")


def noted_failure(file: Path) -> str:
    """The line of the first rank that failed, beside the file of the blame; empty: none has left one."""
    noted = file.with_name(_FAILURE_NAME)
    return noted.read_text(encoding="utf-8") if noted.exists() else ""


def blamed(file: Path) -> set[int]:
    """The ranks that were named in a file."""
    return set(map(int, file.read_text(encoding="utf-8").split())) if file.exists() else set()
