"""Foreign shards are indexed and streamed as they are."""

from __future__ import annotations

import gzip
import io
import itertools
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset
from numpy.typing import NDArray

from ig_dist.autoencoders.tokenizers import get_tokenizer
from ig_dist.data.cache import BlockCache
from ig_dist.data.foreign import read_shards
from ig_dist.data.index import TABLE_NAME, KeyInfo, LatentInfo, ShardIndex, read_index
from ig_dist.data.order import SampleOrder
from ig_dist.data.reader import ShardReader
from ig_dist.data.shard_files import find_shards
from ig_dist.data.shards import pack_shard
from ig_dist.data.stream import BatchStream
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import open_url
from tests.fault_proxy import Fault, FaultProxy
from tests.foreign_shards import SIZES, write_foreign
from tests.unit.conftest import Run

PIXEL = ["--tokenizer", "pixel"]
NPY = ["--latent-key", "npy"]


def stream(index: ShardIndex, flip: bool = False) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """Latents, labels and ids of a little more than an epoch."""
    order = SampleOrder(index.shard_sizes, streams=4, global_batch_size=8, window_samples=5, seed=1)
    batches = BatchStream(index, order, workers=2, flip=flip)
    taken = list(itertools.islice(batches, 4))
    batches.close()
    return tuple(np.concatenate([getattr(b, name).numpy() for b in taken]) for name in ("latents", "labels", "ids"))  # type: ignore[return-value]


