"""Data and weights that were made to do harm: each is refused in one line, at once, and takes no memory or disk."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import struct
import tarfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from zlib_ng import zlib_ng

from ig_dist.autoencoders.vae import load_autoencoder
from ig_dist.convert.published import convert_published
from ig_dist.data import table as side_file
from ig_dist.data.cache import BlockCache
from ig_dist.data.index import TABLE_NAME, read_index
from ig_dist.data.reader import ShardReader
from ig_dist.data.shards import locate_array
from ig_dist.data.sources import find_source
from ig_dist.data.sources.idx import find_idx, idx_source
from ig_dist.data.tar import Member
from ig_dist.encoding import gather
from ig_dist.encoding.records import Dest
from ig_dist.errors import ConfigError, DataError, IgDistError
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import read_range
from ig_dist.storage.tensor_files import read_safetensors, read_torch_file
from tests.unit.test_stream import make_index

END = bytes(2 * tarfile.BLOCKSIZE)


def refusal(call: Callable[[], object], kind: type[IgDistError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    """A tar's header, also of sizes that no file has."""
    block = bytearray(tarfile.BLOCKSIZE)
    block[: len(name)] = name
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    block[124:136] = b"%011o\0" % size if 0 <= size < 8**11 else (size % 256**12 | (size > 0) << 95).to_bytes(12, "big")
    block[136:148], block[156:157], block[257:265] = b"0" * 11 + b"\0", kind, b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(key: bytes, value: bytes) -> bytes:
    record = b"%d %s=%s\n" % (len(key) + len(value) + 5, key, value)
    return header(b"pax", len(record), b"x") + record.ljust(tarfile.BLOCKSIZE, b"\0")


PICTURE = header(b"a.jpg", 0)
TARS = {
    "negative size": PICTURE + header(b"b.jpg", -512) + END,
    "negative size of a long name": header(b"n", -512, b"L") + END,
    "more than there is memory": header(b"n", 2**60, b"x") + END,
    "more than fits a number": header(b"n", 2**80, b"x") + END,
    "thousands of headers of one file": pax(b"abcde", b"f") * 3000 + END,
    "a sparse map of letters": pax(b"GNU.sparse.map", b"x,y") + PICTURE + END,
    "a damaged header after a good one": PICTURE + PICTURE[:140] + b"7" + PICTURE[141:] + END,
    "a label of gigabytes": PICTURE + header(b"a.cls", 2**30),
}


@pytest.mark.parametrize("case", TARS)
def test_tars_of_pictures(case: str, tmp_path: Path) -> None:
    (file := tmp_path / "a.tar").write_bytes(TARS[case])
    if "gigabytes" in case:
        os.truncate(file, 2**30 + 2048)  # it takes no disk
    message = refusal(lambda: find_source(str(file)).open())
    words = {"a label of gigabytes": "not a class number", "thousands of headers of one file": "holds no pictures"}
    assert "a.tar" in message and words.get(case, "is not a readable tar") in message


def test_arrays_of_a_shape_that_overflows() -> None:
    text = b"{'descr': '<f2', 'fortran_order': False, 'shape': (4294967296, 4294967296, 1)}"
    array = b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text
    assert "no plain C-ordered array" in refusal(lambda: locate_array(Member("a.npy", 0, len(array), array)))


COLUMNS: dict[str, Any] = {
    "offset": np.zeros(4, np.int64),
    "label": np.zeros(4, np.int32),
    "crc32": np.zeros(4, np.uint32),
}
BLOCKS: dict[str, Any] = {
    "offset": {"dtype": "I64", "shape": [4], "data_offsets": [0, 32]},
    "label": {"dtype": "I32", "shape": [4], "data_offsets": [32, 48]},
    "crc32": {"dtype": "U32", "shape": [4], "data_offsets": [48, 64]},
}


def packed(head: object) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


SIDE_FILES = {
    "no such file": b"junkjunkjunk",
    "shorter than its length": b"{}",
    "a header of exabytes": struct.pack("<Q", 2**62) + b"{}",
    "a header of a list": packed([]),
    "a deep header": packed(b"[" * 100_000),
    "columns of another kind": packed({**BLOCKS, "label": {"dtype": "BF16", "shape": [8], "data_offsets": [32, 48]}}),
    "floats": safetensors.numpy.save({**COLUMNS, "label": np.zeros(4, np.float32)}),
    "a matrix": safetensors.numpy.save({**COLUMNS, "label": np.zeros((4, 2), np.int32)}),
    "a number": safetensors.numpy.save({**COLUMNS, "label": np.zeros((), np.int32)}),
    "columns of two lengths": safetensors.numpy.save({**COLUMNS, "offset": np.zeros(1, np.int64)}),
    "another column": safetensors.numpy.save({**COLUMNS, "x": np.zeros(4)}),
    "no labels": safetensors.numpy.save({name: c for name, c in COLUMNS.items() if name != "label"}),
    **{
        f"{key} {value}": packed({**BLOCKS, "label": {**BLOCKS["label"], key: value}})
        for key, value in (
            ("shape", ["4"]),
            ("shape", []),
            ("shape", [10**15]),
            ("data_offsets", [-16, 0]),
            ("data_offsets", ["x", 1]),
            ("data_offsets", [0, 10**15]),
        )
    },
}


