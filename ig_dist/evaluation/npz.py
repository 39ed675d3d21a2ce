"""ADM's files of pictures: an npz that is written as one stream of known size, and read without its whole in memory.

``arr_0`` is uint8 (N, H, W, channels), ``arr_1`` the labels; a reference has mean and covariance of features as ``mu``,
``sigma``, ``mu_s`` and ``sigma_s`` besides. Members are stored, not compressed: ADM's evaluator reads them as a stream,
and a slice of pictures is a range of bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import math
import os
import shutil
import struct
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ig_dist.background import in_background
from ig_dist.errors import ConfigError, DataError
from ig_dist.storage.faults import PATIENCE, Patience, retried, unreadable
from ig_dist.storage.files import REQUEST_BYTES, open_url, read_range, request_timeout, write_whole
from ig_dist.storage.s3 import md5
from ig_dist.storage.urls import full_url, is_file, is_local

MAX_WHOLE_BYTES = 2**30
"""The most that ``NpzFile.array`` reads into memory: labels of a hundred million pictures, any covariance."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_BYTES = 2**20
_MOST_PARTS = 10_000  # of one upload to S3
_PARTS_UNDER_WAY = 3


class Streamed(NamedTuple):
    """An array whose content comes in pieces."""

    shape: tuple[int, ...]
    dtype: str
    """Such as ``uint8``."""
    chunks: Callable[[], Iterable[NDArray[Any]]]
    """Called once: its content in order, cut along the first axis in whatever way."""


def write_npz(fs: Any, path: str, arrays: Mapping[str, Streamed], patience: Patience = PATIENCE) -> int:
    """Write an npz that is whole or not there, in the memory of a few chunks. Same arrays, same bytes.

    Args:
        fs: a file system from ``open_url``.
        path: the file.
        arrays: by name, without ``.npy``; those that come first are first in the file.
        patience: how long faults of the storage are borne.

    Returns:
        The file's size, which is known beforehand (``npz_bytes``).

    Raises:
        DataError: no space for it, found before the first byte where the disk tells; or the storage failed.
    """
    size = npz_bytes(arrays)
    if is_local(fs):
        _write_local(Path(path), _zipped(arrays), size)
    elif "s3" in fs.protocol:
        _write_s3(fs, path, _zipped(arrays), size, patience)
    else:
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            with fs.open(temporary, "wb") as file:
                for piece in _zipped(arrays):
                    file.write(piece)
            fs.mv(temporary, path)
        except BaseException:
            with contextlib.suppress(Exception):
                fs.rm_file(temporary)
            raise
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


class _Sink:
    """What zipfile wrote; without ``tell`` it is a stream."""

    def __init__(self) -> None:
        self._pieces: list[memoryview] = []

    def write(self, data: bytes | memoryview) -> int:
        self._pieces.append(memoryview(data))
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

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
    if (free := shutil.disk_usage(path.parent).free) < size:
        raise no_space(f"its disk has {free / 1e9:.2f} GB free")
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise no_space("its disk or quota is full") from None
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(folder)
    finally:
        os.close(folder)


def _write_s3(fs: Any, path: str, pieces: Iterator[memoryview], size: int, patience: Patience) -> None:
    """In parts that are sent again one by one, some of them at a time."""
    part_bytes = max(REQUEST_BYTES, -(-size // _MOST_PARTS))
    parts = _parts(pieces, part_bytes)
    if size <= part_bytes:
        write_whole(fs, path, b"".join(parts), patience)
        return
    bucket, key, _ = fs.split_path(path)

    def call(method: str, length: int = 0, **arguments: Any) -> Any:
        options = {"Bucket": bucket, "Key": key, **arguments, **request_timeout(fs, length, patience)}
        return retried(fs, path, lambda: fs.call_s3(method, **options), patience)

    upload = call("create_multipart_upload")["UploadId"]

    def sent(number: int, body: bytes) -> dict[str, Any]:
        part = {"PartNumber": number, "UploadId": upload}
        tag = call("upload_part", len(body), Body=body, ContentMD5=md5(body), **part)["ETag"]
        return {"PartNumber": number, "ETag": tag}

    try:
        under_way: list[Future[dict[str, Any]]] = []
        done = []
        for number, body in enumerate(parts, start=1):
            if len(under_way) == _PARTS_UNDER_WAY:
                done.append(under_way.pop(0).result())
            under_way.append(in_background(lambda number=number, body=body: sent(number, body)))  # type: ignore[misc]
        done += [future.result() for future in under_way]
        with contextlib.suppress(FileNotFoundError):  # it was completed, and the answer lost: the size tells
            call("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": done})
        if (there := retried(fs, path, lambda: fs.size(path), patience)) != size:
            raise DataError(f"{full_url(fs, path)} has {there} of {size} bytes: run again")
    except BaseException:
        with contextlib.suppress(Exception):
            fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload, timeout=10)
        raise


def _parts(pieces: Iterable[memoryview], size: int) -> Iterator[bytes]:
    """The same bytes cut into parts of one size; the last one is shorter."""
    part = bytearray()
    for piece in pieces:
        while len(part) + len(piece) >= size:
            taken = size - len(part)
            part += piece[:taken]
            yield bytes(part)
            part.clear()
            piece = piece[taken:]
        part += piece
    if part:
        yield bytes(part)


@dataclass(frozen=True)
class Member:
    """One array of a file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stored: bool
    """Not compressed: ``NpzFile.rows`` can read a slice of it."""
    fortran_order: bool
    start: int
    """Of the data: in the file where it is stored, else in the decompressed member."""
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
        """Rows ``start`` to ``stop`` (exclusive) of a stored array; nothing else is read, and no CRC is checked.

        Raises:
            ConfigError: no such array, or it is compressed or in Fortran order.
            DataError: the file ends before, or the storage failed.
        """
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
        """The whole array from its beginning, ``size`` rows at a time, also where it is compressed.

        Raises:
            ConfigError: no such array, or it is in Fortran order.
            DataError: its content is damaged, by its CRC; that is found before the last batch is given out.
        """
        member = self.member(name)
        if member.fortran_order:
            raise ConfigError(f"{name} of {self.url} is in Fortran order: save numpy.ascontiguousarray of it")
        with self._opened(name) as file:
            for start in range(0, member.shape[0], size):
                batch = np.empty((min(size, member.shape[0] - start), *member.shape[1:]), member.dtype)
                self._fill(name, file, batch)
                yield batch

    def array(self, name: str) -> NDArray[Any]:
        """A whole array, such as labels or a covariance.

        Raises:
            ConfigError: no such array, or it is above ``MAX_WHOLE_BYTES``.
            DataError: its content is damaged, by its CRC.
        """
        member = self.member(name)
        if member.nbytes > MAX_WHOLE_BYTES:
            raise ConfigError(f"{name} of {self.url} has {member.nbytes / 1e9:.1f} GB, too much to be read at once")
        array = np.empty(member.shape, member.dtype, order="F" if member.fortran_order else "C")
        with self._opened(name) as file:
            self._fill(name, file, array.T if member.fortran_order else array)
        return array

    def member(self, name: str) -> Member:
        """What is known of an array.

        Raises:
            ConfigError: there is none of the name.
        """
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

    Args:
        url: a path or any URL, also http.
        what: names the setting in errors.
        images: it must have pictures, ``arr_0`` uint8 (N, H, W, 1 or 3).

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
        raise ConfigError(f"{what} {url}: there is no such file") from None
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
    except (ValueError, NotImplementedError, RuntimeError, EOFError) as error:
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