@pytest.mark.parametrize("cached", [False, True])
def test_what_lies_between_latents_is_not_held_all_at_once(tmp_path: Path, run: Run, cached: bool) -> None:
    picture, latent = bytes(50_000), np.arange(4 * 8 * 8, dtype=np.float16).reshape(4, 8, 8)
    with webdataset.TarWriter(str(tmp_path / "both.tar")) as writer:
        for i in range(200):
            writer.write({"__key__": f"{i:04d}", "cls": i % 7, "jpg": picture, "npy": latent})
    assert run("index_shards", "--shards", tmp_path, *PIXEL, *NPY, "--kind", "sample").code == 0
    index = read_index(str(tmp_path))
    cache = BlockCache(str(tmp_path / "cache"), 2**30, index) if cached else None
    reader = ShardReader(index, cache=cache, request_bytes=2**20)
    tracemalloc.start()
    samples, good = reader.read_ids(3, 200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert good.all() and (samples == latent).all()
    assert samples.nbytes < peak < 2**20 + 4 * samples.nbytes  # one request, of ten, at most, and the samples


def test_the_memory_of_an_index_does_not_grow_with_the_shards(tmp_path: Path) -> None:
    keys, count = KeyInfo(), 1000
    data = pack_shard([f"{i:04d}" for i in range(count)], np.ones((count, 1, 1, 1), np.float16), np.arange(count) % 7)
    latent = LatentInfo(kind="sample", shape=(1, 1, 1), dtype="float16", shift=[0], scale=[1])
    peaks = []
    for shards in (2, 10):
        for number in range(shards):
            (tmp_path / f"{number:02d}.tar").write_bytes(data)
        tracemalloc.start()
        described, _, table = read_shards(find_shards(str(tmp_path)), latent, keys, 1, Patience())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert [shard.samples for shard in described] == [count] * shards
        assert table.label[count : 2 * count].tolist() == [i % 7 for i in range(count)] and len(table) == count * shards
    assert peaks[1] < peaks[0] + 64_000, peaks  # their rows alone are 128 KB more


@pytest.mark.parametrize(("kind", "dtype"), [("sample", "float32"), ("moments", "float16"), ("moments", "float32")])
def test_foreign_shards_are_indexed_and_streamed(tmp_path: Path, run: Run, kind: str, dtype: str) -> None:
    truth = write_foreign(str(tmp_path), kind, dtype)
    options = ["--kind", kind, "--latent-key", "npy", "--flip-key", "flip.npy", "--num-classes", "10"]
    ran = run("index_shards", "--shards", tmp_path, *PIXEL, *options)
    assert ran.code == 0, ran.err
    assert f"24 samples of 10 classes (0 to {np.bincount(truth['labels']).max()} a class" in ran.out
    index = read_index(str(tmp_path))
    assert (index.shard_sizes.tolist(), index.info.latent.kind, index.info.latent.dtype) == (SIZES, kind, dtype)
    assert index.info.foreign and index.info.latent.shape == ((2 if kind == "moments" else 4), 3, 3)
    latents, labels, ids = stream(index)
    assert (latents == truth["latents"][ids]).all() and (labels == truth["labels"][ids]).all()
    assert set(ids.tolist()) == set(range(sum(SIZES)))
    latents, _, ids = stream(index, flip=True)
    mirrored = (latents == truth["flips"][ids]).all((1, 2, 3))
    assert (latents[~mirrored] == truth["latents"][ids[~mirrored]]).all() and 0 < mirrored.mean() < 1
    # the statistics are those of a posterior draw, mirrored latents too
    both = np.concatenate([truth["latents"], truth["flips"]]).astype(np.float64)
    mean, variance = (both[:, :2], both[:, 2:] ** 2) if kind == "moments" else (both, np.zeros(1))
    spread = np.sqrt((mean**2 + variance).mean((0, 2, 3)) - mean.mean((0, 2, 3)) ** 2)
    assert np.allclose(index.info.statistics.mean, mean.mean((0, 2, 3)), rtol=1e-12, atol=1e-15)
    assert np.allclose(index.info.statistics.std, spread, rtol=1e-12)
    assert run("verify_shards", tmp_path).code == 0


def test_an_index_of_our_own_shards_is_the_encoders(digits_index: Path, tmp_path: Path, run: Run) -> None:
    for shard in digits_index.glob("*.tar"):
        shutil.copy(shard, tmp_path)
    assert run("index_shards", "--shards", f"{tmp_path}/shard-{{000000..000007}}.tar", *PIXEL).code == 0
    ours, theirs = read_index(str(tmp_path)), read_index(str(digits_index))
    assert ours.info.table_sha256 == theirs.info.table_sha256
    assert np.allclose(ours.info.statistics.mean, theirs.info.statistics.mean, rtol=1e-12)
    assert np.allclose(ours.info.statistics.std, theirs.info.statistics.std, rtol=1e-12)
    for name in ("shards", "tokenizer", "latent", "classes"):
        assert getattr(ours.info, name) == getattr(theirs.info, name)


def test_normalisation_by_the_statistics_of_the_data(tmp_path: Path, run: Run) -> None:
    truth = write_foreign(str(tmp_path), keys=("latent.npy", "latent_flip.npy", "cls"))
    names = tmp_path / "names.txt"
    names.write_text("".join(f"n0000000{i} thing {i}, that\n" for i in range(7)))
    options = ["--shift", "statistics", "--scale", "statistics", "--class-names", names, "--source", "mine"]
    assert run("index_shards", "--shards", f"{tmp_path}/*.tar", *PIXEL, *options, "--flip-key", "").code == 0
    info = read_index(str(tmp_path)).info
    assert not info.latent.flips and info.source == "mine"
    assert (info.classes[3], (info.class_names or [])[3]) == ("n00000003", "thing 3, that")
    assert np.allclose(info.statistics.mean, 0, atol=1e-12) and np.allclose(info.statistics.std, 1, rtol=1e-12)
    latents = truth["latents"].astype(np.float64)
    assert np.allclose(info.latent.shift, latents.mean((0, 2, 3)))
    assert np.allclose(info.latent.scale, 1 / latents.std((0, 2, 3)))
    # an index that is there stays, unless it is to be replaced; latents of mirrored images are found by their name
    ran = run("index_shards", "--shards", tmp_path, *PIXEL)
    assert ran.code == 2 and "--force" in ran.err and read_index(str(tmp_path)).info == info
    options = ["--shift", "0.5", "--scale", "1,2,3,-4", "--force"]
    assert run("index_shards", "--shards", tmp_path, *PIXEL, *options).code == 0
    info = read_index(str(tmp_path)).info
    assert info.latent.flips and info.latent.shift == [0.5] * 4 and info.latent.scale == [1, 2, 3, -4]
    assert info.statistics.std[3] > 0 and info.classes == [str(i) for i in range(7)]
    assert run("verify_shards", tmp_path).code == 0


def test_the_hash_of_a_tokenizer_is_printed(run: Run) -> None:
    ran = run("index_shards", "--hash", "--tokenizer", "pixel")
    assert (ran.code, ran.out.strip()) == (0, get_tokenizer("pixel").sha256)
    ran = run("index_shards", "--tokenizer", "pixel")
    assert ran.code == 2 and "needs --shards" in ran.err


def test_shards_of_a_tokenizer_that_is_not_here(tmp_path: Path, run: Run, alone: None) -> None:
    write_foreign(str(tmp_path), "moments")
    common = ["--shards", tmp_path, "--tokenizer", "stabilityai/sd-vae-ft-ema", "--latent-key", "npy"]
    more = ["--tokenizer-sha256", "ab" * 32, "--shift", "0", "--scale", "0.18215", "--kind", "moments"]
    options = ["--tokenizer-sha256", "--shift", "--scale", "--kind", "--image-size"]
    for given in range(0, 10, 2):  # what is missing is told at once, and no more
        ran = run("index_shards", *common, *more[:given])
        assert ran.code == 2 and ran.err.count("\n") == 1, ran.err
        assert [option in ran.err for option in options] == [place >= given // 2 for place in range(5)], ran.err
    assert "ig-dist index --hash --tokenizer WEIGHTS" in run("index_shards", *common).err
    assert not (tmp_path / "index.json").exists()
    assert run("index_shards", *common, *more, "--image-size", "24").code == 0
    info = read_index(str(tmp_path)).info
    assert info.latent.scale == [0.18215] * 2
    assert info.tokenizer.model_dump(exclude={"precision"}) == {
        "name": "stabilityai/sd-vae-ft-ema",
        "sha256": "ab" * 32,
        "image_size": 24,
        "image_channels": 3,
    }
    ran = run("verify_shards", tmp_path, "--picture", tmp_path / "samples.png")  # it goes on without
    assert ran.code == 0 and "no picture: no weights of tokenizer" in ran.out, ran.out
    assert not (tmp_path / "samples.png").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--shards", "EMPTY"], 2, ["names no shards", ".tar"]),
        (["--shards", "PARENT"], 2, ["sub-folders", "one folder"]),
        (["--shards", "PARENT/*/*.tar"], 2, ["2 folders", "one folder"]),
        (["--shards", "GOOD/part-{00..04}.tar"], 2, ["part-03.tar", "and 1 more"]),
        (["--shards", "GOOD/part-{00..04.tar"], 2, ["brace expression"]),
        (["--shards", "GOOD"], 2, ["--latent-key latent.npy", "cls, flip.npy, json, npy"]),
        (["--shards", "GOOD", *NPY, "--label-key", "npy"], 2, ["must differ"]),
        (["--shards", "GOOD", *NPY, "--label-key", "json"], 2, ["json holds b'{", "not a class number"]),
        (["--shards", "GOOD", *NPY, "--flip-key", "f.npy"], 2, ["has no .f.npy"]),
        (["--shards", "GOOD", *NPY, "--num-classes", "5"], 2, ["has label 6", "0 to 4", "--num-classes"]),
        (["--shards", "GOOD", *NPY, "--class-names", "GOOD/names", "--num-classes", "9"], 2, ["2 lines", "9"]),
        (["--shards", "GOOD", *NPY, "--class-names", "GOOD/nothing"], 2, ["--class-names", "cannot be read"]),
        (["--shards", "GOOD", *NPY, "--scale", "much"], 2, ["--scale 'much'", "statistics"]),
        (["--shards", "GOOD", *NPY, "--scale", "0"], 2, ["--scale '0'"]),
        (["--shards", "GOOD", *NPY, "--shift", "1,2"], 2, ["--shift has 2 numbers", "4 channels"]),
        (["--shards", "GOOD", *NPY, "--kind", "means"], 2, ["--kind 'means'", "moments"]),
        (["--shards", "GOOD", *NPY, "--kind", "moments"], 2, ["negative std", "log-variances"]),
        (["--shards", "GOOD", *NPY, "--image-size", "64"], 2, ["--image-size 64", "leave it out"]),
        (["--shards", "GOOD", *NPY, "--tokenizer-sha256", "ab"], 2, ["no sha256"]),
        (["--shards", "GOOD", *NPY, "--tokenizer-sha256", "ab" * 32], 2, ["is not that of pixel"]),
        (["--shards", "MIXED"], 2, ["b.latent.npy holds float16 (1, 4, 4), expected float16 (1, 3, 3)"]),
        (["--shards", "DOUBLE"], 2, ["float64", "float16"]),
        (["--shards", "FLAT"], 2, ["(9,)", "(C, H, W)"]),
        (["--shards", "NEGATIVE"], 2, ["has label -1", "0 to 1"]),
        (["--shards", "HUGE"], 2, ["300000", "--num-classes"]),
        (["--shards", "NAN"], 4, ["sample b", "NaN"]),
        (["--shards", "CUT"], 4, ["00.tar: is cut off at byte 700", "copy it again"]),
        (["--shards", "ZIPPED"], 4, ["compressed", "gunzip"]),
        (["--shards", "TEXT"], 4, ["is no tar"]),
        (["--shards", "JOINED"], 4, ["goes on at byte", "after its end"]),
        (["--shards", "s4://bucket/x"], 2, ["--shards 's4://bucket/x'"]),
    ],
)
def test_what_cannot_be_indexed_is_refused(
    foreign_folders: Path, run: Run, arguments: list[str], code: int, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(foreign_folders)
    ran = run("index_shards", *PIXEL, *arguments)
    assert ran.code == code and ran.err.count("\n") == 1, ran
    for word in words:
        assert word in ran.err, ran.err
    assert not list(foreign_folders.rglob("index*"))


@pytest.fixture(scope="module")
def foreign_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of shards that the cases name."""
    root = tmp_path_factory.mktemp("foreign")
    write_foreign(str(root / "GOOD"))
    (root / "GOOD/names").write_text("one\ntwo\n")
    good = np.ones((1, 3, 3), np.float16)
    nan = good.copy()
    nan[0, 1, 1] = np.nan
    folders: dict[str, list[tuple[NDArray[Any], int]]] = {
        "MIXED": [(good, 0), (np.ones((1, 4, 4), np.float16), 1)],
        "DOUBLE": [(good.astype(np.float64), 0)],
        "FLAT": [(good.ravel(), 0)],
        "NEGATIVE": [(good, 1), (good, -1)],
        "HUGE": [(good, 300000)],
        "NAN": [(good, 0), (nan, 0)],
        "PARENT/one": [(good, 0)],
        "PARENT/two": [(good, 0)],
    }
    for name, samples in folders.items():
        packed = io.BytesIO()
        with webdataset.TarWriter(packed) as writer:
            for key, (latent, label) in zip("abc", samples, strict=False):
                writer.write({"__key__": key, "latent.npy": latent, "cls": label})
        (root / name).mkdir(parents=True)
        (root / name / "00.tar").write_bytes(packed.getvalue())
    one = (root / "PARENT/one/00.tar").read_bytes()
    for name, data in (
        ("CUT", one[:700]),
        ("ZIPPED", gzip.compress(one)),
        ("TEXT", b"no tar at all" * 100),
        ("JOINED", one + one),
    ):
        (root / name).mkdir()
        (root / name / "00.tar").write_bytes(data)
    (root / "EMPTY").mkdir()
    return root


def test_in_memory_storage(run: Run) -> None:
    truth = write_foreign("memory://bucket/shards")
    assert run("index_shards", "--shards", "memory://bucket/shards/*.tar", *PIXEL, *NPY).code == 0
    latents, labels, ids = stream(read_index("memory://bucket/shards"))
    assert (latents == truth["latents"][ids]).all() and (labels == truth["labels"][ids]).all()
    assert run("verify_shards", "memory://bucket/shards").code == 0
    fsspec.filesystem("memory").rm("/bucket/shards/part-02.tar")
    ran = run("verify_shards", "memory://bucket/shards")
    assert ran.code == 4 and "part-02.tar: is missing" in ran.out


def test_object_storage_with_faults(bucket: str, fault_proxy: FaultProxy, run: Run) -> None:
    url = f"s3://{bucket}/shards"
    truth = write_foreign(url)
    fault_proxy.add(Fault("status503", next=2, path=r"\.tar"), Fault("cut", next=1, path=r"\.tar", after_bytes=3000))
    ran = run("index_shards", "--shards", f"{url}/part-{{00..02}}.tar", *PIXEL, *NPY)
    assert ran.code == 0 and len(fault_proxy.log) == 3, ran
    latents, _, ids = stream(read_index(url))
    assert (latents == truth["latents"][ids]).all()
    fs, _ = open_url(url, "test")
    for name in (TABLE_NAME, "another"):  # a writer was killed
        fs.call_s3("create_multipart_upload", Bucket=bucket, Key=f"shards/{name}")
    assert run("index_shards", "--shards", url, *PIXEL, *NPY, "--force").code == 0
    assert [upload["Key"] for upload in fs.list_multipart_uploads(bucket)] == ["shards/another"]
    fault_proxy.add(Fault("flip", next=1, path=r"part-02\.tar", after_bytes=5000))  # on the way: no damage
    ran = run("verify_shards", url)
    assert ran.code == 0 and "0 of them damaged" in ran.out, ran


def test_folders_that_look_like_globs(tmp_path: Path) -> None:
    folder = tmp_path / "set [1]"
    write_foreign(str(folder))
    assert list(find_shards(str(folder)).sizes) == ["part-00.tar", "part-01.tar", "part-02.tar"]