@pytest.mark.parametrize("case", SIDE_FILES)
@pytest.mark.parametrize("large", [False, True])
def test_side_files_of_an_index(case: str, large: bool, tmp_path: Path) -> None:
    make_index(tmp_path, sizes=[4])
    data, info = SIDE_FILES[case], json.loads((tmp_path / "index.json").read_text())
    info["table_sha256"] = hashlib.sha256(data).hexdigest()
    if large:
        blocks = (data[start : start + side_file.BLOCK] for start in range(0, len(data), side_file.BLOCK))
        info["table_crc32"] = "".join(f"{zlib_ng.crc32(block):08x}" for block in blocks)
    (tmp_path / TABLE_NAME).write_bytes(data)
    (tmp_path / "index.json").write_text(json.dumps(info))
    assert TABLE_NAME in refusal(lambda: read_index(str(tmp_path)))


@pytest.mark.parametrize(
    ("shape", "words"),
    [([0, 8, 8], "greater than 0"), ([-1, -8, 8], "greater than 0"), ([2**31] * 3, "larger than its shards")],
)
def test_shapes_of_an_index(shape: list[int], words: str, tmp_path: Path) -> None:
    make_index(tmp_path, sizes=[4])
    info = json.loads((tmp_path / "index.json").read_text())
    info["latent"]["shape"] = shape
    (tmp_path / "index.json").write_text(json.dumps(info))
    assert words in refusal(lambda: ShardReader(read_index(str(tmp_path))))


def test_pipes_and_links_in_the_place_of_files(tmp_path: Path) -> None:
    index = make_index(tmp_path / "data")
    os.mkfifo(pipe := tmp_path / "pipe")
    for read in (read_safetensors, read_torch_file):
        assert "is no file" in refusal(lambda read=read: read(pipe))  # type: ignore[misc]
    (tmp_path / "data" / TABLE_NAME).unlink()
    os.mkfifo(tmp_path / "data" / TABLE_NAME)
    assert TABLE_NAME in refusal(lambda: read_index(str(tmp_path / "data")))
    (theirs := tmp_path / "theirs").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / index.sha256[:16]).symlink_to(theirs)
    assert "is a link" in refusal(lambda: BlockCache(str(tmp_path / "cache"), 0, index))
    (tmp_path / "dest").mkdir()
    (tmp_path / "dest" / "parts").symlink_to(theirs)
    for name in ("precious", "shard-000000.json"):
        (theirs / name).touch()
    Dest(str(tmp_path / "dest")).sweep(set())
    assert [file.name for file in theirs.iterdir()] == ["precious"]


def test_records_that_are_not_of_their_shard(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "shard-000000.tar").write_bytes(bytes(1024))
    settings = {"source": "s", "tokenizer": "t", "tokenizer_sha256": "0", "precision": "fp32", "image_size": 8}
    settings |= {"image_channels": 1, "store": "sample", "flips": False, "seed": 0, "samples_per_shard": 256}
    right = {"settings": settings, "name": "shard-000000.tar", "bytes": 1024, "samples": 1, "sha256": "x"}
    right |= {"rows": [[0, 0, zlib_ng.crc32(bytes(128)), -1, 0]], "rejected": [], "upscaled": 0}
    right |= {"sums": [0.0], "square_sums": [0.0]}

    def sound(**change: object) -> bool:
        (tmp_path / "parts" / "shard-000000.json").write_text(json.dumps(right | change))
        dest = Dest(str(tmp_path))
        return gather._sound_record(dest, (1, 8, 8), dest.sizes(), 0) is not None

    assert sound()
    for rows in ([], [[-5, 0, 0, -1, 0]], [[2**62, 0, 0, -1, 0]], [[0, 0, 0, 5, 0]], [[2**70, 0, 0, -1, 0]], "x"):
        assert not sound(rows=rows)
    changes: list[dict[str, object]] = [
        {"name": "../x"},
        {"bytes": -1},
        {"samples": -1},
        {"sums": []},
        {"sums": [float("nan")]},
    ]
    for change in changes:
        assert not sound(**change)


