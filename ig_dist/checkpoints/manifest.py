"""The manifest of a checkpoint: what makes it exist, and how it is told from a damaged one.

{"format", "step", "world_size", "meta", "files": [{"name", "bytes", "sha256", "header": [bytes, crc32]}],
 "tensors": {name: {"shape", "dtype", "pieces": [[file, start, stop, at, [crc32, ...]]]}}, "sha256"}

A piece is the elements ``start`` to ``stop`` of the flattened tensor, from byte ``at`` of the file on, with a CRC for
each ``PART_BYTES`` of it. The CRCs cover all bytes of the files, and are looked at each time that bytes are read; the
sha256 of a file names it, and is for whoever copies it.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from ig_dist.checkpoints.snapshot import DTYPE_NAMES, PART_BYTES
from ig_dist.errors import ConfigError, DamagedError, first_line
from ig_dist.storage.faults import intact
from ig_dist.storage.files import list_sizes, read_file
from ig_dist.storage.urls import is_local

FORMAT = "ig-dist-checkpoint/3"
MANIFEST = "manifest.json"
MOST_ELEMENTS = 2**50
MOST_BYTES = 2**28
"""Of a manifest: 13 times that of 512 ranks of FSDP2."""

Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Crc32 = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+\.safetensors$")]


class _File(BaseModel):
    name: FileName
    bytes: Count
    sha256: Sha256
    header: tuple[Count, Crc32]


class _Tensor(BaseModel):
    shape: list[Count]
    dtype: str
    pieces: list[tuple[Count, Count, Count, Count, list[Crc32]]]


class _Meta(BaseModel):
    optimizer_steps: Count


class _Manifest(BaseModel):
    format: str
    step: Count
    world_size: Count
    meta: _Meta
    files: Annotated[list[_File], Field(min_length=1)]
    tensors: dict[str, _Tensor]
    sha256: Sha256


def folder_name(step: int) -> str:
    """Of the checkpoint of a step."""
    return f"step_{step:010d}"


def make_manifest(step: int, records: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of the files that the ranks have written, by what each says of its own.

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
    except (ValueError, AttributeError, RecursionError):
        return None


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Refuse what no save writes: a reader may then trust every number in it.

    Raises:
        DamagedError: a field is missing or of another kind, a tensor is not whole, or pieces lie outside of their file
            or over one another.
    """
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise DamagedError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    files = manifest["files"]
    if len({file["name"] for file in files}) < len(files):
        raise DamagedError("two files have one name")
    places = [[(0, file["header"][0])] for file in files]
    for name, entry in manifest["tensors"].items():
        check_tensor(name, entry)
        width = DTYPE_NAMES[entry["dtype"]].itemsize
        for number, start, stop, at, crcs in entry["pieces"]:
            size = (stop - start) * width
            if number >= len(files) or at + size > files[number]["bytes"]:
                raise DamagedError(f"tensor {name!r} lies outside of its file")
            if len(crcs) != -(-size // PART_BYTES):
                raise DamagedError(f"tensor {name!r} has {len(crcs)} CRCs for {size} bytes")
            places[number].append((at, at + size))
    for file, taken in zip(files, places, strict=True):
        bounds = pairwise(sorted([*taken, (file["bytes"], file["bytes"])]))
        if any(after[0] != before[1] for before, after in bounds):
            raise DamagedError(f"the tensors in {file['name']} do not lie one after the other")


def check_tensor(name: str, entry: Mapping[str, Any]) -> None:
    """Refuse a tensor that its pieces do not make whole, each element once."""
    if entry["dtype"] not in DTYPE_NAMES:
        raise DamagedError(f"tensor {name!r} has an unknown dtype {entry['dtype']!r}")
    if math.prod(max(side, 1) for side in entry["shape"]) >= MOST_ELEMENTS:
        raise DamagedError(f"tensor {name!r} has more elements than any memory")
    end, what = 0, f"tensor {name!r} of shape {entry['shape']}"
    for _, start, stop, *_ in entry["pieces"]:
        if start < end or stop < start:
            raise DamagedError(f"{what} has element {start} in two pieces")
        if start > end:
            break
        end = stop
    if end != math.prod(entry["shape"]):
        raise DamagedError(f"{what} is not whole: element {end} is in no piece")


def inspect(fs: Any, folder: str, step: int) -> dict[str, Any]:
    """The manifest in a folder, which is whole; files of its sizes are there.

    Raises:
        DamagedError: it is not, or they are not.
        ConfigError: it is of a later format than this version knows.
        DataError: the storage fails beyond the deadline.
    """
    try:
        return intact(fs, folder, lambda: _inspect_once(fs, folder, step))
    except OSError as error:
        raise DamagedError(f"{type(error).__name__}: {first_line(error)}") from None


def _inspect_once(fs: Any, folder: str, step: int) -> dict[str, Any]:
    sizes = list_sizes(fs, folder)
    if MANIFEST not in sizes or sizes[MANIFEST] > MOST_BYTES:
        raise DamagedError(f"{MANIFEST} is no file of less than {MOST_BYTES >> 20} MiB")
    manifest = unsealed(read_file(fs, f"{folder}/{MANIFEST}"))
    if manifest is None:
        raise DamagedError(f"{MANIFEST} has changed")
    family, _, number = str(manifest.get("format")).partition("/")
    ours, _, newest = FORMAT.partition("/")
    if family == ours and number.isdecimal() and int(number) > int(newest):  # passed over, it would be written over
        raise ConfigError(
            f"{folder} is of format {manifest['format']}, this version of ig-dist knows {FORMAT} and older: use the"
            " version that saved it"
        )
    try:
        check_manifest(manifest)
    except DamagedError as error:
        raise DamagedError(f"{MANIFEST}: {error}") from None
    if manifest["format"] != FORMAT or manifest["step"] != step:
        raise DamagedError(f"{MANIFEST} is of another format or step")
    for file in manifest["files"]:
        name, size = file["name"], file["bytes"]
        if name not in sizes:
            raise DamagedError(f"{name} is missing")
        if sizes[name] != size:
            raise DamagedError(f"{name} has {sizes[name]} bytes, not {size}")
        if is_local(fs) and Path(folder, name).is_symlink():
            raise DamagedError(f"{name} is a link")
    return manifest
