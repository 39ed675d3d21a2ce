"""The shard index: what the latent shards hold, and where each sample's latent lies.

``index.json`` describes the data set; a side file (safetensors) holds one row per sample, so that a sample is read
by its byte range, without parsing the tar, from a local file or an object store alike.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import BaseModel, Field, PositiveInt, ValidationError

from ig_dist.data import table as side_file
from ig_dist.data.shards import SampleRow
from ig_dist.data.table import Blocks, Column, StoredColumn
from ig_dist.errors import ConfigError, DataError
from ig_dist.storage.faults import PATIENCE, Patience, unreadable
from ig_dist.storage.files import list_sizes, open_url, read_file
from ig_dist.storage.s3 import abort_orphaned_uploads
from ig_dist.storage.urls import full_url
from ig_dist.storage.writes import write_stream

FORMAT = "ig-dist-index/1"
TABLE_NAME = "index.samples.safetensors"

READS = 3  # of a whole file, before it counts as damaged: it may have suffered on the way
_AT_ONCE = 2**20  # rows
_TIDYING_S = 30.0
_KINDS: dict[str, type[np.generic]] = {
    "offset": np.int64,
    "label": np.int32,
    "crc32": np.uint32,
    "flip_offset": np.int64,
    "flip_crc32": np.uint32,
}
_OF_FLIPS = {"flip_offset", "flip_crc32"}


class _Record(BaseModel, extra="forbid"):
    pass


class TokenizerInfo(_Record):
    """Which tokenizer made the latents, and how."""

    name: str
    sha256: str  # hash of the tokenizer's weights and settings
    image_size: int
    image_channels: int
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # arithmetic of the encoder


class LatentInfo(_Record):
    """Shape and meaning of a stored latent."""

    kind: Literal["sample", "moments"]  # sample: (C, H, W); moments: mean and std stacked, (2C, H, W)
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]  # shape of the latent that the model sees, (C, H, W)
    dtype: Literal["float16", "float32"]
    flips: bool = False  # each sample also holds the latent of the mirrored image, in the same shape and type
    shift: list[float]  # per channel: the model sees (latent - shift) * scale
    scale: list[float]

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """Shape of the array in the shard."""
        channels, height, width = self.shape
        return (2 * channels if self.kind == "moments" else channels, height, width)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the array in the shard."""
        return math.prod(self.stored_shape) * np.dtype(self.dtype).itemsize


class KeyInfo(_Record):
    """What follows a sample's key and a dot in the names of its files."""

    latent: str = "latent.npy"
    flip: str = "latent_flip.npy"
    label: str = "cls"


class ShardInfo(_Record):
    """One tar file."""

    name: str
    bytes: int
    samples: int = Field(gt=0)
    sha256: str


class Statistics(_Record):
    """Per-channel statistics of the normalised latents, over the whole data set; of moments: of a posterior draw."""

    mean: list[float]
    std: list[float]


class IndexFile(_Record):
    """The contents of ``index.json``."""

    format: Literal["ig-dist-index/1"]
    source: str
    seed: int  # seed of the shuffle at write time
    samples_per_shard: int | None = None
    """Places of each shard in that shuffle; a shard holds fewer samples where files were rejected."""
    tokenizer: TokenizerInfo
    latent: LatentInfo
    keys: KeyInfo = KeyInfo()
    foreign: bool = False  # the shards were made elsewhere, and only indexed
    classes: list[str]  # class i is the i-th name; for ImageNet the sorted synsets (n01440764, ...)
    class_names: list[str] | None = None  # the same in words, where known
    rejected: int = 0  # files of the source that hold no picture; `rejected.csv` beside the index lists them
    upscaled: int = 0  # images that were smaller than `tokenizer.image_size` before they were cut
    statistics: Statistics
    table_sha256: str
    table_crc32: str | None = Field(default=None, pattern="^([0-9a-f]{8})+$")
    """CRC-32 of each 128 KiB of a side file that is too large to be read whole, one after the other in hexadecimal."""
    shards: list[ShardInfo] = Field(min_length=1)

    @property
    def remake(self) -> str:
        """How to come by an index that fits."""
        return "run ig-dist index --force" if self.foreign else "encode again"


