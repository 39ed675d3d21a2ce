"""ADM's files of pictures: an npz that is read, and written, without its whole in memory.

``arr_0`` is uint8 (N, H, W, channels), ``arr_1`` the labels; a reference has mean and covariance of features as ``mu``,
``sigma``, ``mu_s`` and ``sigma_s`` besides. Ours are stored, not compressed: ADM's evaluator reads them as a stream,
and a slice of pictures is a range of bytes.
"""

import contextlib
import errno
import hashlib
import io
import math
import shutil
import struct
import time
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from fsspec.spec import AbstractBufferedFile
from numpy.typing import NDArray

from ig_dist.errors import ConfigError, DataError
from ig_dist.storage.faults import PATIENCE, Patience, unreadable
from ig_dist.storage.files import REQUEST_BYTES, open_url, read_range
from ig_dist.storage.urls import full_url, is_file, is_local
from ig_dist.storage.writes import write_stream

MAX_WHOLE_BYTES = 2**30
"""The most that ``NpzFile.array`` reads into memory: labels of a hundred million pictures, any covariance."""
STALE_S = 3600.0
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_MOST_TIMES = 100  # that pictures are larger than the file which they are compressed in
_HEADER_BYTES = 2**10  # more than what stands around an array in the file
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Member(NamedTuple):
    """One array of a file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stored: bool  # not compressed
    fortran_order: bool
    start: int  # of the data: in the file where it is stored, else in the decompressed member
    crc: int

    @property
    def nbytes(self) -> int:
        """Size of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class NpzFile:
    """An npz on a disk or an object store; nothing of it is kept open or in memory."""

    url: str
    fs: Any
    path: str
    size: int
    members: Mapping[str, Member]
    _compressed: dict[str, IO[bytes]] = field(default_factory=dict, init=False)  # arrays, as far as they were read

    @property
    def fingerprint(self) -> str:
        """Hash of all names, types, shapes and CRCs: of the contents, without reading them."""
        lines = [f"{name} {m.dtype.str} {m.shape} {m.fortran_order} {m.crc}\n" for name, m in self.members.items()]
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start`` to ``stop`` (exclusive) of an array.

        Of a stored one nothing else is read, and no CRC is checked. A compressed one is read forwards: rows are cheap
        where they are asked for in order.
        """
        member = self.member(name)
        if member.fortran_order:
            raise ConfigError(f"{name} of {self.url} is in Fortran order: save numpy.ascontiguousarray of it")
        start, stop, _ = slice(start, stop).indices(member.shape[0])
        shape = (max(0, stop - start), *member.shape[1:])
        row_bytes = math.prod(member.shape[1:]) * member.dtype.itemsize
        first, size = member.start + start * row_bytes, shape[0] * row_bytes
        if member.stored:
            return np.frombuffer(_read(self.fs, self.path, first, first + size), member.dtype).reshape(shape)
        with self._told_if_damaged(name):
            file = self._compressed[name] = self._compressed.get(name) or self._opened(name)
            file.seek(first)
            return np.frombuffer(file.read(size), member.dtype).reshape(shape)

    def array(self, name: str) -> NDArray[Any]:
        """A whole array, such as labels or a covariance."""
        member = self.member(name)
        if member.nbytes > MAX_WHOLE_BYTES:
            raise ConfigError(f"{name} of {self.url} has {member.nbytes / 1e9:.1f} GB, too much to be read at once")
        with self._told_if_damaged(name), self._opened(name) as file:
            array: NDArray[Any] = np.lib.format.read_array(file)
            return array

    def member(self, name: str) -> Member:
        """What is known of an array."""
        if name not in self.members:
            raise ConfigError(f"{self.url} has no {name}, it has {', '.join(sorted(self.members)) or 'nothing'}")
        return self.members[name]

    def _opened(self, name: str) -> IO[bytes]:
        file = _Ranges(self.fs, self.path, size=self.size, block_size=REQUEST_BYTES // 4)
        return zipfile.ZipFile(file).open(f"{name}.npy")

    @contextlib.contextmanager
    def _told_if_damaged(self, name: str) -> Iterator[None]:
        try:
            yield
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
            raise DataError(f"{name} of {self.url} is damaged ({error}): restore the file") from None


def open_npz(url: str, what: str = "npz", *, images: bool = True) -> NpzFile:
    """Look at an npz: its arrays' names, types and shapes; their content is not read. No pickles are.

    ``url`` may be http too; ``what`` names the setting in errors. With ``images`` it must have pictures, ``arr_0``
    uint8 (N, H, W, 1 or 3).

    Raises:
        ConfigError: there is none, it is none, or its pictures are not of that kind.
        DataError: it is damaged, or the storage failed.
    """
    fs, path = open_url(url, what, web=True)
    try:
        entry = fs.info(path)
        if not is_file(entry):
            raise ConfigError(f"{what} {url} is no file: give an npz")
        if entry["size"] is None:
            raise ConfigError(f"{what} {url}: the server does not tell its size: download it and use the copy")
        with _Ranges(fs, path, size=entry["size"], block_size=2**16) as file, zipfile.ZipFile(file) as archive:
            members = {
                info.filename.removesuffix(".npy"): _member(f"{info.filename} of {url}", file, archive, info)
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
    except FileNotFoundError:
        raise ConfigError(f"{what} {url}: there is no such file: give one that is there") from None
    except OSError as error:
        raise unreadable(fs, path, error) from None
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{what} {url} is no npz, or only a part of one ({error})") from None
    npz = NpzFile(url, fs, path, entry["size"], members)
    if images:
        _check_images(npz)
    return npz


def _member(what: str, file: IO[bytes], archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    try:
        with archive.open(info) as data:
            if (version := np.lib.format.read_magic(data)) not in _READ_HEADER:
                raise ValueError(f"npy version {version}")
            shape, fortran_order, dtype = _READ_HEADER[version](data)
            start = data.tell()
    except (ValueError, NotImplementedError, RuntimeError, EOFError, SyntaxError, tokenize.TokenError) as error:
        raise ConfigError(f"{what} is no array that can be read ({' '.join(str(error).split())})") from None
    if dtype.hasobject:
        raise ConfigError(f"{what} holds Python objects, which are never read: save it as numbers")
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or start + size != info.file_size:
        raise DataError(f"{what} has {info.file_size - start} bytes of data, and the shape {shape}: restore the file")
    stored = info.compress_type == zipfile.ZIP_STORED
    if stored:  # the names' lengths stand in the header before the data, and may differ from the directory's
        file.seek(info.header_offset + 26)
        start += info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    return Member(shape, dtype, stored, fortran_order, start, info.CRC)


def _check_images(npz: NpzFile) -> None:
    pictures = npz.member("arr_0")
    if pictures.dtype != np.uint8:
        raise ConfigError(f"arr_0 of {npz.url} is {pictures.dtype}, pictures are uint8 (0 to 255)")
    if len(pictures.shape) != 4 or pictures.shape[3] not in (1, 3):
        raise ConfigError(
            f"arr_0 of {npz.url} has the shape {pictures.shape}, pictures are (N, H, W, 3) or (N, H, W, 1)"
        )
    if not pictures.nbytes:
        raise ConfigError(f"arr_0 of {npz.url} has the shape {pictures.shape}: there are no pictures in it")
    if not pictures.stored and pictures.nbytes > max(MAX_WHOLE_BYTES, _MOST_TIMES * npz.size):
        raise ConfigError(
            f"arr_0 of {npz.url} unfolds to {pictures.nbytes / 1e9:.1f} GB, more than {_MOST_TIMES} times its file:"
            " pictures do not, save it with numpy.savez"
        )
    if pictures.fortran_order:
        raise ConfigError(f"arr_0 of {npz.url} is in Fortran order: save numpy.ascontiguousarray of it")


def _read(fs: Any, path: str, start: int, stop: int) -> memoryview:
    try:
        return read_range(fs, path, start, stop)
    except OSError as error:
        raise unreadable(fs, path, error) from None


class _Ranges(AbstractBufferedFile):  # type: ignore[misc]
    """A file of any storage as Python has them, by reads that outlast the storage's faults."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return bytes(_read(self.fs, self.path, start, end))

    def seek(self, loc: int, whence: int = io.SEEK_SET) -> int:
        try:
            return int(super().seek(loc, whence))
        except ValueError as error:  # before the beginning: zipfile looks there, and expects what files say
            raise OSError(str(error)) from None


