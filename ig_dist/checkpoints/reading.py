"""Reading a checkpoint by many ranks: each byte once, by one of them, in large requests, and checked as it comes.

The files are cut into parts of at most ``PART_BYTES``, each with a CRC. Laid end to end they are shared out evenly, so
that a start costs a rank 1/W of the checkpoint, whatever engine and number of ranks saved it. What a rank needs of the
others' shares comes over the network between them (``exchange.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from zlib_ng import zlib_ng

from ig_dist.checkpoints.snapshot import ALIGNMENT, DTYPE_NAMES, PART_BYTES
from ig_dist.errors import DamagedError
from ig_dist.storage.background import in_parallel
from ig_dist.storage.faults import Patience, intact
from ig_dist.storage.files import REQUEST_BYTES, open_url, read_range

_THREADS = 8

Share = dict[int, tuple[Tensor, int]]
"""What a rank has read of parts, by their place in ``parts_of``: the bytes of a request, and where among them it is."""


class Part(NamedTuple):
    """Bytes of a file that have a CRC of their own."""

    file: int
    begin: int
    end: int
    crc32: int
    tensor: str
    """Whose bytes they are; empty: the file's header."""
    at: int
    """Place of the first one among the bytes of the flattened tensor."""

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.end - self.begin


def parts_of(manifest: Mapping[str, Any]) -> list[Part]:
    """All files of a checkpoint, part by part, file after file."""
    parts = []
    for number, file in enumerate(manifest["files"]):
        size, crc32 = file["header"]
        parts.append(Part(number, 0, size, crc32, "", 0))
    for name, entry in manifest["tensors"].items():
        width = DTYPE_NAMES[entry["dtype"]].itemsize
        for number, start, stop, begin, crcs in entry["pieces"]:
            size = (stop - start) * width
            for crc32, first in zip(crcs, range(0, size, PART_BYTES), strict=True):
                last = min(first + PART_BYTES, size)
                parts.append(Part(number, begin + first, begin + last, crc32, name, start * width + first))
    return sorted(parts)


def owners(parts: Sequence[Part], world_size: int) -> list[int]:
    """The rank that reads each part: runs of parts, of as many bytes as can be for each rank."""
    total = sum(part.size for part in parts)
    ranks, done = [], 0
    for part in parts:
        ranks.append(min(done * world_size // max(total, 1), world_size - 1))
        done += part.size
    return ranks


def requests(parts: Sequence[Part], numbers: Sequence[int]) -> list[list[int]]:
    """Parts, by number, that one request reads: neighbours in a file, up to ``REQUEST_BYTES``.

    A tensor that is no larger is not cut in two.
    """
    runs: list[list[int]] = []
    for _, piece in groupby(numbers, lambda number: (parts[number].file, parts[number].tensor)):
        whole = list(piece)
        fits = parts[whole[-1]].end - parts[whole[0]].begin <= REQUEST_BYTES
        for more in [whole] if fits else [[number] for number in whole]:
            begin, end, file = parts[more[0]].begin, parts[more[-1]].end, parts[more[0]].file
            first, last = (parts[runs[-1][0]], parts[runs[-1][-1]]) if runs else (parts[more[0]],) * 2
            if runs and (last.file, last.end) == (file, begin) and end - first.begin <= REQUEST_BYTES:
                runs[-1] += more
            else:
                runs.append(more)
    return runs


def read_share(
    url: str, manifest: Mapping[str, Any], rank: int, world_size: int, patience: Patience, *, keep: bool
) -> Share:
    """Read and check this rank's share of a checkpoint.

    Args:
        url: of its folder.
        manifest: of it.
        rank: this one.
        world_size: ranks that share the reading.
        patience: how long faults of the storage are borne.
        keep: the bytes; otherwise they are checked only.

    Raises:
        DamagedError: bytes differ from what was saved, or are not there.
        DataError: the storage fails beyond the deadline.
    """
    mine = [number for number, owner in enumerate(owners(parts_of(manifest), world_size)) if owner == rank]
    share: Share = {}
    read_parts(url, manifest, mine, patience, share.update if keep else lambda found: None)
    return share


def read_parts(
    url: str, manifest: Mapping[str, Any], numbers: Sequence[int], patience: Patience, take: Callable[[Share], object]
) -> None:
    """Read and check parts of a checkpoint, by their place in ``parts_of``, with several requests at a time.

    Args:
        url: of its folder.
        manifest: of it.
        numbers: of the parts.
        patience: how long faults of the storage are borne.
        take: called with the parts of each request.

    Raises:
        DamagedError: bytes differ from what was saved, or are not there.
        DataError: the storage fails beyond the deadline.
    """
    parts = parts_of(manifest)

    def read(run: list[int]) -> None:
        first, last = parts[run[0]], parts[run[-1]]
        name = manifest["files"][first.file]["name"]
        fs, path = open_url(f"{url}/{name}", "checkpoint.url", patience)
        # numpy asks for huge pages: the kernel clears and maps new memory several times faster
        memory = torch.from_numpy(np.empty(last.end - first.begin + ALIGNMENT, dtype=np.uint8))
        memory = memory[-memory.data_ptr() % ALIGNMENT :][: last.end - first.begin]
        found = {n: slice(parts[n].begin - first.begin, parts[n].end - first.begin) for n in run}

        def checked() -> None:
            data = read_range(fs, path, first.begin, last.end, patience, into=memory.numpy().data)
            for n, place in found.items():
                if zlib_ng.crc32(data[place]) != parts[n].crc32:
                    what = f"tensor {parts[n].tensor!r}" if parts[n].tensor else "its header"
                    raise DamagedError(f"{name}: {what} is damaged (its CRC differs)")

        try:
            intact(fs, path, checked, patience)
        except OSError as error:
            raise DamagedError(f"{name}: {error.strerror or error}") from None
        take({n: (memory, place.start) for n, place in found.items()})

    in_parallel(read, requests(parts, numbers), _THREADS)