@dataclass(frozen=True)
class SampleTable:
    """One row per sample, in index order: shard by shard, as in the tars."""

    offset: Column  # int64: byte offset of the latent's array data in its shard
    label: Column  # int32
    crc32: Column  # uint32: CRC-32 of the array data
    flip_offset: Column | None = None  # the same for the latent of the mirrored image, where shards have it
    flip_crc32: Column | None = None

    @classmethod
    def from_rows(cls, rows: Sequence[SampleRow | Sequence[int]]) -> SampleTable:
        """Columns from rows, in index order."""
        columns = np.array(rows, np.int64).reshape(-1, len(_KINDS)).T
        flips, named = (columns[3] >= 0).any(), zip(_KINDS.items(), columns, strict=True)
        return cls(**{name: column.astype(kind) for (name, kind), column in named if flips or name not in _OF_FLIPS})

    @classmethod
    def from_columns(cls, columns: Mapping[str, Column]) -> SampleTable:
        """Columns of a file, which may be any.

        Raises:
            ValueError: they are not those of such a table.
        """
        if columns.keys() not in (set(_KINDS), set(_KINDS) - _OF_FLIPS):
            raise ValueError(f"its columns are {', '.join(sorted(columns))}")
        for name, column in columns.items():
            if column.dtype != _KINDS[name] or getattr(column, "ndim", 1) != 1 or len(column) != len(columns["label"]):
                raise ValueError(f"column {name} is no {_KINDS[name].__name__} for each sample")
        return cls(**columns)

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, rows: slice) -> SampleTable:
        """Some rows, as arrays."""
        return SampleTable(**{name: column[rows] for name, column in self.columns.items()})

    @property
    def columns(self) -> dict[str, Column]:
        """Those that there are, by name."""
        return {name: column for name, column in vars(self).items() if column is not None}

    def under(self, patience: Patience) -> SampleTable:
        """The same table, whose file is read under another patience."""
        stored = {name: column for name, column in self.columns.items() if isinstance(column, StoredColumn)}
        return replace(self, **{name: replace(column, patience=patience) for name, column in stored.items()})

    def labels(self) -> Iterator[NDArray[np.int32]]:
        """All labels, some at a time."""
        return (self.label[start : start + _AT_ONCE] for start in range(0, len(self), _AT_ONCE))

    def class_counts(self, classes: int) -> NDArray[np.int64]:
        """Samples of each class, (classes,); labels that are none do not count."""
        counts = np.zeros(classes, np.int64)
        for labels in self.labels():
            counts += np.bincount(labels[(labels >= 0) & (labels < classes)], minlength=classes)
        return counts


@dataclass(frozen=True)
class ShardIndex:
    """An opened index."""

    folder: str  # URL or path of the folder that holds the shards
    info: IndexFile
    table: SampleTable
    sha256: str  # hash of `index.json`, which holds the hashes of everything else

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return len(self.table)

    @cached_property
    def shard_sizes(self) -> NDArray[np.int64]:
        """Samples of each shard."""
        return np.fromiter((shard.samples for shard in self.info.shards), np.int64, len(self.info.shards))

    @cached_property
    def first_ids(self) -> NDArray[np.int64]:
        """Id of the first sample of each shard, and, last, the number of samples."""
        return np.concatenate([[0], np.cumsum(self.shard_sizes)])


def write_index(folder: str, info: dict[str, Any], table: SampleTable, patience: Patience = PATIENCE) -> None:
    """Write the side file, then ``index.json`` (last: what has no index does not exist)."""
    fs, path = open_url(folder, "--dest", patience)
    digest, crcs, written = hashlib.sha256(), list[str](), 0

    def passing() -> Iterator[memoryview]:
        nonlocal written
        for piece in side_file.pack(table.columns):
            digest.update(piece)
            crcs.append(side_file.block_crcs(piece))
            written += len(piece)
            yield piece

    size = sum(len(column) * column.dtype.itemsize for column in table.columns.values())
    write_stream(fs, f"{path}/{TABLE_NAME}", passing(), patience, size=size)
    # an index that needs no CRCs stays, byte for byte, what it was before there were any
    table_crc32 = "".join(crcs) if written > side_file.HELD_BYTES else None
    file = IndexFile(**{**info, "format": FORMAT, "table_sha256": digest.hexdigest(), "table_crc32": table_crc32})
    write_index_file(folder, file, patience)
    with suppress(OSError, DataError):  # parts that killed writers of it left cost money, but not the index
        abort_orphaned_uploads(fs, f"{path}/{TABLE_NAME}", Patience(deadline_s=_TIDYING_S))


