"""The npz: what it holds, how it is read back by others and by ranges, and what is said of what is none."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ig_dist.errors import ConfigError, DataError
from ig_dist.features import npz as npz_reading
from ig_dist.features.npz import Streamed, open_npz, write_npz
from ig_dist.storage import writes
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import open_url
from tests.fault_proxy import Fault, FaultProxy
from tests.unit.test_reader import file_size_limit

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, size=(37, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(37) % 10
ARRAYS = {"arr_0": IMAGES, "arr_1": LABELS, "mu": RANDOM.normal(size=5), "sigma": RANDOM.normal(size=(5, 5))}


def streamed(arrays: Mapping[str, Array] = ARRAYS, pieces: int = 5) -> dict[str, Streamed]:
    return {
        name: Streamed(array.shape, array.dtype.str, lambda array=array: np.array_split(array, pieces))
        for name, array in arrays.items()
    }


def write(url: str | Path, arrays: Mapping[str, Streamed] | None = None, **options: Any) -> None:
    write_npz(*open_url(str(url), "test"), streamed() if arrays is None else arrays, **options)


def the_way_of_adm(path: Path, name: str, batch_size: int) -> Iterator[Array]:
    """As guided-diffusion's evaluator streams an array: only what its zip and npy readers are asked for there."""
    with path.open("rb") as file, zipfile.ZipFile(file, "r") as archive:
        assert f"{name}.npy" in archive.namelist()
        with archive.open(f"{name}.npy", "r") as member:
            assert np.lib.format.read_magic(member) == (1, 0)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            assert not fortran and not dtype.hasobject
            for start in range(0, shape[0], batch_size):
                rows = min(batch_size, shape[0] - start)
                size, data = int(rows * np.prod(shape[1:]) * dtype.itemsize), b""
                while len(data) < size:
                    more = member.read(size - len(data))
                    assert more, "it ends too early"
                    data += more
                yield np.frombuffer(data, dtype).reshape(rows, *shape[1:])


# --- written


def test_everybody_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "samples.npz"
    write(path)
    with np.load(path) as loaded:
        assert sorted(loaded) == sorted(ARRAYS)
        for name, array in ARRAYS.items():
            assert loaded[name].dtype == array.dtype and np.array_equal(loaded[name], array)
    assert np.array_equal(np.concatenate(list(the_way_of_adm(path, "arr_0", 10))), IMAGES)
    assert np.array_equal(np.concatenate(list(the_way_of_adm(path, "arr_1", 10))), LABELS)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert [info.filename for info in archive.infolist()] == [f"{name}.npy" for name in ARRAYS]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    assert [file.name for file in path.parent.iterdir()] == ["samples.npz"]


