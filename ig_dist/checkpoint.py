"""Checkpoints: one format for every engine and world size, whole or not there, and nothing in it is code.

    <url>/step_0000001200/rank_00000.safetensors ...   the pieces that each rank wrote
    <url>/step_0000001200/manifest.json                written last: names, shapes, pieces, sizes, sha256

The unit is the global tensor; a piece is a range of its flattened elements, which is what every engine's shard is.
A folder without a manifest does not exist; one whose manifest or files do not match is reported and passed over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from ig_dist.errors import ConfigError, DataError
from ig_dist.parallel.dist import Dist, from_main, gather_objects
from ig_dist.storage import is_local, open_url

FORMAT = "ig-dist-checkpoint/1"
MANIFEST = "manifest.json"
log = logging.getLogger(__name__)


class Piece(NamedTuple):
    """A range of the flattened elements of a global tensor."""

    shape: tuple[int, ...]
    """Shape of the global tensor."""
    start: int
    """Index of the first element."""
    data: Tensor
    """The elements, of any shape."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, opened for reading."""

    url: str
    manifest: dict[str, Any]

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
            DataError: the checkpoint has no such tensor.
        """
        entry = self.manifest["tensors"].get(name)
        if entry is None:
            raise DataError(f"{self.url} holds no tensor {name!r}: it was saved by a run with other settings")
        flat = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"])).view(-1)
        for file, start, stop in entry["pieces"]:
            flat[start:stop] = _read_tensor(f"{self.url}/{self.manifest['files'][file]['name']}", name).view(-1)
        return flat.view(entry["shape"])


def _read_tensor(url: str, name: str) -> Tensor:
    """One tensor of a safetensors file: through mmap, or by its byte range."""
    fs, path = open_url(url, "checkpoint.url")
    if is_local(fs):
        with safetensors.safe_open(path, framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]
    first, header = _remote_header(url)
    begin, end = header[name]["data_offsets"]
    alone = {name: {**header[name], "data_offsets": [0, end - begin]}}
    packed = json.dumps(alone).encode()
    data = fs.cat_file(path, start=first + begin, end=first + end)
    return safetensors.torch.load(len(packed).to_bytes(8, "little") + packed + data)[name]


@lru_cache(maxsize=4096)
def _remote_header(url: str) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begin, and its table of tensors."""
    fs, path = open_url(url, "checkpoint.url")
    length = int.from_bytes(fs.cat_file(path, start=0, end=8), "little")
    return 8 + length, json.loads(fs.cat_file(path, start=8, end=8 + length))


