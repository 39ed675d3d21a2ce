"""Copies of what has no cheap random access: remote tars, and parquet files, become plain tars in a local folder.

A file is there when it is whole, so any number of processes of a machine may fill the folder together.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from rich.filesize import decimal
from rich.progress import track

from ig_dist.errors import ConfigError, DataError
from ig_dist.storage import retried
from ig_dist.terminal import console, is_main_process

_THREADS = 8


class SourceFile(NamedTuple):
    """A file of a source, local or remote."""

    fs: Any
    """Its fsspec file system."""
    path: str
    """Within that."""
    name: str
    size: int
    version: str
    """What the store tells of its content (an ETag); may be empty."""


Copy = Callable[[SourceFile, Path], None]
"""Writes the tar of a source file to a path."""


def spool_folder(files: Sequence[SourceFile], chosen: str | None) -> Path:
    """The folder for copies of these files: its name holds a hash over them.

    Args:
        files: what will be copied.
        chosen: the user's --spool, a folder for spools; None: one in the temporary folder.
    """
    text = "".join(f"{file.path}\0{file.size}\0{file.version}\n" for file in files)
    base = Path(chosen) if chosen else Path(tempfile.gettempdir()) / f"ig-dist-spool-{os.getuid()}"
    return base / hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def spool(files: Sequence[SourceFile], folder: Path, copy: Copy) -> list[Path]:
    """Copies of all files, in their order; those that exist are not made again.

    Raises:
        ConfigError: the folder cannot be made or belongs to another user, or has not enough space.
        DataError: a file cannot be copied.
    """
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--spool {folder} cannot be made ({error.strerror}): choose another folder") from None
    if folder.stat().st_uid != os.getuid():  # in a temporary folder that others write to as well
        raise ConfigError(f"{folder} belongs to another user: choose a folder for copies with --spool")
    # Names in two folders may be equal; the number keeps them apart.
    copies = [folder / f"{i:05d}-{Path(file.name).stem}.tar" for i, file in enumerate(files)]
    missing = [i for i, path in enumerate(copies) if not path.exists()]
    needed, free = sum(files[i].size for i in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"copying the source takes {decimal(needed)}, {folder} has {decimal(free)} free:"
            " choose a folder on a larger disk with --spool"
        )
    # Processes that begin together each take an order of their own, so that they seldom copy the same file.
    Random(uuid.uuid4().int).shuffle(missing)

    def make(i: int) -> None:
        if copies[i].exists():  # by another process, meanwhile
            return
        temporary = copies[i].with_name(f"{copies[i].name}.{uuid.uuid4().hex}.tmp")
        try:
            copy(files[i], temporary)
            temporary.replace(copies[i])
        except OSError as error:
            raise DataError(
                f"{files[i].path} cannot be copied to {folder} ({' '.join(str(error).split())}):"
                " run the same command again, or choose another folder with --spool"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)

    hidden = not missing or not is_main_process()
    with ThreadPoolExecutor(_THREADS) as pool:
        done = pool.map(make, missing)
        list(track(done, f"copy to {folder}", total=len(missing), console=console, disable=hidden))
    return copies


def copy_tar(file: SourceFile, target: Path) -> None:
    """A byte copy."""
    retried(file.fs, file.path, lambda: file.fs.get_file(file.path, str(target)))
    if target.stat().st_size != file.size:
        raise OSError(f"{target.stat().st_size} of {file.size} bytes arrived")