def test_the_same_arrays_are_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = set()
    for number, pieces in enumerate((1, 5, 37, 50)):
        monkeypatch.setattr("time.time", lambda number=number: 1e9 * (number + 1))
        write(tmp_path / f"{number}.npz", streamed(pieces=pieces))
        contents.add((tmp_path / f"{number}.npz").read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("limit", [1, 100, 140, 7400, 7500, 8200, 9000])
def test_sizes_around_the_limit_of_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """The limit is made small; each of sizes, offsets, and the directory's place passes it for some."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    path = tmp_path / "samples.npz"
    write(path)
    monkeypatch.undo()
    with np.load(path) as loaded:
        assert all(np.array_equal(loaded[name], array) for name, array in ARRAYS.items())
    npz = open_npz(str(path))
    assert np.array_equal(npz.rows("arr_0", 30, 37), IMAGES[30:]) and np.array_equal(npz.array("arr_1"), LABELS)


def test_a_file_above_4_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse one: zeros are skipped, not written, and so is their CRC."""
    monkeypatch.setattr(zipfile, "crc32", lambda data, crc=0: 0)
    rows, block = 44, np.zeros((1, 5793, 5793, 3), np.uint8)  # of 100 MB
    labels, last = np.arange(rows), np.full_like(block, 7)
    shapes = {"arr_0": (rows, *block.shape[1:]), "arr_1": (rows,)}
    chunks: dict[str, Callable[[], list[Array]]] = {
        "arr_0": lambda: [block] * (rows - 1) + [last],
        "arr_1": lambda: [labels],
    }
    arrays = {name: Streamed(shape, "u1" if name == "arr_0" else "<i8", chunks[name]) for name, shape in shapes.items()}
    path = tmp_path / "samples.npz"
    with path.open("wb") as file:
        for piece in npz_reading._zipped(arrays):
            if len(piece) == block.nbytes and not piece[0]:
                file.seek(len(piece), io.SEEK_CUR)
            else:
                file.write(piece)
    assert path.stat().st_size > 2**32
    npz = open_npz(str(path))
    assert npz.members["arr_0"].shape == shapes["arr_0"] and npz.members["arr_1"].start > 2**32
    assert npz.rows("arr_0", rows - 2, rows)[:, 0, 0, 0].tolist() == [0, 7]
    assert np.array_equal(npz.rows("arr_1", 0, rows), labels)
    with np.load(path, mmap_mode="r") as loaded:
        assert sorted(loaded) == ["arr_0", "arr_1"]


def peak_memory(work: Callable[[], Any]) -> int:
    import tracemalloc

    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_that_of_a_chunk(tmp_path: Path) -> None:
    path, shape = str(tmp_path / "samples.npz"), (1600, 256, 256, 3)  # 315 MB

    def chunks() -> Iterator[Array]:
        for number in range(100):
            yield np.full((16, 256, 256, 3), number, np.uint8)

    chunk = 16 * 256 * 256 * 3
    assert peak_memory(lambda: write(path, {"arr_0": Streamed(shape, "uint8", chunks)})) < 4 * chunk
    npz = open_npz(path)

    def read() -> None:
        for number in range(100):
            assert npz.rows("arr_0", 16 * number, 16 * number + 16)[3, 4, 5, 1] == number

    assert peak_memory(read) < 2 * chunk

    compressed = str(tmp_path / "compressed.npz")
    with (
        zipfile.ZipFile(path) as stored,
        stored.open("arr_0.npy") as source,
        zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("arr_0.npy", "w") as target,
    ):
        shutil.copyfileobj(source, target, 2**20)
    npz = open_npz(compressed)
    assert not npz.members["arr_0"].stored and peak_memory(read) < 4 * chunk


def test_what_a_killed_process_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in ("samples.npz.1.tmp", "samples.npz.2.tmp", "others.npz.1.tmp"))
    for file in (old, new, other):
        file.write_bytes(b"a part")
    for file in (old, other):
        os.utime(file, (0, 0))
    write_npz(*open_url(str(tmp_path / "samples.npz"), "test"), streamed())
    assert not old.exists() and new.exists() and other.exists()


def test_what_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "samples.npz"
    write(path)
    before = path.read_bytes()

    def breaks() -> Iterator[Array]:
        yield IMAGES[:20]
        raise DataError("a unit is damaged")

    for chunks, error, says in (
        (breaks, DataError, "a unit is damaged"),
        (lambda: [IMAGES[:20]], ValueError, r"-3264 bytes against its shape"),
        (lambda: [IMAGES, IMAGES], ValueError, r"\+7104 bytes"),
        (lambda: [IMAGES.astype(np.int16)], ValueError, "int16"),
    ):
        with pytest.raises(error, match=says):
            write(path, {"arr_0": Streamed(IMAGES.shape, "uint8", chunks)})
    with (
        file_size_limit(5000),
        pytest.raises(DataError, match=r"samples.npz takes 0.00 GB, and its disk or quota is full"),
    ):
        write(path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100})())
    with pytest.raises(DataError, match="its disk has 0.00 GB free: make room"):
        write(path, {"arr_0": Streamed(IMAGES.shape, "uint8", breaks)})  # before it breaks
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npz"]


def test_a_store_without_parts_gets_it_whole_or_not_at_all() -> None:
    url = "memory://whole/x.npz"
    fs, path = open_url(url, "test")

    def breaks() -> Iterator[Array]:
        yield IMAGES[:20]
        raise DataError("a unit is damaged")

    with pytest.raises(DataError, match="a unit is damaged"):
        write(url, {"arr_0": Streamed(IMAGES.shape, "uint8", breaks)})
    assert not fs.find("/whole")
    write(url)
    assert [Path(name).name for name in fs.find("/whole")] == ["x.npz"] and path.endswith("/whole/x.npz")


# --- read


