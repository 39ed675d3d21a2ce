"""The shard index: what the latent shards hold, and where each sample's latent lies.

``index.json`` describes the data set; a side file (safetensors) holds one row per sample, so that a sample is read
by its byte range, without parsing the tar, from a local file or an object store alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ig_dist.data.shards import SampleRow
from ig_dist.errors import ConfigError
from ig_dist.storage.faults import PATIENCE, Patience, unreadable
from ig_dist.storage.files import list_sizes, open_url, read_file, write_whole
from ig_dist.storage.urls import full_url

FORMAT = "ig-dist-index/1"
TABLE_NAME = "index.samples.safetensors"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TokenizerInfo(_Record):
    """Which tokenizer made the latents, and how."""

    name: str
    sha256: str
    """Hash of the tokenizer's weights and settings."""
    image_size: int
    image_channels: int
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the encoder."""


class LatentInfo(_Record):
    """Shape and meaning of a stored latent."""

    kind: Literal["sample", "moments"]
    """sample: (C, H, W); moments: mean and std stacked, (2C, H, W)."""
    shape: tuple[int, int, int]
    """Shape of the latent that the model sees, (C, H, W)."""
    dtype: Literal["float16", "float32"]
    flips: bool = False
    """Each sample also holds the latent of the mirrored image, in the same shape and type."""
    shift: list[float]
    """Per channel: the model sees (latent - shift) * scale."""
    scale: list[float]

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """Shape of the array in the shard."""
        channels, height, width = self.shape
        return (2 * channels if self.kind == "moments" else channels, height, width)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the array in the shard."""
        return int(np.prod(self.stored_shape)) * np.dtype(self.dtype).itemsize


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
    seed: int
    """Seed of the shuffle at write time."""
    samples_per_shard: int | None = None
    """Places of each shard in that shuffle; a shard holds fewer samples where files were rejected."""
    tokenizer: TokenizerInfo
    latent: LatentInfo
    keys: KeyInfo = KeyInfo()
    foreign: bool = False
    """The shards were made elsewhere, and only indexed."""
    classes: list[str]
    """Class i is the i-th name; for ImageNet the sorted synsets (n01440764, ...)."""
    class_names: list[str] | None = None
    """The same in words, where known."""
    rejected: int = 0
    """Files of the source that hold no picture; ``rejected.csv`` beside the index lists them."""
    upscaled: int = 0
    """Images that were smaller than ``tokenizer.image_size`` before they were cut."""
    statistics: Statistics
    table_sha256: str
    shards: list[ShardInfo] = Field(min_length=1)

    @property
    def remake(self) -> str:
        """How to come by an index that fits."""
        return "run ig-dist index --force" if self.foreign else "encode again"


@dataclass(frozen=True)
class SampleTable:
    """One row per sample, in index order: shard by shard, as in the tars."""

    offset: NDArray[np.int64]
    """Byte offset of the latent's array data in its shard."""
    label: NDArray[np.int32]
    crc32: NDArray[np.uint32]
    """CRC-32 of the array data."""
    flip_offset: NDArray[np.int64] | None = None
    """The same for the latent of the mirrored image, where shards have it."""
    flip_crc32: NDArray[np.uint32] | None = None

    @classmethod
    def from_rows(cls, rows: Sequence[SampleRow]) -> SampleTable:
        """Columns from the rows of all shards, in index order."""
        offset, label, crc32, flip_offset, flip_crc32 = zip(*rows, strict=True)
        columns = np.asarray(offset, np.int64), np.asarray(label, np.int32), np.asarray(crc32, np.uint32)
        if flip_offset[0] < 0:
            return cls(*columns)
        return cls(*columns, np.asarray(flip_offset, np.int64), np.asarray(flip_crc32, np.uint32))


@dataclass(frozen=True)
class ShardIndex:
    """An opened index."""

    folder: str
    """URL or path of the folder that holds the shards."""
    info: IndexFile
    table: SampleTable
    sha256: str
    """Hash of ``index.json``, which holds the hashes of everything else."""

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return len(self.table.label)

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard."""
        return [shard.samples for shard in self.info.shards]


def write_index(folder: str, info: dict[str, Any], table: SampleTable, patience: Patience = PATIENCE) -> None:
    """Write the side file, then ``index.json`` (last: what has no index does not exist)."""
    fs, path = open_url(folder, "--dest", patience)
    packed = safetensors.numpy.save({name: column for name, column in vars(table).items() if column is not None})
    file = IndexFile(format=FORMAT, table_sha256=hashlib.sha256(packed).hexdigest(), **info)
    write_whole(fs, f"{path}/{TABLE_NAME}", packed, patience)
    write_whole(fs, f"{path}/index.json", (json.dumps(file.model_dump(), indent=1) + "\n").encode(), patience)


def read_index(url: str) -> ShardIndex:
    """Open an index by the URL of ``index.json`` or of its folder, and hold it against the shards beside it.

    Raises:
        ConfigError: no index there, not an index, or shards that are missing or of another size.
    """
    folder, info, sha256 = read_index_file(url)
    table = read_table(folder, info)
    _check_shards(folder, info)
    return ShardIndex(folder, info, table, sha256)


def read_index_file(url: str, name: str = "data.index") -> tuple[str, IndexFile, str]:
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
            f"{name}: {folder} {what}; write shards there with"
            " `ig-dist encode --source SRC --dest FOLDER --tokenizer T`,"
            " or index those that are there with ig-dist index"
        ) from None
    except OSError as error:
        raise unreadable(fs, f"{path}/index.json", error) from None
    try:
        info = IndexFile.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(
            f"{folder}/index.json is not an index of format {FORMAT}: {where}: {first['msg']}; encode or index again"
        ) from None
    return folder, info, hashlib.sha256(raw).hexdigest()


def read_table(folder: str, info: IndexFile) -> SampleTable:
    """The side file.

    Raises:
        ConfigError: it is missing, or not the one of the index.
    """
    fs, path = open_url(f"{folder}/{TABLE_NAME}", "data.index")
    try:
        packed = read_file(fs, path)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: it belongs to index.json; copy it there or {info.remake}") from None
    except OSError as error:
        raise unreadable(fs, path, error) from None
    if hashlib.sha256(packed).hexdigest() != info.table_sha256:
        raise ConfigError(f"{path} does not match index.json (sha256 differs): copy both again or {info.remake}")
    table = SampleTable(**safetensors.numpy.load(packed))
    if info.latent.flips != (table.flip_offset is not None):
        raise ConfigError(f"{path} and index.json disagree about latent_flip: {info.remake}")
    if len(table.label) != sum(shard.samples for shard in info.shards):
        raise ConfigError(f"{path} holds {len(table.label)} samples, index.json another number: {info.remake}")
    return table


def _check_shards(folder: str, info: IndexFile) -> None:
    fs, path = open_url(folder, "data.index")
    try:
        found = list_sizes(fs, path)
    except OSError as error:
        raise unreadable(fs, path, error) from None
    for shard in info.shards:
        if shard.name not in found:
            raise ConfigError(
                f"{full_url(fs, path)}: shard {shard.name} of index.json is missing: restore it or {info.remake}"
            )
        if found[shard.name] != shard.bytes:
            raise ConfigError(
                f"{full_url(fs, path)}/{shard.name} has {found[shard.name]} bytes, index.json says {shard.bytes}:"
                f" the index does not match its shards; copy them again or {info.remake}"
            )
