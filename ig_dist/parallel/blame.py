"""Whose fault it was: what a job tells its launcher when some of its ranks are to blame for its end."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

VARIABLE = "IG_DIST_BLAME"
"""A launcher that wants to know names a file here: ranks are appended to it, one a line."""


def blame(ranks: Iterable[int]) -> None:
    """Name ranks to the launcher, where there is one that asks."""
    if file := os.environ.get(VARIABLE):
        with Path(file).open("a", encoding="utf-8") as stream:
            stream.writelines(f"{rank}\n" for rank in ranks)


def blamed(file: Path) -> set[int]:
    """The ranks that were named in a file."""
    return set(map(int, file.read_text(encoding="utf-8").split())) if file.exists() else set()
