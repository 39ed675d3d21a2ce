"""The state of a rank at one step, in host memory, as the safetensors file that is written of it.

    8 bytes     length of the header, little endian
    header      JSON: name -> {"dtype", "shape", "data_offsets"}, padded with spaces
    data        the tensors' bytes, one after the other

The device's tensors are copied straight to their places in the file, so what is hashed and written later in the
background is the only copy there is: host memory holds this rank's share of the state once.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from zlib_ng import zlib_ng

from ig_dist.parallel.engine import Piece

CHUNK_BYTES = 32 * 2**20
"""A power of two: torch rounds pinned memory up to one."""
SMALL_BYTES = 2**20
"""Tensors below this lie together, so that one request to an object store reads many of them."""
PART_BYTES = 2**20
"""Each so many bytes of a piece have a CRC of their own: whoever reads a part of a piece can check it."""
ALIGNMENT = 64
"""As torch aligns tensors on CPUs: sums may round otherwise elsewhere."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def layout(pieces: Mapping[str, Piece]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The head of a rank's file, and the place of each piece in it: first byte, and the one after the last."""

    def place(item: tuple[str, Piece]) -> tuple[int, bool, bool, str]:
        # the widest types first, odd sizes last among them: tensors are aligned, and can be used where they are read
        size = item[1].data.nbytes
        return -item[1].data.element_size(), size % ALIGNMENT > 0, size >= SMALL_BYTES, item[0]

    header, end = dict[str, Any](), 0
    for name, piece in sorted(pieces.items(), key=place):
        begin, end = end, end + piece.data.nbytes
        offsets = [begin, end]
        header[name] = {"dtype": DTYPES[piece.data.dtype], "shape": list(piece.data.shape), "data_offsets": offsets}
    packed = json.dumps(header).encode()
    packed += b" " * (-(8 + len(packed)) % ALIGNMENT)
    first = len(packed).to_bytes(8, "little") + packed
    places = {name: [len(first) + offset for offset in entry["data_offsets"]] for name, entry in header.items()}
    return first, {name: (begin, end) for name, (begin, end) in places.items()}


class Snapshot:
    """The file, in buffers that the next snapshot uses again; pinned where there is a GPU to copy from."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._bytes = 0
        self._places: dict[str, tuple[Piece, int, int]] = {}

    def take(self, pieces: Mapping[str, Piece]) -> None:
        """Copy the pieces. They may change as soon as this returns; it waits for the device."""
        first, places = layout(pieces)
        self._bytes = max((end for _, end in places.values()), default=len(first))
        devices = {piece.data.device for piece in pieces.values() if piece.data.is_cuda}
        while len(self._buffers) * CHUNK_BYTES < self._bytes:
            self._buffers.append(torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=bool(devices)))
        self._put(0, torch.frombuffer(bytearray(first), dtype=torch.uint8))
        self._places = {}
        for name, (begin, end) in places.items():
            piece = pieces[name]
            self._places[name] = piece._replace(data=piece.data.to("meta")), begin, end
            self._put(begin, piece.data.detach().contiguous().reshape(-1).view(torch.uint8))
        for device in devices:
            torch.cuda.current_stream(device).synchronize()

    def chunks(self) -> list[memoryview]:
        """The bytes of the file, without a copy; the next ``take`` overwrites them."""
        return [span.numpy().data for span in self._spans(0, self._bytes)]

    def header(self) -> list[int]:
        """Bytes of the header, and their CRC-32."""
        size = min((begin for _, begin, _ in self._places.values()), default=self._bytes)
        return [size, self._crc(0, size)]

    def _spans(self, begin: int, end: int) -> Iterator[Tensor]:
        """These bytes of the file, where they lie."""
        while begin < end:
            number, first = divmod(begin, CHUNK_BYTES)
            span = self._buffers[number][first : first + end - begin]
            yield span
            begin += len(span)

    def _crc(self, begin: int, end: int) -> int:
        value = 0
        for span in self._spans(begin, end):
            value = zlib_ng.crc32(span.numpy().data, value)
        return value

    def described(self) -> dict[str, list[Any]]:
        """Of each piece: [shape and dtype of its tensor, first element, the one after the last, first byte, CRCs].

        Reads all bytes: for the background.
        """
        return {name: described(piece, begin, end, self._crc) for name, (piece, begin, end) in self._places.items()}

    def _put(self, at: int, data: Tensor) -> None:
        for span in self._spans(at, at + len(data)):
            span.copy_(data[: len(span)], non_blocking=True)
            data = data[len(span) :]


def described(piece: Piece, begin: int, end: int, crc: Callable[[int, int], int]) -> list[Any]:
    """What a manifest says of a piece that lies at these bytes of its file."""
    crcs = [crc(first, min(first + PART_BYTES, end)) for first in range(begin, end, PART_BYTES)]
    dtype = str(piece.data.dtype).removeprefix("torch.")
    return [list(piece.shape), dtype, piece.start, piece.start + piece.data.numel(), begin, crcs]
