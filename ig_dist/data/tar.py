"""Tar archives, read front to back so that every byte is accounted for.

The standard library's reader takes a damaged header for the end of the archive, and a missing end for an end: samples
would be lost in silence. It also takes several times as long for the small files that latents are.
"""

import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from ig_dist.errors import DataError

_BLOCK = 512
_PIECE = 2**20
_LARGEST = 2**62  # that may be asked for
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes: whatever their size says
_NAMING = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)  # of the member that follows
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_SPARSE = "pack it again, without --sparse"
_UNNAMED = (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)  # they are of no member


class DamagedTar(DataError):  # noqa: N818  (a verdict on one file; whoever asked says where it is)
    """Bytes that are no tar, or not the whole of one."""

    def __init__(self, what: str, remedy: str = "copy it again from where it came from") -> None:
        super().__init__(what)
        self.remedy = remedy


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int  # of its first byte in the tar
    size: int
    data: bytes


def read_tar(file: IO[bytes], begin: int = 0, end: int = _LARGEST, *, most: int = _LARGEST) -> Iterator[Member]:
    """The regular files of a tar (ustar, pax, GNU), in order. The file is read once, from front to back, to its end.

    The tar lies at bytes ``begin`` to ``end`` of the file, which stands at its first. Data of more than ``most`` bytes
    are passed over, and not given: ``end`` is known then, and the file can seek.

    Raises:
        DamagedTar: at the first byte that does not fit.
    """
    position, name, size = begin, None, None
    while True:
        header = _header(file.read(min(_BLOCK, end - position)), position, first=position == begin)
        position += _BLOCK
        if header is None:
            _refuse_more(file, position, end)
            return
        own_name, kind, own_size = header
        if kind == tarfile.GNUTYPE_SPARSE:
            raise DamagedTar(f"holds {own_name} as a sparse file", _SPARSE)
        length = 0 if kind in _WITHOUT_DATA else own_size if size is None else size
        at, after, data = position, position + length + -length % _BLOCK, b""
        if length > most and kind not in _NAMING:
            position = min(file.seek(min(after, _LARGEST)), end)
        else:
            data = file.read(min(length, end - at))
            position += len(data) + len(file.read(min(-length % _BLOCK, end - at - len(data))))
        if position != after:
            raise DamagedTar(f"is cut off at byte {position}, within {name or own_name}")
        if kind in _NAMING:
            new_name, new_size = _overrides(kind, data, at)
            name, size = new_name or name, size if new_size is None else new_size
        elif kind not in _UNNAMED:
            if kind in _REGULAR:
                yield Member(name or own_name, at, length, data)
            name, size = None, None


def _header(block: bytes, position: int, *, first: bool) -> tuple[str, bytes, int] | None:
    """Name, kind and size in a header, as POSIX ustar has them; None: the zeros that end a tar."""
    if first and block.startswith(_COMPRESSED):
        raise DamagedTar(
            "is compressed, so nothing in it can be read by its place", "unpack it (gunzip, bunzip2, unxz, unzstd)"
        )
    if len(block) < _BLOCK:
        raise DamagedTar(f"is cut off at byte {position + len(block)}: the zeros that end a tar are missing")
    if block.count(0) == _BLOCK:
        return None
    try:
        # the checksum is taken with spaces in its own place
        if int(block[148:156].strip(b"\0 "), 8) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
            raise ValueError("bad checksum")
        size = block[124:136]
        number = int.from_bytes(size[1:], "big") if size[0] == 0x80 else int(size.strip(b"\0 ") or b"0", 8)
        if number < 0:
            raise ValueError("negative size")
    except ValueError as error:
        what = "it is no tar, or the header" if first else "the header"
        raise DamagedTar(f"{what} at byte {position} is damaged ({error})") from None
    name, kind = block[:100].split(b"\0", 1)[0], block[156:157]
    if block[257:263] == b"ustar\0" and block[345]:  # GNU keeps other things there
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    if kind == tarfile.AREGTYPE and name.endswith(b"/"):
        kind = tarfile.DIRTYPE
    return name.decode(errors="surrogateescape"), kind, number


def _overrides(kind: bytes, data: bytes, begin: int) -> tuple[str | None, int | None]:
    """Name and size that a pax header or GNU long name gives to the next member, where it does."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return data.split(b"\0", 1)[0].decode(errors="surrogateescape"), None
    fields: dict[bytes, bytes] = {}
    rest = data.rstrip(b"\0")
    try:
        while rest:
            length = int(rest.split(b" ", 1)[0])
            key, value = rest[:length].split(b" ", 1)[1].split(b"=", 1)
            if not 0 < length <= len(rest) or not value.endswith(b"\n"):
                raise ValueError(f"record of {length} bytes")
            fields[key], rest = value[:-1], rest[length:]
        name, size = fields.get(b"path"), fields.get(b"size")
        if any(key.startswith(b"GNU.sparse") for key in fields):
            raise DamagedTar("holds sparse files", _SPARSE)
        if size is not None and not size.isdigit():
            raise ValueError(f"size {size!r}")
        decoded = None if name is None else name.decode(errors="surrogateescape")
        return decoded, None if size is None else int(size)
    except (ValueError, IndexError) as error:
        raise DamagedTar(f"the extended header at byte {begin} is damaged ({error})") from None


def _refuse_more(file: IO[bytes], position: int, end: int) -> None:
    """Read to the end of the tar, where only zeros may be."""
    while data := file.read(min(_PIECE, end - position)):
        if data.count(0) != len(data):
            at = position + len(data) - len(data.lstrip(b"\0"))
            raise DamagedTar(f"goes on at byte {at}, after its end: zeros where a header was, or tars put together")
        position += len(data)
