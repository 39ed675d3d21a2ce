"""A whole checkpoint, opened: its tensors one by one, each byte checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from zlib_ng import zlib_ng

from ig_dist.checkpoints.reading import READS, Share
from ig_dist.checkpoints.snapshot import DTYPE_NAMES, PART_BYTES, SMALL_BYTES
from ig_dist.errors import DataError
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import REQUEST_BYTES, open_url, read_range

_MOST_BLOCKS = 64


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, opened for reading."""

    url: str
    manifest: dict[str, Any]
    patience: Patience = field(default_factory=Patience)
    share: Share = field(default_factory=dict, compare=False, repr=False)
    """What this rank has read of it for all of them; empty unless it was asked for."""
    _blocks: dict[tuple[str, int], memoryview] = field(default_factory=dict, compare=False, repr=False)

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
        return int(self.meta["optimizer_steps"])

    @property
    def sha256(self) -> str:
        """Hash of the manifest, which holds the hashes of all files."""
        return str(self.manifest["sha256"])

    def names(self, group: str) -> list[str]:
        """Names of the tensors of a group (``model``, ``exp_avg``, ``ema/0.9999``), without the group."""
        return [n.removeprefix(f"{group}/") for n in self.manifest["tensors"] if n.startswith(f"{group}/")]

    def entry(self, name: str) -> dict[str, Any]:
        """Shape, dtype and pieces of a tensor.

        Raises:
            DataError: the checkpoint has no such tensor.
        """
        entry: dict[str, Any] | None = self.manifest["tensors"].get(name)
        if entry is None:
            raise DataError(f"{self.url} holds no tensor {name!r}: it was saved by a run with other settings")
        return entry

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the CPU.

        Raises:
            DataError: the checkpoint has no such tensor, or a damaged one, or the storage fails beyond the deadline.
        """
        entry = self.entry(name)
        flat = torch.empty(entry["shape"], dtype=DTYPE_NAMES[entry["dtype"]]).view(-1)
        for file, start, stop, at, crcs in entry["pieces"]:
            if stop > start:
                size = (stop - start) * flat.element_size()
                data = self._read_piece(self.manifest["files"][file], name, at, at + size, crcs)
                flat[start:stop] = torch.frombuffer(data, dtype=flat.dtype)
        return flat.view(entry["shape"])

    def _read_piece(self, file: dict[str, Any], name: str, begin: int, end: int, crcs: list[int] | int) -> bytearray:
        """Bytes ``begin`` to ``end`` of a file, as they were saved: read again where they are not."""
        fs, path = open_url(f"{self.url}/{file['name']}", "checkpoint.url", self.patience)
        crcs, part = (crcs, PART_BYTES) if isinstance(crcs, list) else ([crcs], end - begin)  # format 2 has one
        for tries_left in reversed(range(READS)):
            try:
                data = self._range(fs, path, begin, end, file["bytes"])
            except OSError as error:
                raise DataError(f"{self.url}/{file['name']}: {error.strerror or error}: restore the file") from None
            if [zlib_ng.crc32(data[first : first + part]) for first in range(0, len(data), part)] == crcs:
                return data
            self._blocks.clear()
            if tries_left:
                self.patience.count(f"{self.url}/{file['name']}", DataError(f"tensor {name!r} has another CRC"), 0.0)
        raise DataError(
            f"{self.url}/{file['name']}: tensor {name!r} is damaged (its CRC differs): restore the file, or delete that"
            " checkpoint to go on from the one before"
        )

    def _range(self, fs: Any, path: str, begin: int, end: int, size: int) -> bytearray:
        """Bytes ``begin`` to ``end`` of a file of ``size``; small ranges by blocks, in which their neighbours lie."""
        if end - begin < SMALL_BYTES:
            numbers = range(begin // SMALL_BYTES, -(-end // SMALL_BYTES))
            skipped = numbers.start * SMALL_BYTES
            blocks = b"".join(self._block(fs, path, number, size) for number in numbers)
            return bytearray(blocks[begin - skipped : end - skipped])
        data = bytearray(end - begin)
        for start in range(begin, end, REQUEST_BYTES):
            stop = min(start + REQUEST_BYTES, end)
            data[start - begin : stop - begin] = read_range(fs, path, start, stop, self.patience)
        return data

    def _block(self, fs: Any, path: str, number: int, size: int) -> memoryview:
        if (path, number) not in self._blocks:
            if len(self._blocks) == _MOST_BLOCKS:
                self._blocks.clear()
            start = number * SMALL_BYTES
            self._blocks[path, number] = read_range(fs, path, start, min(start + SMALL_BYTES, size), self.patience)
        return self._blocks[path, number]
