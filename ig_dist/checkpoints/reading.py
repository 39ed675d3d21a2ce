"""Reading a checkpoint by many ranks: each byte once, by one of them, in large requests, and checked as it comes.

The files are cut into parts of at most ``PART_BYTES``, each with a CRC. Laid end to end they are shared out evenly, so
that a start costs a rank 1/W of the checkpoint, whatever engine and number of ranks saved it. What a rank needs of the
others' shares comes over the network between them (``exchange.py``).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from zlib_ng import zlib_ng

from ig_dist.checkpoints.snapshot import ALIGNMENT, DTYPE_NAMES, PART_BYTES
from ig_dist.errors import DamagedError, DataError
from ig_dist.storage.background import in_parallel
from ig_dist.storage.faults import Patience, intact
from ig_dist.storage.files import REQUEST_BYTES, open_url, read_range

_THREADS = 8


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


Share = dict[Part, tuple[Tensor, int]]
"""What a rank has read: for each part the bytes of a request, and where among them it is."""


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


def requests(parts: Iterable[Part]) -> list[list[Part]]:
    """The parts that one request reads: neighbours in a file, up to ``REQUEST_BYTES``.

    A tensor that is no larger is not cut in two.
    """
    runs: list[list[Part]] = []
    for _, piece in groupby(parts, lambda part: (part.file, part.tensor)):
        whole = list(piece)
        for more in [whole] if _fit(whole[0], whole[-1]) else [[part] for part in whole]:
            if not runs or runs[-1][-1].end != more[0].begin or not _fit(runs[-1][0], more[-1]):
                runs.append([])
            runs[-1] += more
    return runs


def _fit(first: Part, last: Part) -> bool:
    """Whether one request may read from the first part to the last."""
    return first.file == last.file and last.end - first.begin <= REQUEST_BYTES


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found: what it holds, and how its bytes are read, each of them checked."""

    url: str
    manifest: dict[str, Any]
    patience: Patience = field(default_factory=Patience)
    share: Share = field(default_factory=dict, compare=False, repr=False)
    """What this rank has read of it for all of them; empty unless it was asked for."""

    @property
    def step(self) -> int:
        """Global batches consumed."""
        return int(self.manifest["step"])

    @property
    def meta(self) -> dict[str, Any]:
        """What the trainer stored beside the tensors."""
        return dict(self.manifest["meta"])

    @property
    def optimizer_steps(self) -> int:
        """Updates that the optimizer had made."""
        return int(self.manifest["meta"]["optimizer_steps"])

    @property
    def sha256(self) -> str:
        """Hash of the manifest, which holds the hashes of all files."""
        return str(self.manifest["sha256"])

    @cached_property
    def parts(self) -> list[Part]:
        """All its bytes."""
        return parts_of(self.manifest)

    def names(self, group: str) -> list[str]:
        """Names of the tensors of a group (``model``, ``exp_avg``, ``ema/0.9999``), without the group."""
        return [n.removeprefix(f"{group}/") for n in self.manifest["tensors"] if n.startswith(f"{group}/")]

    def entry(self, name: str) -> dict[str, Any]:
        """Shape, dtype and pieces of a tensor, which must be there."""
        entry: dict[str, Any] | None = self.manifest["tensors"].get(name)
        if entry is None:
            raise DataError(f"{self.url} holds no tensor {name!r}: it was saved by a run with other settings")
        return entry

    def read(self, name: str) -> Tensor:
        """A whole tensor, as ``tensors``."""
        return self.tensors([name])[name]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors, on the CPU.

        Raises:
            DataError: the checkpoint has no such tensor, or a damaged one, or the storage fails beyond the deadline.
        """
        entries = {name: self.entry(name) for name in names}
        whole = {name: torch.empty(e["shape"], dtype=DTYPE_NAMES[e["dtype"]]) for name, e in entries.items()}

        def put(found: Share) -> None:
            for part, (memory, at) in found.items():
                into = whole[part.tensor].view(-1).view(torch.uint8)
                into[part.at : part.at + part.size] = memory[at : at + part.size]

        try:
            self._read([part for part in self.parts if part.tensor in whole], put)
        except DamagedError as error:
            raise DataError(
                f"{self.url}/{error}: restore the file, or delete that checkpoint to go on from the one before"
            ) from None
        return whole

    def read_share(self, rank: int, world_size: int, *, keep: bool) -> Share:
        """Read and check this rank's share of all bytes, of which nothing is held unless it is to ``keep`` them.

        Raises:
            DamagedError: bytes differ from what was saved, or are not there.
            DataError: the storage fails beyond the deadline.
        """
        share: Share = {}
        shared_out = zip(self.parts, owners(self.parts, world_size), strict=True)
        mine = [part for part, owner in shared_out if owner == rank]
        self._read(mine, share.update if keep else lambda found: None)
        return share

    def _read(self, parts: Sequence[Part], take: Callable[[Share], object]) -> None:
        """Read and check parts, with several requests at a time; ``take`` is given the parts of each."""

        def read(run: list[Part]) -> None:
            first, last = run[0], run[-1]
            name = self.manifest["files"][first.file]["name"]
            fs, path = open_url(f"{self.url}/{name}", "checkpoint.url", self.patience)
            # numpy asks for huge pages: the kernel clears and maps new memory several times faster
            memory = torch.from_numpy(np.empty(last.end - first.begin + ALIGNMENT, dtype=np.uint8))
            memory = memory[-memory.data_ptr() % ALIGNMENT :][: last.end - first.begin]

            def checked() -> None:
                data = read_range(fs, path, first.begin, last.end, into=memory.numpy().data)
                for part in run:
                    if zlib_ng.crc32(data[part.begin - first.begin : part.end - first.begin]) != part.crc32:
                        what = f"tensor {part.tensor!r}" if part.tensor else "its header"
                        raise DamagedError(f"{name}: {what} is damaged (its CRC differs)")

            try:
                intact(fs, path, checked)
            except OSError as error:
                raise DamagedError(f"{name}: {error.strerror or error}") from None
            take({part: (memory, part.begin - first.begin) for part in run})

        in_parallel(read, requests(parts), _THREADS)