def write_index_file(folder: str, file: IndexFile, patience: Patience = PATIENCE, *, name: str = "index.json") -> None:
    """Write ``index.json`` beside its side file, or keep one under another name."""
    fs, path = open_url(folder, "--dest", patience)
    text = json.dumps(file.model_dump(exclude={"table_crc32"} if file.table_crc32 is None else set()), indent=1) + "\n"
    packed = memoryview(text.encode())
    write_stream(fs, f"{path}/{name}", [packed], patience, size=len(packed))


def read_index(url: str) -> ShardIndex:
    """Open an index by the URL of ``index.json`` or of its folder, and hold it against the shards beside it.

    Raises:
        ConfigError: no index there, not an index, or shards that are missing or of another size.
    """
    folder, info, sha256 = read_index_file(url)
    table = read_table(folder, info)
    fs, path = open_url(folder, "data.index")
    try:
        found = list_sizes(fs, path)
    except OSError as error:
        raise unreadable(fs, path, error) from None
    for shard in info.shards:
        if (size := found.get(shard.name)) != shard.bytes:
            what = "of index.json is missing: restore it"
            if size is not None:
                what = f"has {size} bytes, index.json says {shard.bytes} (it does not match its shards): copy it again"
            raise ConfigError(f"{full_url(fs, path)}: shard {shard.name} {what} or {info.remake}")
    return ShardIndex(folder, info, table, sha256)


def read_index_file(url: str, name: str = "data.index", reads: int = READS) -> tuple[str, IndexFile, str]:
    """Folder, contents and sha256 of ``index.json``, by its URL or that of its folder; ``name`` is the setting's.

    Raises:
        ConfigError: no index there, or not an index.
    """
    folder = str(url).removesuffix("index.json").rstrip("/") or "."
    fs, path = open_url(folder, name)
    try:
        raw = read_file(fs, f"{path}/index.json")
    except (FileNotFoundError, NotADirectoryError):
        what = "is a folder without an index.json" if fs.isdir(path) else "does not exist"
        raise ConfigError(
            f"{name}: {folder} {what}; write shards there with `ig-dist encode --source SRC --dest FOLDER"
            " --tokenizer T`, or index those that are there with ig-dist index"
        ) from None
    except OSError as error:
        raise unreadable(fs, f"{path}/index.json", error) from None
    try:
        info = IndexFile.model_validate_json(raw)
    except ValidationError as error:
        if reads > 1:
            return read_index_file(url, name, reads - 1)
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(
            f"{folder}/index.json is not an index of format {FORMAT}: {where}: {first['msg']}; encode or index again"
        ) from None
    return folder, info, hashlib.sha256(raw).hexdigest()


def read_table(folder: str, info: IndexFile, *, whole: bool = False) -> SampleTable:
    """The side file: a small one is read and checked, of a large one only what is asked for (``whole``: it too).

    Raises:
        ConfigError: it is missing, or not the one of the index.
        DataError: it is damaged, or the storage fails.
    """
    fs, path = open_url(f"{folder}/{TABLE_NAME}", "data.index")
    try:
        if info.table_crc32 is not None:
            blocks = Blocks(fs, path, fs.size(path), info.table_crc32, info.remake)
            columns: Mapping[str, Column] = side_file.stored_columns(blocks)
            sha256 = blocks.sha256() if whole else info.table_sha256
        else:
            for _ in range(READS):
                packed = read_file(fs, path)
                if (sha256 := hashlib.sha256(packed).hexdigest()) == info.table_sha256:
                    columns = safetensors.numpy.load(packed)
                    break
        if sha256 != info.table_sha256:
            raise ConfigError(f"{path} does not match index.json (sha256 differs): copy both anew or {info.remake}")
        table = SampleTable.from_columns(columns)
        if info.latent.flips != (table.flip_offset is not None):
            raise ValueError("it and index.json disagree about latent_flip")
        if len(table) != sum(shard.samples for shard in info.shards):
            raise ValueError(f"it holds {len(table)} samples, index.json another number")
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: it belongs to index.json; copy it there or {info.remake}") from None
    except OSError as error:
        raise unreadable(fs, path, error) from None
    except (ValueError, TypeError, KeyError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{path} is no side file of an index ({error}): {info.remake}") from None
    return table
