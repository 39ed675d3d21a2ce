"""Checkpoints: one format for every engine and world size, whole or not there, and nothing in it is code.

    <url>/step_0000001200/rank_00000.1f0c....safetensors ...   the pieces that each rank wrote, named by their hash
    <url>/step_0000001200/rank_00001.<save>.json               what that rank says of them; gone after the save
    <url>/step_0000001200/manifest.json                        written last: names, shapes, pieces, CRCs, sizes, sha256

The unit is the global tensor; a piece is a range of its flattened elements, which is what every engine's shard is.
A folder without a manifest does not exist; one whose manifest or files do not match is reported and passed over.
Saving is in ``saving.py``: here is what is found, read and deleted.
"""

from __future__ import annotations

import contextlib
import logging
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor
from zlib_ng import zlib_ng

from ig_dist.background import in_background
from ig_dist.checkpoints.manifest import MANIFEST as MANIFEST
from ig_dist.checkpoints.manifest import check_pieces, folder_name, inspect
from ig_dist.checkpoints.snapshot import DTYPE_NAMES, SMALL_BYTES
from ig_dist.checkpoints.snapshot import Piece as Piece
from ig_dist.errors import ConfigError, DataError
from ig_dist.parallel.agreement import meet
from ig_dist.parallel.dist import Dist, from_main
from ig_dist.storage.faults import Patience, retried
from ig_dist.storage.files import REQUEST_BYTES, list_sizes, open_url, read_range
from ig_dist.storage.s3 import abort_orphaned_uploads
from ig_dist.storage.urls import once

_MOST_BLOCKS = 64
_READS = 4  # of a piece, before it is damaged and did not suffer on the way
_TIDYING_S = 30.0  # how long is tried what need not succeed
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, opened for reading."""

    url: str
    manifest: dict[str, Any]
    patience: Patience = field(default_factory=Patience)
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

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the CPU.

        Raises:
            DataError: the checkpoint has no such tensor, not all of it, or a damaged one, or the storage fails beyond
                the deadline.
        """
        entry = self.manifest["tensors"].get(name)
        if entry is None:
            raise DataError(f"{self.url} holds no tensor {name!r}: it was saved by a run with other settings")
        if entry["dtype"] not in DTYPE_NAMES:
            raise DataError(f"{self.url}: tensor {name!r} has an unknown dtype {entry['dtype']!r}")
        entry = {**entry, "pieces": sorted(entry["pieces"], key=lambda piece: piece[1:])}
        check_pieces(name, entry)
        flat = torch.empty(entry["shape"], dtype=DTYPE_NAMES[entry["dtype"]]).view(-1)
        for file, start, stop, at, crc32 in entry["pieces"]:
            if stop > start:
                size = (stop - start) * flat.element_size()
                data = self._read_piece(self.manifest["files"][file], name, at, at + size, crc32)
                flat[start:stop] = torch.frombuffer(data, dtype=flat.dtype)
        return flat.view(entry["shape"])

    def _read_piece(self, file: dict[str, Any], name: str, begin: int, end: int, crc32: int) -> bytearray:
        """Bytes ``begin`` to ``end`` of a file, as they were saved: read again where they are not."""
        fs, path = open_url(f"{self.url}/{file['name']}", "checkpoint.url", self.patience)
        for tries_left in reversed(range(_READS)):
            try:
                data = self._range(fs, path, begin, end, file["bytes"])
            except OSError as error:
                raise DataError(f"{self.url}/{file['name']}: {error.strerror or error}: restore the file") from None
            if zlib_ng.crc32(data) == crc32:
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