class Streamed(NamedTuple):
    """An array whose content comes in pieces."""

    shape: tuple[int, ...]
    dtype: str  # such as ``uint8``
    chunks: Callable[[], Iterable[NDArray[Any]]]
    """Called once: its content in order, cut along the first axis in whatever way."""

    @property
    def nbytes(self) -> int:
        """Size of the array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_npz(fs: Any, path: str, arrays: Mapping[str, Streamed], patience: Patience = PATIENCE) -> None:
    """Write an npz that is whole or not there, in the memory of a few chunks. Same arrays, same bytes, in their order.

    Raises:
        DataError: no space for it, found before the first byte where the disk tells; or the storage failed.
    """
    size = sum(array.nbytes + _HEADER_BYTES for array in arrays.values())

    def no_space(free: str) -> DataError:
        return DataError(
            f"{path} takes {size / 1e9:.2f} GB, and {free}: make room or choose another place, then run again"
        )

    if is_local(fs):
        folder, name = Path(path).parent, Path(path).name
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale(folder, f"{name}.*.tmp")
        if (free := shutil.disk_usage(folder).free) < size:
            raise no_space(f"its disk has {free / 1e9:.2f} GB free")
    try:
        write_stream(fs, path, _zipped(arrays), patience, size=size)
    except OSError as error:
        if error.errno in _FULL:
            raise no_space("its disk or quota is full") from None
        raise DataError(f"{full_url(fs, path)}: {error}: run again") from None


def _zipped(arrays: Mapping[str, Streamed]) -> Iterator[memoryview]:
    """The bytes of the file: what zipfile writes to a stream that cannot seek."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            descr, missing = np.lib.format.dtype_to_descr(np.dtype(array.dtype)), array.nbytes
            with archive.open(entry, "w", force_zip64=True) as member:  # always: one layout, whatever the size
                header = {"descr": descr, "fortran_order": False, "shape": array.shape}
                np.lib.format.write_array_header_1_0(member, header)
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


def remove_stale(folder: Path, pattern: str) -> None:
    """Remove old parts of files, by processes that were killed; one at work writes all the time."""
    for left in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            if time.time() - left.stat().st_mtime > STALE_S:
                left.unlink()
