"""Places to write to: the cache, and whether another one can be written.

That is found out by writing: permissions, mounts and stores each have rules of their own.
"""

import grp
import os
import pwd
import stat
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


def others_may_change(folder: Path, *, code: bool = False) -> str:
    """Empty, or the folder or parent in which any user may put other files in place of ours.

    In a sticky folder, such as /tmp, one may only change what is one's own: what we made there must be ours.

    Args:
        folder: one that is there.
        code: what is kept there runs: nor may a group, but one that has this user's name.
    """
    ours = folder.resolve()
    if ours.stat().st_uid != os.getuid():
        return str(ours)
    for place in (ours, *ours.parents):
        found = place.stat()
        open_to = stat.S_IWOTH | (stat.S_IWGRP if code and not _is_own_group(found.st_gid) else 0)
        if found.st_mode & open_to and not found.st_mode & stat.S_ISVTX:
            return str(place)
    return ""


def _is_own_group(number: int) -> bool:
    """Whether a group is this user's alone: root's, or the one that was made with the user and has the same name."""
    try:
        return number == 0 or grp.getgrgid(number).gr_name == pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return False
