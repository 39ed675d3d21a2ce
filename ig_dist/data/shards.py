"""Shards: plain WebDataset tars of latents, written by the webdataset library, and the scan that indexes them."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ig_dist.errors import ConfigError

LATENT_SUFFIX = ".latent.npy"
FLIP_SUFFIX = ".latent_flip.npy"
LABEL_SUFFIX = ".cls"


class SampleRow(NamedTuple):
    """Where a sample's latents lie in its shard, and what the index keeps of it."""

    offset: int
    label: int
    crc32: int
    flip_offset: int = -1
    """Of the latent of the mirrored image; -1: there is none."""
    flip_crc32: int = 0


class _Array(NamedTuple):
    offset: int
    crc32: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def pack_shard(
    keys: Sequence[str], latents: NDArray[Any], labels: NDArray[np.int64], flipped: NDArray[Any] | None = None
) -> bytes:
    """A tar of ``<key>.latent.npy``, ``<key>.latent_flip.npy`` if given, and ``<key>.cls``.

    Byte for byte a function of the arguments.
    """
    import webdataset

    packed = io.BytesIO()
    writer = webdataset.TarWriter(packed, mtime=0, user="ig-dist", group="ig-dist")
    for i, (key, label) in enumerate(zip(keys, labels, strict=True)):
        fields = {LATENT_SUFFIX: _npy(latents[i]), LABEL_SUFFIX: str(int(label)).encode()}
        if flipped is not None:
            fields[FLIP_SUFFIX] = _npy(flipped[i])
        writer.write({"__key__": key, **{suffix[1:]: value for suffix, value in fields.items()}})
    writer.close()
    return packed.getvalue()


def scan_shard(
    file: IO[bytes],
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    *,
    latent_suffix: str = LATENT_SUFFIX,
    flip_suffix: str | None = None,
    label_suffix: str = LABEL_SUFFIX,
) -> list[SampleRow]:
    """One row per sample of a tar, in the order of the tar. The file is read once, from front to back.

    Args:
        file: the tar.
        dtype: expected type of every latent.
        shape: expected shape of every latent.
        latent_suffix: what follows a sample's key in the name of its latent.
        flip_suffix: the same for the latent of the mirrored image; None: the samples have none.
        label_suffix: the same for the label, a number as text.

    Raises:
        ConfigError: not a tar, or a sample that lacks a part or has one of another shape or type.
    """
    parts: dict[str, dict[str, Any]] = {suffix: {} for suffix in (latent_suffix, flip_suffix, label_suffix) if suffix}
    try:
        with tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                suffix = next((suffix for suffix in parts if member.isfile() and member.name.endswith(suffix)), None)
                if suffix is None:
                    continue
                content = tar.extractfile(member)
                assert content is not None  # it is a file
                data = content.read()
                key = member.name.removesuffix(suffix)
                if key in parts[suffix]:
                    raise ConfigError(f"sample {key} has two {suffix}: keys must differ; encode again")
                if suffix == label_suffix:
                    parts[suffix][key] = _label(member.name, data)
                    continue
                array = _locate(member.name, data, member.offset_data)
                if (array.shape, array.dtype) != (shape, dtype):
                    raise ConfigError(
                        f"{member.name} holds {array.dtype} {array.shape}, expected {dtype} {shape}: encode again"
                    )
                parts[suffix][key] = array
    except tarfile.TarError as error:
        raise ConfigError(f"not a readable tar ({error}): restore it or encode again") from None
    latents, labels, flips = parts[latent_suffix], parts[label_suffix], parts.get(flip_suffix or "", {})
    for suffix, found in parts.items():
        if found.keys() != latents.keys():
            key = min(found.keys() ^ latents.keys())
            missing = latent_suffix if key in found else suffix
            raise ConfigError(f"sample {key} has no {missing}: encode again")
    rows = []
    for key, latent in latents.items():
        flip = flips.get(key)
        rows.append(SampleRow(latent.offset, labels[key], latent.crc32, *((flip.offset, flip.crc32) if flip else ())))
    return rows


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _locate(name: str, data: bytes, begin: int) -> _Array:
    """The array in the bytes of an .npy file that begins at byte ``begin`` of the shard."""
    header = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(header)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(header)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{name} is not an .npy file ({error}): encode again") from None
    if fortran or dtype.hasobject or len(data) - header.tell() != int(np.prod(shape)) * dtype.itemsize:
        raise ConfigError(f"{name} is no plain C-ordered array of its shape: encode again")
    return _Array(begin + header.tell(), zlib.crc32(memoryview(data)[header.tell() :]), dtype, shape)


def _label(name: str, data: bytes) -> int:
    try:
        return int(data)
    except ValueError:
        raise ConfigError(f"{name} holds {data[:20]!r}, not a class number: encode again") from None
