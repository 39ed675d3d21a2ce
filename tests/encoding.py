"""The command that encodes, as the tests type it, over a small ImageNet."""

from __future__ import annotations

import shlex
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