@pytest.fixture(params=["a disk", "a store"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "x.npz") if request.param == "a disk" else f"memory://{tmp_path.name}/x.npz"


def test_slices_and_batches(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(url)
    npz = open_npz(url)
    assert {name: m.shape for name, m in npz.members.items()} == {name: a.shape for name, a in ARRAYS.items()}
    for name, array in ARRAYS.items():
        assert npz.members[name].stored and npz.members[name].nbytes == array.nbytes
        assert np.array_equal(npz.array(name), array)
    read: list[int] = []
    real = npz_reading.read_range
    monkeypatch.setattr(
        npz_reading, "read_range", lambda *a, **options: (read.append(a[3] - a[2]), real(*a, **options))[1]
    )
    for start, stop in ((0, 37), (5, 9), (36, 37), (36, 50), (7, 7), (9, 5)):
        assert np.array_equal(npz.rows("arr_0", start, stop), IMAGES[start:stop])
    assert read == [size * 8 * 8 * 3 for size in (37, 4, 1, 1, 0, 0)]
    with pytest.raises(ConfigError, match="has no mu_s, it has arr_0, arr_1, mu, sigma"):
        npz.array("mu_s")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_of_any_origin(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "other.npz"
    save(path, IMAGES, mu=np.float32([1, 2]), sigma=np.asfortranarray(ARRAYS["sigma"]), number=np.array(3.5))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("README", "more")
    npz = open_npz(str(path))
    for start in (*range(0, 37, 10), 5, 30):  # forwards, and back
        assert np.array_equal(npz.rows("arr_0", start, start + 10), IMAGES[start : start + 10])
    assert (
        np.array_equal(npz.array("arr_0"), IMAGES)
        and np.array_equal(npz.array("sigma"), ARRAYS["sigma"])
        and npz.array("mu").tolist() == [1, 2]
    )
    assert npz.array("number") == 3.5 and set(npz.members) == {"arr_0", "mu", "sigma", "number"}
    with pytest.raises(ConfigError, match="Fortran order"):
        npz.rows("sigma", 0, 2)


def test_a_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    write(path)
    first = open_npz(str(path)).fingerprint
    np.savez_compressed(path, **ARRAYS)
    assert open_npz(str(path)).fingerprint == first
    changed = IMAGES.copy()
    changed[5, 0, 0, 0] ^= 1
    write(path, streamed({**ARRAYS, "arr_0": changed}))
    assert open_npz(str(path)).fingerprint != first


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_is_found_by_the_crc(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "x.npz"
    save(path, IMAGES, LABELS)
    data = bytearray(path.read_bytes())
    data[3000] ^= 4
    path.write_bytes(data)
    npz = open_npz(str(path))
    with pytest.raises(DataError, match="arr_0 of .*x.npz is damaged .*: restore the file"):
        npz.array("arr_0")
    if save is np.savez_compressed:
        with pytest.raises(DataError, match="arr_0 of .*x.npz is damaged .*: restore the file"):
            for start in range(0, 37, 10):
                npz.rows("arr_0", start, start + 10)
    assert np.array_equal(npz.array("arr_1"), LABELS)


def test_a_file_that_is_cut_or_gone_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    write(path)
    npz = open_npz(str(path))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="too short"):
        npz.rows("arr_0", 30, 37)
    path.unlink()
    for read in (lambda: npz.rows("arr_0", 0, 1), lambda: npz.array("arr_1")):
        with pytest.raises(DataError, match="is gone: restore it"):
            read()


def raw(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members:
            archive.writestr(name, data)
    return file.getvalue()


def saved(array: Array, name: str = "arr_0") -> bytes:
    file = io.BytesIO()
    np.savez(file, **{name: array})
    return file.getvalue()


def npy(array: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


REFUSED = {
    "text": (b"no zip at all", "is no npz"),
    "empty": (b"", "is no npz"),
    "half a file": (saved(IMAGES)[:5000], "is no npz"),
    "an npy": (npy(IMAGES), "is no npz"),
    "an empty zip": (raw(), "has no arr_0, it has nothing"),
    "no pictures": (saved(LABELS, "mu"), "has no arr_0, it has mu"),
    "floats": (saved(IMAGES / 255), "arr_0 of .* is float64, pictures are uint8"),
    "channels first": (saved(IMAGES.transpose(0, 3, 1, 2).copy()), r"has the shape \(37, 3, 8, 8\), pictures are"),
    "no channels": (saved(IMAGES[..., 0]), r"has the shape \(37, 8, 8\), pictures are \(N, H, W, 3\)"),
    "four channels": (saved(np.zeros((2, 8, 8, 4), np.uint8)), r"\(2, 8, 8, 4\)"),
    "Fortran order": (saved(np.asfortranarray(IMAGES)), "Fortran order: save numpy.ascontiguousarray"),
    "objects": (saved(np.array([{}, 2], dtype=object)), "holds Python objects, which are never read"),
    "no array": (raw(("arr_0.npy", b"plain text")), r"arr_0.npy of .* is no array that can be read"),
    "an evil header": (
        raw(("arr_0.npy", b"\x93NUMPY\x01\x00\x16\x00__import__('os')      ")),
        "is no array that can be read",
    ),
    "another version": (raw(("arr_0.npy", npy(IMAGES).replace(b"NUMPY\x01", b"NUMPY\x03"))), "npy version"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_file_of_pictures_gets_one_line(tmp_path: Path, kind: str) -> None:
    content, says = REFUSED[kind]
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as caught:
        open_npz(str(path), "evaluate.reference")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_what_else_is_refused(tmp_path: Path) -> None:
    for place, says in ((tmp_path / "none.npz", "there is no such file"), (tmp_path, "is no file: give an npz")):
        with pytest.raises(ConfigError, match=f"evaluate.reference .*{says}"):
            open_npz(str(place), "evaluate.reference")
    path = tmp_path / "x.npz"
    path.write_bytes(raw(("arr_0.npy", npy(IMAGES)[:-5])))
    with pytest.raises(DataError, match=r"has 7099 bytes of data, and the shape \(37, 8, 8, 3\): restore"):
        open_npz(str(path))
    path.write_bytes(saved(LABELS, "mu"))
    assert open_npz(str(path), images=False).array("mu").tolist() == LABELS.tolist()  # a reference of moments only


# --- on an object store


@pytest.mark.parametrize("part", ["one request", "parts"])
def test_an_object_store_takes_and_gives_it(bucket: str, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    if part == "parts":
        monkeypatch.setattr(writes, "PART_BYTES", 5 * 2**20)  # the least that S3 takes
    images = RANDOM.integers(0, 256, size=(600, 128, 128, 1), dtype=np.uint8)  # 9.8 MB
    url = f"s3://{bucket}/folder/samples.npz"
    arrays = streamed({"arr_0": images, "arr_1": np.arange(600)}, pieces=7)
    fs, path = open_url(url, "test")
    write_npz(fs, path, arrays)
    npz = open_npz(url)
    assert np.array_equal(npz.rows("arr_0", 100, 200), images[100:200])
    assert np.array_equal(npz.array("arr_0"), images)
    assert npz.array("arr_1").tolist() == list(range(600))
    with fs.open(path, "rb") as file, np.load(io.BytesIO(file.read())) as loaded:
        assert np.array_equal(loaded["arr_0"], images)


@pytest.mark.parametrize("kind", ["status503", "cut", "lost", "flip"])
def test_parts_are_sent_again(bucket: str, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(writes, "PART_BYTES", 5 * 2**20)
    fault_proxy.add(Fault(kind, share=0.4, method="PUT", after_bytes=1000))
    images = RANDOM.integers(0, 256, size=(1800, 128, 128, 1), dtype=np.uint8)
    patience = Patience(stall_s=2, deadline_s=30)
    fs, path = open_url(f"s3://{bucket}/samples.npz", "test", patience)
    write_npz(fs, path, streamed({"arr_0": images}, pieces=20), patience)
    assert np.array_equal(open_npz(f"s3://{bucket}/samples.npz").array("arr_0"), images)


def test_an_upload_that_fails_is_taken_back(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writes, "PART_BYTES", 5 * 2**20)
    fs, path = open_url(f"s3://{bucket}/samples.npz", "test")

    def breaks() -> Iterator[Array]:
        yield np.zeros((900, 128, 128, 1), np.uint8)
        raise DataError("a unit is damaged")

    with pytest.raises(DataError, match="a unit is damaged"):
        write_npz(fs, path, {"arr_0": Streamed((1800, 128, 128, 1), "uint8", breaks)})
    assert not fs.exists(path)
    assert not fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads")
