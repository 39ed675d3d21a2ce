"""Paths and URLs: one way to open them, and files that are whole or not there."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import fsspec

from ig_dist.errors import ConfigError


def open_url(url: str, what: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path within it.

    Raises:
        ConfigError: unknown protocol, or one whose package is not installed; ``what`` names the setting.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url.rstrip("/"))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{what} {url!r}: {' '.join(str(error).split())}") from None
    return fs, str(path)


def is_local(fs: Any) -> bool:
    """Whether the file system is this machine's own."""
    return "file" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def write_whole(fs: Any, path: str, data: bytes) -> None:
    """Write a file that is whole or not there, also when several processes write the same one."""
    if not is_local(fs):
        fs.pipe_file(path, data)  # an object appears when it is complete
        return
    temporary = Path(f"{path}.{uuid.uuid4().hex}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
