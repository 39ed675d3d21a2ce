"""The manifest of a checkpoint: what makes it exist, and how it is told from a damaged one.

{"format", "step", "world_size", "meta", "files": [{"name", "bytes", "sha256", "header": [bytes, crc32]}],
 "tensors": {name: {"shape", "dtype", "pieces": [[file, start, stop, at, [crc32, ...]]]}}, "sha256"}

A piece is the elements ``start`` to ``stop`` of the flattened tensor, from byte ``at`` of the file on, with a CRC for
each ``PART_BYTES`` of it. The CRCs cover all bytes of the files, and are looked at each time that bytes are read; the
sha256 of a file names it, and is for whoever copies it. Format 2 had one CRC for a piece and none for the header.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ig_dist.checkpoints.snapshot import DTYPE_NAMES
from ig_dist.errors import ConfigError, DamagedError
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import list_sizes, read_file
from ig_dist.storage.urls import is_local

FORMAT = "ig-dist-checkpoint/3"
FORMATS = ("ig-dist-checkpoint/2", FORMAT)
MANIFEST = "manifest.json"


def folder_name(step: int) -> str:
    """Of the checkpoint of a step."""
    return f"step_{step:010d}"


def make_manifest(step: int, records: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of the files that the ranks have written.

    Args:
        step: global batches consumed.
        records: of each rank, ``file`` (name, bytes, sha256) and the ``tensors`` in it (``Snapshot.described``).
        meta: stored as it is.

    Raises:
        DamagedError: the pieces of a tensor do not make it whole.
    """
    tensors: dict[str, Any] = {}
    for number, record in enumerate(records):
        for key, (shape, dtype, *piece) in record["tensors"].items():
            entry = tensors.setdefault(key, {"shape": shape, "dtype": dtype, "pieces": []})
            entry["pieces"].append([number, *piece])
    for key, entry in tensors.items():
        entry["pieces"].sort(key=lambda piece: piece[1:])
        check_tensor(key, entry)
    manifest = {
        "format": FORMAT,
        "step": step,
        "world_size": len(records),
        "meta": dict(meta),
        "files": [record["file"] for record in records],
        "tensors": dict(sorted(tensors.items())),
    }
    return sealed(manifest)


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with the hash of everything else in it, as ``sha256``."""
    body = {key: value for key, value in document.items() if key != "sha256"}
    return {**body, "sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}


def unsealed(data: bytes) -> dict[str, Any] | None:
    """The document of a file; None when it is not as it was sealed."""
    try:
        document = json.loads(data)
        return document if document == sealed(document) else None
    except (ValueError, AttributeError):
        return None


def check_tensor(name: str, entry: Mapping[str, Any]) -> None:
    """Refuse a tensor of which a part would be whatever was in memory.

    Raises:
        DamagedError: its pieces leave elements out, or its dtype is none.
    """
    if entry["dtype"] not in DTYPE_NAMES:
        raise DamagedError(f"tensor {name!r} has an unknown dtype {entry['dtype']!r}")
    end = 0
    for _, start, stop, *_ in entry["pieces"]:
        if start > end:
            break
        end = max(end, stop)
    if end != math.prod(entry["shape"]):
        raise DamagedError(f"tensor {name!r} of shape {entry['shape']} is not whole: element {end} is in no piece")


def inspect(fs: Any, folder: str, step: int, patience: Patience) -> tuple[dict[str, Any] | None, str]:
    """The manifest in a folder when it is whole and files of its sizes are there, else the reason why not.

    Raises:
        ConfigError: it is of a later format than this version knows.
        DataError: the storage fails beyond the deadline.
    """
    manifest, problem = _inspect_once(fs, folder, step, patience)
    if manifest is None and not is_local(fs):  # it may have suffered on the way
        manifest, problem = _inspect_once(fs, folder, step, patience)
    return manifest, problem


def _is_later(found: str) -> bool:
    family, _, number = found.partition("/")
    ours, _, newest = FORMAT.partition("/")
    return family == ours and number.isdecimal() and int(number) > int(newest)


def _inspect_once(fs: Any, folder: str, step: int, patience: Patience) -> tuple[dict[str, Any] | None, str]:
    try:
        manifest = unsealed(read_file(fs, f"{folder}/{MANIFEST}", patience))
        if manifest is None:
            return None, f"{MANIFEST} has changed"
        if _is_later(manifest["format"]):  # nor is it passed over: it would be written over
            raise ConfigError(
                f"{folder} is of format {manifest['format']}, this version of ig-dist knows {FORMAT} and older: use the"
                " version that saved it"
            )
        if manifest["format"] not in FORMATS or manifest["step"] != step:
            return None, f"{MANIFEST} is of another format or step"
        sizes = list_sizes(fs, folder, patience)
        for file in manifest["files"]:
            name, size = file["name"], file["bytes"]
            if name not in sizes:
                return None, f"{name} is missing"
            if sizes[name] != size:
                return None, f"{name} has {sizes[name]} bytes, not {size}"
        for name, entry in manifest["tensors"].items():
            check_tensor(name, entry)
    except DamagedError as error:
        return None, str(error)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())}"
    return manifest, ""
