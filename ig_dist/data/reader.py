"""Reading samples of a shard by byte range, checked."""

from __future__ import annotations

import zlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ig_dist.data.index import ShardIndex
from ig_dist.errors import DataError
from ig_dist.storage import open_url


class ShardReader:
    """Reads consecutive samples of a shard with one ranged read. Safe to call from several threads.

    Args:
        index: the opened shard index.
        on_corrupt: ``fail`` raises DataError at a damaged sample; ``skip`` returns None for it and remembers it.
    """

    def __init__(self, index: ShardIndex, on_corrupt: Literal["fail", "skip"] = "fail") -> None:
        self.quarantined: set[int] = set()
        self._index, self._on_corrupt = index, on_corrupt
        self._fs, self._path = open_url(index.folder, "data.index")
        self._shape, self._dtype = index.info.latent.stored_shape, np.dtype(index.info.latent.dtype)
        self._first_id = np.concatenate([[0], np.cumsum(index.shard_sizes)])

    def read(self, shard: int, start: int, stop: int) -> list[NDArray[np.generic] | None]:
        """Samples ``start`` to ``stop`` (exclusive) of a shard: views into the bytes read, (*stored shape) each.

        Raises:
            DataError: the shard is gone, or a sample is damaged and ``on_corrupt`` is ``fail``.
        """
        table, size = self._index.table, self._index.info.latent.stored_bytes
        path = f"{self._path}/{self._index.info.shards[shard].name}"
        first_id = int(self._first_id[shard])
        rows = slice(first_id + start, first_id + stop)
        offsets = table.offset[rows]
        begin = int(offsets.min())
        try:
            data = self._fs.cat_file(path, start=begin, end=int(offsets.max()) + size)
        except FileNotFoundError:
            raise DataError(f"{path} is gone: restore the shard and run again") from None
        except OSError as error:
            raise DataError(f"{path}: {' '.join(str(error).split())}: mend the storage and run again") from None
        samples: list[NDArray[np.generic] | None] = []
        for sample, offset, crc in zip(range(rows.start, rows.stop), offsets, table.crc32[rows], strict=True):
            raw = memoryview(data)[offset - begin : offset - begin + size]
            if len(raw) == size and zlib.crc32(raw) == crc:
                samples.append(np.frombuffer(raw, dtype=self._dtype).reshape(self._shape))
            elif self._on_corrupt == "skip":
                self.quarantined.add(sample)
                samples.append(None)
            else:
                raise DataError(
                    f"{path}: sample {sample} at byte {offset} is damaged (its CRC differs):"
                    " restore the shard, or train without such samples (data.on_corrupt=skip)"
                )
        return samples
