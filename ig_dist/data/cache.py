"""A node-local cache of shards, in blocks, shared by the processes of a node.

Which shards are kept is a function of the index and the byte cap alone: the first ones that fit. Nothing is counted,
locked or evicted. (Every epoch visits every shard once, in another order: whatever fits is hit once an epoch, and no
rule of eviction does better.) A block appears whole by a rename, so processes that read the same one at once write
the same bytes. Damage is found by the reader, which checks every sample that it hands out.
"""

import errno
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from ig_dist.data.index import ShardIndex
from ig_dist.errors import ConfigError
from ig_dist.storage.files import write_whole
from ig_dist.storage.urls import LOCAL
from ig_dist.terminal import console

_LEFT_S = 3600.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BlockCache:
    """Blocks of an index' shards, ``cap`` bytes at most, in a folder of the index' own in ``folder``.

    Raises:
        ConfigError: the folder cannot be made or written.
    """

    def __init__(self, folder: str, cap: int, index: ShardIndex) -> None:
        self._folder = Path(folder).expanduser() / index.sha256[:16]
        self.full = False  # nothing more is kept
        self._lock = threading.Lock()
        if self._folder.is_symlink():  # what is left over would be removed where it leads
            raise ConfigError(f"data.cache_dir {self._folder} is a link: remove it, or choose another folder")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as probe:
                probe.write(b"probe")
        except OSError as error:
            if error.errno not in _FULL:
                raise ConfigError(
                    f"data.cache_dir {folder}: {error.strerror}: choose a folder on a local disk that you may write"
                ) from None
            self._stop_keeping(error)  # what is there already still serves
        for left in self._folder.glob("*.tmp"):  # of killed processes: writing a block takes no time
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > _LEFT_S:
                    left.unlink()
        # offsets and names are known: a shard's last byte counts, its tar padding does too
        self.shards = int(np.searchsorted(np.cumsum([shard.bytes for shard in index.info.shards]), cap, side="right"))
        """Number of the first ones, whose blocks are kept."""

    def put(self, shard: int, block: int, data: memoryview) -> None:
        """Keep a block. When the disk is full, this process says so once and keeps no more."""
        if self.full:
            return
        try:
            write_whole(LOCAL, self.path(shard, block), data)
        except OSError as error:
            self._stop_keeping(error)

    def _stop_keeping(self, error: OSError) -> None:
        with self._lock:
            if not self.full:
                console.print(
                    f"data.cache_dir {self._folder}: {error.strerror}: goes on without keeping more;"
                    " free space, or lower data.cache_bytes"
                )
            self.full = True

    def drop(self, shard: int, block: int) -> None:
        """Forget a block that turned out damaged."""
        Path(self.path(shard, block)).unlink(missing_ok=True)

    def path(self, shard: int, block: int) -> str:
        """The file of a block."""
        return f"{self._folder}/{shard:06d}-{block:05d}.bin"
