"""Shards: plain WebDataset tars of latents, written by the webdataset library, and the scan that indexes them."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ig_dist.errors import ConfigError

LATENT_SUFFIX = ".latent.npy"
LABEL_SUFFIX = ".cls"


class SampleRow(NamedTuple):
    """Where a sample's latent lies in its shard, and what the index keeps of it."""

    offset: int
    label: int
    crc32: int


def pack_shard(keys: Sequence[str], latents: NDArray[Any], labels: NDArray[np.int64]) -> bytes:
    """A tar of ``<key>.latent.npy`` and ``<key>.cls``, byte for byte a function of the arguments."""
    import webdataset

    packed = io.BytesIO()
    writer = webdataset.TarWriter(packed, mtime=0, user="ig-dist", group="ig-dist")
    for key, latent, label in zip(keys, latents, labels, strict=True):
        array = io.BytesIO()
        np.lib.format.write_array(array, latent, version=(1, 0), allow_pickle=False)
        fields = {LATENT_SUFFIX: array.getvalue(), LABEL_SUFFIX: str(int(label)).encode()}
        writer.write({"__key__": key, **{suffix[1:]: value for suffix, value in fields.items()}})
    writer.close()
    return packed.getvalue()


def scan_shard(data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> list[SampleRow]:
    """One row per sample of a tar, in the order of the tar.

    Raises:
        ConfigError: a latent of another shape or type, or without a label.
    """
    latents: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            start, stop = member.offset_data, member.offset_data + member.size
            if member.name.endswith(LATENT_SUFFIX):
                header = io.BytesIO(data[start : min(stop, start + 4096)])
                np.lib.format.read_magic(header)
                found, fortran, kind = np.lib.format.read_array_header_1_0(header)
                if (found, fortran, kind) != (shape, False, dtype):
                    raise ConfigError(f"{member.name} holds {kind} {found}, expected {dtype} {shape}: encode again")
                offset = start + header.tell()
                latents[member.name.removesuffix(LATENT_SUFFIX)] = offset, zlib.crc32(data[offset:stop])
            elif member.name.endswith(LABEL_SUFFIX):
                labels[member.name.removesuffix(LABEL_SUFFIX)] = int(data[start:stop])
    if latents.keys() != labels.keys():
        key = min(latents.keys() ^ labels.keys())
        raise ConfigError(f"sample {key} has no {LATENT_SUFFIX if key in labels else LABEL_SUFFIX}: encode again")
    return [SampleRow(offset, labels[key], crc) for key, (offset, crc) in latents.items()]
