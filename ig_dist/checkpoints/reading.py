"""Reading a checkpoint by many ranks: each byte once, by one of them, in large requests, and checked as it comes.

The files are cut into parts of at most ``PART_BYTES``, each with a CRC. Laid end to end they are shared out evenly, so
that a start costs a rank 1/W of the checkpoint, whatever engine and number of ranks saved it. What a rank needs of the
others' shares comes over the network between them (``exchange.py``).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from zlib_ng import zlib_ng

from ig_dist.background import in_parallel
from ig_dist.checkpoints.snapshot import DTYPE_NAMES, PART_BYTES
from ig_dist.errors import DamagedError
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import REQUEST_BYTES, open_url, read_range

READS = 4  # of the same bytes, before they are damaged and did not suffer on the way
_THREADS = 8

Share = dict[int, memoryview]
"""What a rank has read: the bytes of parts, by their place in ``parts_of``."""


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


def parts_of(manifest: Mapping[str, Any]) -> list[Part]:
    """All files of a checkpoint, part by part, file after file."""
    parts = []
    for number, file in enumerate(manifest["files"]):
        if "header" in file:  # not in checkpoints of format 2
            size, crc32 = file["header"]
            parts.append(Part(number, 0, size, crc32, "", 0))
    for name, entry in manifest["tensors"].items():
        width = DTYPE_NAMES[entry["dtype"]].itemsize
        for number, start, stop, begin, crcs in entry["pieces"]:
            size = (stop - start) * width
            step = PART_BYTES if isinstance(crcs, list) else max(size, 1)  # format 2 has one CRC for a piece
            for crc32, first in zip(crcs if isinstance(crcs, list) else [crcs], range(0, size, step), strict=False):
                last = min(first + step, size)
                parts.append(Part(number, begin + first, begin + last, crc32, name, start * width + first))
    return sorted(parts)


def owners(parts: Sequence[Part], world_size: int) -> list[int]:
    """The rank that reads each part: runs of parts, of as many bytes as can be for each rank."""
    total = sum(part.end - part.begin for part in parts)
    ranks, done = [], 0
    for part in parts:
        ranks.append(min(done * world_size // max(total, 1), world_size - 1))
        done += part.end - part.begin
    return ranks


def requests(parts: Sequence[Part], numbers: Sequence[int]) -> list[list[int]]:
    """Parts, by number, that one request reads: neighbours in a file, up to ``REQUEST_BYTES``."""
    runs: list[list[int]] = []
    for number in numbers:
        part = parts[number]
        first, last = (parts[runs[-1][0]], parts[runs[-1][-1]]) if runs else (part, part)
        joins = runs and (last.file, last.end) == (part.file, part.begin) and part.end - first.begin <= REQUEST_BYTES
        runs[-1].append(number) if joins else runs.append([number])
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
    parts = parts_of(manifest)
    mine = [number for number, owner in enumerate(owners(parts, world_size)) if owner == rank]
    share: Share = {}

    def read(run: list[int]) -> None:
        first, last = parts[run[0]], parts[run[-1]]
        name = manifest["files"][first.file]["name"]
        fs, path = open_url(f"{url}/{name}", "checkpoint.url", patience)
        for tries_left in reversed(range(READS)):
            try:
                data = read_range(fs, path, first.begin, last.end, patience)
            except OSError as error:
                raise DamagedError(f"{name}: {error.strerror or error}") from None
            found = {n: data[parts[n].begin - first.begin : parts[n].end - first.begin] for n in run}
            bad = [n for n, part in found.items() if zlib_ng.crc32(part) != parts[n].crc32]
            if not bad:
                break
            what = f"tensor {parts[bad[0]].tensor!r}" if parts[bad[0]].tensor else "its header"
            if not tries_left:
                raise DamagedError(f"{name}: {what} is damaged (its CRC differs)")
            patience.count(f"{url}/{name}", DamagedError(f"{what} has another CRC"), 0.0)
        if keep:
            share.update(found)

    in_parallel(read, requests(parts, mine), _THREADS, threading.Event())
    return share