class CheckpointStore:
    """The checkpoints of a run.

    Args:
        url: folder, a path or any fsspec URL.
        keep_last: the newest checkpoints that are kept.
        keep_every: also keep steps that are a multiple of this; 0: none.
    """

    def __init__(self, url: str, *, keep_last: int = 2, keep_every: int = 0) -> None:
        self._fs, self._path = open_url(url, "checkpoint.url")
        self._url, self._keep_last, self._keep_every = url.rstrip("/"), keep_last, keep_every

    def save(self, step: int, pieces: Mapping[str, Piece], meta: Mapping[str, Any], dist: Dist) -> None:
        """Write a checkpoint. COLLECTIVE. The tensors may change as soon as this returns."""
        folder = f"{self._path}/{_folder(step)}"
        if dist.is_main and self._fs.exists(folder):  # left by a save that was cut off, or damaged
            self._fs.rm(folder, recursive=True)
        from_main(None, dist)
        self._fs.makedirs(folder, exist_ok=True)
        name = f"rank_{dist.rank:05d}.safetensors"
        tensors = {key: piece.data.detach().cpu().contiguous() for key, piece in pieces.items()}
        entry = {"name": name, **self._write(f"{folder}/{name}", tensors)}
        described = {
            key: (piece.shape, str(piece.data.dtype).removeprefix("torch."), piece.start, piece.data.numel())
            for key, piece in pieces.items()
        }
        gathered = gather_objects((entry, described), dist)
        if dist.is_main:
            self._commit(folder, step, gathered, meta, dist)
            self._retain(step)
        from_main(None, dist)  # nobody goes on before the checkpoint exists

    def wait(self) -> None:
        """Return when every save that was begun is whole (saving is synchronous: at once)."""

    def latest(self, dist: Dist) -> Checkpoint | None:
        """The newest whole checkpoint; damaged ones are reported and passed over. COLLECTIVE.

        Raises:
            DataError: there are checkpoints, and none of them is whole.
        """
        found = from_main(self._newest_whole() if dist.is_main else None, dist)
        if isinstance(found, str):
            raise DataError(found)
        return None if found is None else Checkpoint(f"{self._url}/{_folder(found['step'])}", found)

    def at(self, step: int, dist: Dist) -> Checkpoint:
        """The checkpoint of one step. COLLECTIVE.

        Raises:
            ConfigError: there is none, or it is damaged.
        """
        found, problem = from_main(self._verify(step) if dist.is_main else None, dist)
        if found is None:
            steps = ", ".join(map(str, self.steps())) or "none"
            raise ConfigError(f"{self._url} has no whole checkpoint of step {step} ({problem}); there are: {steps}")
        return Checkpoint(f"{self._url}/{_folder(step)}", found)

    def _newest_whole(self) -> dict[str, Any] | str | None:
        damaged = 0
        for step in reversed(self.steps()):
            manifest, problem = self._verify(step)
            if manifest is not None:
                return manifest
            damaged += 1
            log.warning("checkpoint %s/%s is damaged (%s): trying the one before", self._url, _folder(step), problem)
        if damaged:
            return (
                f"none of the {damaged} checkpoints in {self._url} is whole: restore one,"
                " or delete that folder to start from the beginning"
            )
        return None

    def steps(self) -> list[int]:
        """Steps that have a manifest, ascending; they need not be whole."""
        return [step for step, whole in sorted(self._folders().items()) if whole]

    def _folders(self) -> dict[int, bool]:
        """Step of each checkpoint folder, and whether it has a manifest."""
        self._fs.invalidate_cache()
        if not self._fs.exists(self._path):
            return {}
        names = [PurePosixPath(path).name for path in self._fs.ls(self._path, detail=False)]
        steps = [int(match[1]) for name in names if (match := re.fullmatch(r"step_(\d{10})", name))]
        return {step: bool(self._fs.exists(f"{self._path}/{_folder(step)}/{MANIFEST}")) for step in steps}

    def _verify(self, step: int) -> tuple[dict[str, Any] | None, str]:
        """The manifest when everything matches it, else the reason why not."""
        folder = f"{self._path}/{_folder(step)}"
        try:
            manifest = json.loads(self._fs.cat_file(f"{folder}/{MANIFEST}"))
            if manifest["format"] != FORMAT or manifest["step"] != step:
                return None, f"{MANIFEST} is of another format or step"
            if manifest["sha256"] != _manifest_hash(manifest):
                return None, f"{MANIFEST} has changed"
            for file in manifest["files"]:
                path = f"{folder}/{file['name']}"
                if not self._fs.exists(path):
                    return None, f"{file['name']} is missing"
                if self._fs.size(path) != file["bytes"]:
                    return None, f"{file['name']} has {self._fs.size(path)} bytes, not {file['bytes']}"
                if self._hash(path) != file["sha256"]:
                    return None, f"{file['name']} has changed"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return None, f"{type(error).__name__}: {' '.join(str(error).split())}"
        return manifest, ""

    def _write(self, path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Write one safetensors file; its size and hash."""
        data = safetensors.torch.save(tensors)
        with self._fs.open(path, "wb") as file:
            file.write(data)
            _sync(self._fs, file)
        return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def _hash(self, path: str) -> str:
        with self._fs.open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _commit(self, folder: str, step: int, gathered: list[Any], meta: Mapping[str, Any], dist: Dist) -> None:
        tensors: dict[str, Any] = {}
        for number, (_, described) in enumerate(gathered):
            for key, (shape, dtype, start, count) in described.items():
                entry = tensors.setdefault(key, {"shape": list(shape), "dtype": dtype, "pieces": []})
                entry["pieces"].append([number, start, start + count])
        manifest = {
            "format": FORMAT,
            "step": step,
            "world_size": dist.world_size,
            "meta": dict(meta),
            "files": [entry for entry, _ in gathered],
            "tensors": dict(sorted(tensors.items())),
        }
        manifest["sha256"] = _manifest_hash(manifest)
        data = json.dumps(manifest).encode()
        if not is_local(self._fs):
            self._fs.pipe_file(f"{folder}/{MANIFEST}", data)
            return
        temporary = f"{folder}/{MANIFEST}.tmp"
        with self._fs.open(temporary, "wb") as file:
            file.write(data)
            _sync(self._fs, file)
        Path(temporary).replace(f"{folder}/{MANIFEST}")

    def _retain(self, newest: int) -> None:
        """Delete what the retention rule does not keep, and what older cut-off saves left.

        What is newer than the checkpoint just written was found damaged: it does not count, and is written over.
        """
        folders = self._folders()
        whole = [step for step in sorted(folders) if folders[step] and step <= newest]
        keep = set(whole[-self._keep_last :])
        if self._keep_every:
            keep |= {step for step in whole if step % self._keep_every == 0}
        for step in folders:
            if step not in keep and step < newest:
                folder = f"{self._path}/{_folder(step)}"
                if folders[step]:
                    self._fs.rm(f"{folder}/{MANIFEST}")  # first: what is half deleted must not exist
                self._fs.rm(folder, recursive=True)


def _folder(step: int) -> str:
    return f"step_{step:010d}"


def _manifest_hash(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sync(fs: Any, file: Any) -> None:
    """A local file is on disk before the manifest names it; a closed object is stored."""
    if is_local(fs):
        file.flush()
        os.fsync(file.fileno())
