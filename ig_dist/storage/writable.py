"""Places to write to: the cache, and whether another one can be written.

That is found out by writing: permissions, mounts and stores each have rules of their own.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path

from ig_dist.storage.files import open_url, write_whole
from ig_dist.storage.urls import is_local

CACHE_VARIABLE = "IG_DIST_CACHE"


def cache_folder() -> Path:
    """Where this user keeps what can be made again: ``$IG_DIST_CACHE``, or ``~/.cache/ig_dist``."""
    root = os.environ.get(CACHE_VARIABLE)
    return Path(root).expanduser() if root else Path.home() / ".cache/ig_dist"


def why_unwritable(url: str | Path) -> str:
    """Empty, or why a folder (a path or URL, that may not exist yet) cannot be written; nothing stays behind."""
    fs, path = open_url(str(url), "folder", web=False)
    try:
        if not is_local(fs):
            probe = f"{path}/.probe-{uuid.uuid4().hex}"
            write_whole(fs, probe, b"")
            fs.rm_file(probe)
            return ""
        folder = Path(path)
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)
