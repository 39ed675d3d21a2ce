"""Shards: plain WebDataset tars of latents, and the scan that indexes them."""

import io
import math
import re
import tarfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from ig_dist.data.tar import Member, read_tar
from ig_dist.errors import ConfigError, first_line

LATENT_SUFFIX = ".latent.npy"
FLIP_SUFFIX = ".latent_flip.npy"
LABEL_SUFFIX = ".cls"

_MOST_LABELS = 2**31  # of an index


class SampleRow(NamedTuple):
    """Where a sample's latents lie in its shard, and what the index keeps of it."""

    offset: int
    label: int
    crc32: int
    flip_offset: int = -1  # of the latent of the mirrored image; -1: there is none
    flip_crc32: int = 0


class Array(NamedTuple):
    """An array in a tar."""

    offset: int  # of its data in the tar
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    data: memoryview


def pack_shard(
    keys: Sequence[str], latents: NDArray[Any], labels: NDArray[np.int64], flipped: NDArray[Any] | None = None
) -> bytes:
    """A tar of ``<key>.cls``, ``<key>.latent.npy`` and ``<key>.latent_flip.npy`` if given.

    Byte for byte a function of the arguments, and what webdataset's own writer makes of them, which takes three
    times as long. Keys are short.
    """
    packed = io.BytesIO()
    for i, (key, label) in enumerate(zip(keys, labels, strict=True)):
        pack_file(packed, key + LABEL_SUFFIX, str(int(label)).encode())
        pack_file(packed, key + LATENT_SUFFIX, _npy(latents[i]))
        if flipped is not None:
            pack_file(packed, key + FLIP_SUFFIX, _npy(flipped[i]))
    packed.write(tar_end(packed.tell()))
    return packed.getvalue()


def tar_end(size: int) -> bytes:
    """What ends a tar of that size: two blocks of zeros, to a whole record."""
    end = 2 * tarfile.BLOCKSIZE
    return bytes(end + -(size + end) % tarfile.RECORDSIZE)


def pack_file(tar: IO[bytes], name: str, data: bytes) -> None:
    """Append a file of a short name to a tar."""
    header, encoded = bytearray(_header(len(data))), name.encode()
    if len(encoded) > tarfile.LENGTH_NAME:
        raise ValueError(f"{name} is too long for a tar")
    header[: len(encoded)] = encoded
    header[148:155] = b"%06o\0" % (sum(header) - sum(header[148:156]) + 8 * ord(" "))
    tar.write(header)
    tar.write(data)
    tar.write(bytes(-len(data) % tarfile.BLOCKSIZE))


@lru_cache(maxsize=64)
def _header(size: int) -> bytes:
    """That of a file without a name."""
    file = tarfile.TarInfo()
    file.size, file.mode, file.uname, file.gname = size, 0o444, "ig-dist", "ig-dist"
    return file.tobuf(tarfile.USTAR_FORMAT)


def scan_shard(
    file: IO[bytes],
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    *,
    latent_suffix: str = LATENT_SUFFIX,
    flip_suffix: str | None = None,
    label_suffix: str = LABEL_SUFFIX,
    visit: Callable[[str, NDArray[Any]], None] | None = None,
) -> list[SampleRow]:
    """One row per sample of a tar, in the order of the tar. The file is read once, from front to back, to its end.

    Args:
        file: the tar.
        dtype: expected type of every latent.
        shape: expected shape of every latent.
        latent_suffix: what follows a sample's key in the name of its latent.
        flip_suffix: the same for the latent of the mirrored image; None: the samples have none.
        label_suffix: the same for the label, a number as text.
        visit: called with the key and the array of every latent, also of the mirrored images.

    Raises:
        DamagedTar: not a tar, or not the whole of one.
        ConfigError: a sample that lacks a part or has one of another shape or type.
    """
    parts: dict[str, dict[str, Any]] = {suffix: {} for suffix in (latent_suffix, flip_suffix, label_suffix) if suffix}
    for member in read_tar(file):
        key, suffix = split_name(member.name)
        if suffix not in parts:
            continue
        if key in parts[suffix]:
            raise ConfigError(f"sample {key} has two {suffix}: keys must differ")
        if suffix == label_suffix:
            parts[suffix][key] = class_number(member.data, member.name)
            continue
        array = locate_array(member)
        if (array.shape, array.dtype) != (shape, dtype):
            raise ConfigError(f"{member.name} holds {array.dtype} {array.shape}, expected {dtype} {shape}")
        parts[suffix][key] = array.offset, zlib_ng.crc32(array.data)
        if visit:
            visit(key, np.frombuffer(array.data, dtype).reshape(shape))
    latents, labels, flips = parts[latent_suffix], parts[label_suffix], parts.get(flip_suffix or "", {})
    for suffix, found in parts.items():
        if found.keys() != latents.keys():
            key = min(found.keys() ^ latents.keys())
            raise ConfigError(f"sample {key} has no {latent_suffix if key in found else suffix}")
    return [SampleRow(offset, labels[key], crc32, *flips.get(key, ())) for key, (offset, crc32) in latents.items()]


def class_number(data: bytes, name: str, remedy: str = "") -> int:
    """The label that a file holds."""
    with suppress(ValueError):
        if abs(label := int(data)) < _MOST_LABELS:
            return label
    raise ConfigError(f"{name} holds {data[:20]!r}, not a class number{remedy}")


def split_name(name: str) -> tuple[str, str]:
    """Key of the sample, and suffix from the first dot on, as the webdataset library tells them.

    Of a file that belongs to no sample: two empty texts.
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    if not (stem and dot) or re.match(r"__[^/]*__($|/)", name):
        return "", ""
    return folder + slash + stem, f".{suffix.lower()}"


def locate_array(member: Member) -> Array:
    """The array in a member that is an .npy file.

    Raises:
        ConfigError: it is none, or not the plain bytes of an array.
    """
    data = memoryview(member.data)
    size = 12 if member.data[6:7] == b"\2" else 10  # of the magic, the version and the length of the header
    size += int.from_bytes(data[8:size], "little")
    try:
        shape, fortran, dtype = _npy_header(bytes(data[:size]))
    except Exception as error:  # numpy reads the header as Python source: a damaged one raises almost anything
        raise ConfigError(f"{member.name} is not an .npy file ({first_line(error)})") from None
    if fortran or dtype.hasobject or len(data) - size != math.prod(shape) * dtype.itemsize:
        raise ConfigError(f"{member.name} is no plain C-ordered array of its shape")
    return Array(member.offset + size, dtype, shape, data[size:])


@lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """What an .npy header says; remembered, as it is the same in all samples and numpy parses it as Python source."""
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    return {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version](file)


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return file.getvalue()
