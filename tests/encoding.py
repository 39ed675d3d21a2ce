"""The command that encodes, as the tests type it, over a small ImageNet."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path

SCRIPT = "data_prep/encode_latents.py"
SIZE = 16
SHARDS = 15  # 240 files in shards of 16
USUAL = f"--image-size {SIZE} --samples-per-shard 16 --workers 0"
Encode = Callable[..., tuple[int, str, str]]
"""Runs the command: exit code, stdout, stderr."""


def arguments(source: Path | str, dest: Path | str, options: str, usual: str = USUAL) -> list[str]:
    """The command; of an option given twice the last counts."""
    return [SCRIPT, "--source", str(source), "--dest", str(dest), *shlex.split(f"{usual} {options}")]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def usually_named(files: dict[str, bytes]) -> dict[str, bytes]:
    """Files as they would be if no shard had found its usual name taken."""
    index = re.sub(rb"(shard-\d{6})\.[0-9a-f]{16}\.tar", rb"\1.tar", files["index.json"])
    renamed = {re.sub(r"(shard-\d{6})\.[0-9a-f]{16}\.tar", r"\1.tar", name): data for name, data in files.items()}
    assert len(renamed) == len(files)
    return renamed | {"index.json": index}


def slow_links() -> None:
    """In a worker: a kill then finds it with a temporary file, more often than not."""
    link = os.link

    def slow(temporary: str, target: str) -> None:
        time.sleep(0.15)
        link(temporary, target)

    os.link = slow  # type: ignore[assignment]
