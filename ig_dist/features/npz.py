"""ADM's files of pictures: an npz that is read without its whole in memory.

``arr_0`` is uint8 (N, H, W, channels), ``arr_1`` the labels; a reference has mean and covariance of features as ``mu``,
``sigma``, ``mu_s`` and ``sigma_s`` besides. ``npz_writing.py`` writes them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ig_dist.errors import ConfigError, DataError
from ig_dist.storage.faults import unreadable
from ig_dist.storage.files import REQUEST_BYTES, open_url, read_range
from ig_dist.storage.urls import is_file

MAX_WHOLE_BYTES = 2**30
"""The most that ``NpzFile.array`` reads into memory: labels of a hundred million pictures, any covariance."""

_READ_BYTES = 2**20
_MOST_TIMES = 100  # that pictures are larger than the file which they are compressed in


@dataclass(frozen=True)
class Member:
    """One array of a file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stored: bool  # not compressed: ``NpzFile.rows`` can read a slice of it
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

    @property
    def fingerprint(self) -> str:
        """Hash of all names, types, shapes and CRCs: of the contents, without reading them."""
        lines = [f"{name} {m.dtype.str} {m.shape} {m.fortran_order} {m.crc}\n" for name, m in self.members.items()]
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start`` to ``stop`` (exclusive) of a stored array; nothing else is read, and no CRC is checked."""
        member = self.member(name)
        if not member.stored or member.fortran_order:
            raise ConfigError(
                f"{name} of {self.url} is compressed or in Fortran order, and can only be read from its beginning: save"
                " it with numpy.savez"
            )
        start, stop, _ = slice(start, stop).indices(member.shape[0])
        shape = (max(0, stop - start), *member.shape[1:])
        row_bytes = math.prod(member.shape[1:]) * member.dtype.itemsize
        first = member.start + start * row_bytes
        data = _read(self.fs, self.path, first, first + shape[0] * row_bytes)
        return np.frombuffer(data, dtype=member.dtype).reshape(shape)

    def batches(self, name: str, size: int) -> Iterator[NDArray[Any]]:
        """The whole array from its beginning, ``size`` rows at a time, also where it is compressed."""
        member = self.member(name)
        if member.fortran_order:
            raise ConfigError(f"{name} of {self.url} is in Fortran order: save numpy.ascontiguousarray of it")
        with self._opened(name) as file:
            for start in range(0, member.shape[0], size):
                batch = np.empty((min(size, member.shape[0] - start), *member.shape[1:]), member.dtype)
                self._fill(name, file, batch)
                yield batch

    def array(self, name: str) -> NDArray[Any]:
        """A whole array, such as labels or a covariance."""
        member = self.member(name)
        if member.nbytes > MAX_WHOLE_BYTES:
            raise ConfigError(f"{name} of {self.url} has {member.nbytes / 1e9:.1f} GB, too much to be read at once")
        array = np.empty(member.shape, member.dtype, order="F" if member.fortran_order else "C")
        with self._opened(name) as file:
            self._fill(name, file, array.T if member.fortran_order else array)
        return array

    def member(self, name: str) -> Member:
        """What is known of an array."""
        if name not in self.members:
            raise ConfigError(f"{self.url} has no {name}, it has {', '.join(sorted(self.members)) or 'nothing'}")
        return self.members[name]

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[IO[bytes]]:
        """The bytes of an array, read once."""
        with (
            _file(self.fs, self.path, self.size, REQUEST_BYTES // 4) as raw,
            zipfile.ZipFile(raw) as archive,
            archive.open(f"{name}.npy") as file,
        ):
            _read_npy_header(file)
            yield file

    def _fill(self, name: str, file: IO[bytes], array: NDArray[Any]) -> None:
        view, done = array.reshape(-1).view(np.uint8), 0
        try:
            while done < len(view):
                data = file.read(min(len(view) - done, _READ_BYTES))
                if not data:
                    raise EOFError("it ends too early")
                view[done : done + len(data)] = np.frombuffer(data, np.uint8)
                done += len(data)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
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
        with _file(fs, path, entry["size"], 2**16) as file, zipfile.ZipFile(file) as archive:
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


def _member(what: str, file: io.BufferedReader, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    try:
        with archive.open(info) as data:
            shape, fortran_order, dtype = _read_npy_header(data)
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


def _read_npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"npy version {version}")


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


def _read(fs: Any, path: str, start: int, stop: int, into: memoryview | None = None) -> memoryview:
    try:
        return read_range(fs, path, start, stop, into=into)
    except OSError as error:
        raise unreadable(fs, path, error) from None


def _file(fs: Any, path: str, size: int, buffer: int) -> io.BufferedReader:
    return io.BufferedReader(_Ranges(fs, path, size), buffer)


class _Ranges(io.RawIOBase):
    """A file of any storage as Python has them, by reads that outlast the storage's faults."""

    def __init__(self, fs: Any, path: str, size: int) -> None:
        self._fs, self._path, self._size, self._position = fs, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "before the file's beginning")
        self._position = base + offset
        return self._position

    def readinto(self, into: Any) -> int:
        count = max(0, min(len(into), self._size - self._position))
        if count:
            _read(self._fs, self._path, self._position, self._position + count, memoryview(into).cast("B"))
            self._position += count
        return count