class CheckpointStore:
    """The checkpoints in a folder: what there is, what is whole, what is deleted.

    Args:
        url: folder, a path or any fsspec URL.
        keep_last: the newest checkpoints that are kept.
        keep_every: also keep steps that are a multiple of this; 0: none.
        patience: how long faults of the storage are borne.
    """

    def __init__(self, url: str, *, keep_last: int = 2, keep_every: int = 0, patience: Patience | None = None) -> None:
        self.patience = patience or Patience()
        fs, self.path = open_url(url, "checkpoint.url", self.patience)
        self.fs = once(fs)  # each call says what it is worth retrying
        self.url, self._keep_last, self._keep_every = url.rstrip("/"), keep_last, keep_every
        self.damaged: set[int] = set()
        """Steps whose checkpoints were found damaged: they may be written over."""

    def latest(self, dist: Dist) -> Checkpoint | None:
        """The newest whole checkpoint; damaged ones are reported and passed over. COLLECTIVE.

        Raises:
            DataError: there are checkpoints and none of them is whole, or the storage fails beyond the deadline.
        """
        found = self._on_main(self._newest_whole, dist)
        if isinstance(found, str):
            raise DataError(found)
        return None if found is None else self._opened(found)

    def at(self, step: int, dist: Dist) -> Checkpoint:
        """The checkpoint of one step. COLLECTIVE.

        Raises:
            ConfigError: there is none, or it is damaged.
            DataError: the storage fails beyond the deadline.
        """
        found = self._on_main(partial(self._whole_at, step), dist)
        if isinstance(found, str):
            raise DataError(found)
        manifest, problem, steps = found
        if manifest is None:
            there = ", ".join(map(str, steps)) or "none"
            raise ConfigError(f"{self.url} has no whole checkpoint of step {step} ({problem}); there are: {there}")
        return self._opened(manifest)

    def agreed_steps(self, dist: Dist) -> list[int]:
        """``steps``, as rank 0 sees them. COLLECTIVE.

        Raises:
            DataError: the storage fails beyond the deadline.
        """
        found: list[int] | str = self._on_main(self.steps, dist)
        if isinstance(found, str):
            raise DataError(found)
        return found

    def steps(self) -> list[int]:
        """Steps that have a manifest, ascending; they need not be whole."""
        return [step for step, whole in sorted(self.folders().items()) if whole]

    def folders(self) -> dict[int, bool]:
        """Step of each checkpoint folder, and whether it has a manifest."""
        self.fs.invalidate_cache()
        try:
            paths = retried(self.fs, self.path, lambda: self.fs.ls(self.path, detail=False), self.patience)
        except (FileNotFoundError, NotADirectoryError):  # what is in the way is said when the run directory is claimed
            return {}
        steps = [int(match[1]) for p in paths if (match := re.fullmatch(r"step_(\d{10})", PurePosixPath(p).name))]
        return {step: MANIFEST in list_sizes(self.fs, self.folder(step), self.patience) for step in steps}

    def folder(self, step: int) -> str:
        """Path of a step's folder within the file system."""
        return f"{self.path}/{folder_name(step)}"

    def delete_torn(self, before: int, folders: dict[int, bool]) -> None:
        """Delete what older cut-off saves left, before a new one needs the space."""
        for step in [step for step, whole in folders.items() if not whole and step < before]:
            self._delete(step, folders.pop(step))

    def retain(self, newest: int, folders: dict[int, bool]) -> None:
        """Delete what the retention rule does not keep.

        What is newer than the checkpoint just written was found damaged: it does not count, and is written over.
        """
        whole = [step for step in sorted(folders) if folders[step] and step <= newest]
        keep = set(whole[-self._keep_last :])
        if self._keep_every:
            keep |= {step for step in whole if step % self._keep_every == 0}
        for step, has_manifest in folders.items():
            if step not in keep and step < newest:
                self._delete(step, has_manifest)

    def abort_orphans(self, path: str = "") -> None:
        """Abort uploads below a path (all) that killed processes left. Only while nobody saves there."""
        patience = Patience(self.patience.stall_s, min(self.patience.deadline_s, _TIDYING_S), self.patience.stop)
        try:
            abort_orphaned_uploads(self.fs, path or self.path, patience)
        except (OSError, DataError) as error:  # they cost money, not the run
            log.warning("uploads that were cut off in %s were not deleted: %s", self.url, error)

    def remove(self, path: str) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            retried(self.fs, path, lambda: self.fs.rm_file(path), self.patience)

    def _delete(self, step: int, has_manifest: bool) -> None:
        folder = self.folder(step)
        if has_manifest:
            self.remove(f"{folder}/{MANIFEST}")  # first: what is half deleted must not exist
        with contextlib.suppress(FileNotFoundError):
            retried(self.fs, folder, lambda: self.fs.rm(folder, recursive=True), self.patience)
        self.abort_orphans(folder)

    def _opened(self, manifest: dict[str, Any]) -> Checkpoint:
        return Checkpoint(f"{self.url}/{folder_name(manifest['step'])}", manifest, self.patience)

    def _on_main(self, function: Any, dist: Dist) -> Any:
        """What a function finds on rank 0, or the words of its DataError. COLLECTIVE, however long it takes."""
        work = in_background(function) if dist.is_main else None
        meet(work, dist)
        try:
            found = None if work is None else work.result()
        except DataError as error:
            found = str(error)
        except OSError as error:
            found = f"{self.url}: {error.strerror or error}: see that the folder can be read"
        return from_main(found, dist)

    def _whole_at(self, step: int) -> tuple[dict[str, Any] | None, str, list[int]]:
        manifest, problem = inspect(self.fs, self.folder(step), step, self.patience)
        return manifest, problem, [] if manifest else self.steps()

    def _newest_whole(self) -> dict[str, Any] | str | None:
        for step in reversed(self.steps()):
            manifest, problem = inspect(self.fs, self.folder(step), step, self.patience)
            if manifest is not None:
                self.damaged.discard(step)
                return manifest
            self.damaged.add(step)
            log.warning("checkpoint %s/%s is damaged (%s): trying the one before", self.url, folder_name(step), problem)
        if self.damaged:
            return (
                f"none of the {len(self.damaged)} checkpoints in {self.url} is whole: restore one,"
                " or delete that folder to start from the beginning"
            )
        return None