def test_pictures_in_idx_files_are_not_unpacked_beyond_what_they_say(tmp_path: Path) -> None:
    import gzip

    for kind, head in (
        ("images-idx3", (0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 8)),
        ("labels-idx1", (0, 0, 8, 1, 0, 0, 0, 1)),
    ):
        (tmp_path / f"train-{kind}-ubyte.gz").write_bytes(gzip.compress(bytes(head) + bytes(2**26), 1))
    pair = find_idx(str(tmp_path))
    assert pair and "has 65 bytes of numbers where its header says 64" in refusal(lambda: idx_source(pair))


def parquet(image: list[object], **options: Any) -> pyarrow.Table:
    labels = pyarrow.array([0] * len(image))
    table = pyarrow.table({"image": pyarrow.array(image), "label": labels})
    return table.replace_schema_metadata(options.get("metadata"))


def test_parquet_of_other_types_and_bombs(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"

    def refused(table: pyarrow.Table) -> str:
        pyarrow.parquet.write_table(table, file, compression="zstd")
        return refusal(lambda: find_source(str(file), str(tmp_path / "spool"), Patience()).open())

    assert "needed are image" in refused(parquet([{"bytes": "text", "path": "a.jpg"}]))
    assert "needed are image" in refused(parquet([{"bytes": 2**31, "path": "a.jpg"}]))
    twice = parquet([{"bytes": b"x", "path": "a.jpg"}])
    assert "not a readable parquet" in refused(twice.append_column("image", twice["image"]))
    assert "unfolds to more than" in refused(parquet([{"bytes": bytes(2**20), "path": 7}] * 100))
    pyarrow.parquet.write_table(parquet([{"bytes": b"x"}], metadata={b"huggingface": b"[" * 100_000}), file)
    assert len(find_source(str(file), str(tmp_path / "spool"), Patience()).open().labels) == 1


class Endless(http.server.BaseHTTPRequestHandler):
    """Answers a request for a part with more and more."""

    def do_GET(self) -> None:
        self.send_response(206)
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(2**20))
        except OSError:
            self.server.ended.set()  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_that_never_ends(tmp_path: Path) -> None:
    import fsspec

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        server.ended = threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.tar"
        assert "sends no parts" in refusal(lambda: read_range(fsspec.filesystem("http"), url, 0, 1000), DataError)
        assert server.ended.wait(10)  # type: ignore[attr-defined]
        server.shutdown()


def test_tensors_larger_than_their_file(tmp_path: Path) -> None:
    file, half = tmp_path / "a.pt", torch.zeros(1000, dtype=torch.float16)
    for tensors in (
        {"x": torch.zeros(1).expand(10**13)},
        {str(number): half for number in range(1000)},
        {"x": torch.zeros(10**6, device="meta")},
        {"x": torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (10**13,))},
    ):
        torch.save({"ema": [tensors]}, file)
        assert "numbers are not in it" in refusal(lambda: read_torch_file(file))
    inside: dict[str, Any] = {"x": half}
    inside["itself"] = inside
    torch.save(inside, file)
    assert read_torch_file(file)["itself"]["x"].shape == (1000,)


def test_models_of_more_layers_than_weights(tmp_path: Path) -> None:
    weights: Mapping[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (4, 4, 2, 2),
        "pos_embed": (1, 4, 4),
        "final_layer.linear.weight": (16, 4),
        "y_embedder.embedding_table.weight": (3, 4),
        "blocks.0.adaLN_modulation.1.weight": (24, 4),
    }

    def refused(**more: tuple[int, ...]) -> str:
        tensors = {name: torch.zeros(shape) for name, shape in {**weights, **more}.items()}
        safetensors.torch.save_file(tensors, file := tmp_path / "a.safetensors")
        return refusal(lambda: convert_published(file, tmp_path / "made", published="sit", num_heads=1))

    assert "blocks are missing" in refused(**{"blocks.999999999.x": (1,)})
    assert "is not a weight" in refused(pos_embed=(1, 2**40, 0))
    (folder := tmp_path / "vae").mkdir()
    safetensors.torch.save_file({"x": torch.zeros(1)}, folder / "diffusion_pytorch_model.safetensors")
    for settings in (b'{"layers_per_block": 1000000000}', b'{"block_out_channels": [32, 64, 64, 64]}'):
        (folder / "config.json").write_bytes(settings)
        assert "more layers than there are tensors" in refusal(lambda: load_autoencoder("x", folder))
    (folder / "config.json").write_bytes(b"[" * 100_000)
    assert "is no config" in refusal(lambda: load_autoencoder("x", folder))
