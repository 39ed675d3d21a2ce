"""Writing an npz as one stream of known size: any number of pictures in the memory of a few.

Members are stored, not compressed: ADM's evaluator reads them as a stream, and a slice of pictures is a range of bytes.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ig_dist.errors import DataError
from ig_dist.storage.faults import PATIENCE, Patience
from ig_dist.storage.urls import full_url, is_local
from ig_dist.storage.writes import write_durably, write_stream

STALE_S = 3600.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Streamed(NamedTuple):
    """An array whose content comes in pieces."""

    shape: tuple[int, ...]
    dtype: str  # such as ``uint8``
    chunks: Callable[[], Iterable[NDArray[Any]]]
    """Called once: its content in order, cut along the first axis in whatever way."""


def write_npz(fs: Any, path: str, arrays: Mapping[str, Streamed], patience: Patience = PATIENCE) -> int:
    """Write an npz that is whole or not there, in the memory of a few chunks. Same arrays, same bytes, in their order.

    Returns:
        The file's size, which is known beforehand (``npz_bytes``).

    Raises:
        DataError: no space for it, found before the first byte where the disk tells; or the storage failed.
    """
    size = npz_bytes(arrays)
    if is_local(fs):
        _write_local(Path(path), _zipped(arrays), size)
        return size
    try:
        write_stream(fs, path, _zipped(arrays), patience, size=size)
    except OSError as error:
        raise DataError(f"{full_url(fs, path)}: {error}: run again") from None
    return size


def npz_bytes(arrays: Mapping[str, Streamed]) -> int:
    """The size of the file that ``write_npz`` makes."""
    limit, position, directory = zipfile.ZIP64_LIMIT, 0, 0
    for name, array in arrays.items():
        file_name, size = f"{name}.npy", len(_npy_header(array)) + _data_bytes(array)
        wide = (16 if size > limit else 0) + (8 if position > limit else 0)
        directory += 46 + len(file_name) + (4 + wide if wide else 0)
        position += 30 + len(file_name) + 20 + size + 24  # header, with room for 64-bit sizes; what follows the data
    return position + directory + (76 if position > limit else 0) + 22


def _zipped(arrays: Mapping[str, Streamed]) -> Iterator[memoryview]:
    """The bytes of the file: what zipfile writes to a stream that cannot seek."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            missing = _data_bytes(array)
            with archive.open(entry, "w", force_zip64=True) as member:  # always: one layout, whatever the size
                member.write(_npy_header(array))
                for chunk in array.chunks():
                    if chunk.dtype != np.dtype(array.dtype):
                        raise ValueError(f"{name}: a chunk is {chunk.dtype}, not {array.dtype}")
                    if chunk.nbytes:
                        member.write(np.ascontiguousarray(chunk).data.cast("B"))
                        missing -= chunk.nbytes
                        yield from sink.taken()
            if missing:
                raise ValueError(f"{name}: its chunks have {-missing:+d} bytes against its shape {array.shape}")
    yield from sink.taken()


class _Sink(io.RawIOBase):
    """Takes what zipfile writes. It tells no position, so zipfile writes a stream."""

    def __init__(self) -> None:
        self._pieces: list[memoryview] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(memoryview(data))
        return len(data)

    def taken(self) -> list[memoryview]:
        pieces, self._pieces = self._pieces, []
        return pieces


def _npy_header(array: Streamed) -> bytes:
    file = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(array.dtype))
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": array.shape})
    return file.getvalue()


def _data_bytes(array: Streamed) -> int:
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def _write_local(path: Path, pieces: Iterator[memoryview], size: int) -> None:
    def no_space(free: str) -> DataError:
        return DataError(
            f"{path} takes {size / 1e9:.2f} GB, and {free}: make room or choose another place, then run again"
        )

    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path.parent, f"{path.name}.*.tmp")
    if (free := shutil.disk_usage(path.parent).free) < size:
        raise no_space(f"its disk has {free / 1e9:.2f} GB free")
    try:
        write_durably(path, pieces)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise no_space("its disk or quota is full") from None


def remove_stale(folder: Path, pattern: str) -> None:
    """Remove old parts of files, by processes that were killed; one at work writes all the time."""
    for left in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            if time.time() - left.stat().st_mtime > STALE_S:
                left.unlink()
