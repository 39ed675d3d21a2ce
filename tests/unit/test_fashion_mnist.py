"""IDX files: Fashion-MNIST by name, any other by its folder; what is wrong with them is one line."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ig_dist.autoencoders.tokenizers import get_tokenizer
from ig_dist.config.file import load_config
from ig_dist.data.index import read_index
from ig_dist.data.sources import Native, find_source, idx, native_format, refuse_missing
from ig_dist.encoding.run import choose_image_size, refuse_dest_in_source
from ig_dist.errors import ConfigError
from ig_dist.models.dit import DiT
from tests.conftest import ROOT, run_command, succeed

IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"


def pictures(count: int = 40, side: int = 12) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, side, side), np.uint8)


def idx_bytes(numbers: NDArray[np.uint8]) -> bytes:
    return bytes((0, 0, 8, numbers.ndim)) + struct.pack(f">{numbers.ndim}I", *numbers.shape) + numbers.tobytes()


def write_pair(
    folder: Path,
    *,
    part: str = "train",
    packed: bool = False,
    images: NDArray[np.uint8] | None = None,
    labels: NDArray[np.int64] | None = None,
    classes: int = 10,
) -> Path:
    images = pictures() if images is None else images
    labels = np.arange(len(images)) % classes if labels is None else labels
    folder.mkdir(parents=True, exist_ok=True)
    for kind, numbers in ((IMAGES, images), (LABELS, labels.astype(np.uint8))):
        data = idx_bytes(numbers)
        name = f"{part}-{kind}{'.gz' if packed else ''}"
        (folder / name).write_bytes(gzip.compress(data) if packed else data)
    return folder


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No place holds Fashion-MNIST; the folder to which $IG_DIST_DATASETS points."""
    monkeypatch.setenv("IG_DIST_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(idx, "DEBIAN", tmp_path / "debian")
    return tmp_path / "datasets"


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_of_idx_files(packed: bool, tmp_path: Path) -> None:
    folder = write_pair(tmp_path / "mine", packed=packed, classes=4)
    found = find_source(str(folder))
    source = found.open()
    assert "40 grey images of 12 x 12 in 4 classes" in found.kind and found.name == source.name
    assert native_format(str(folder)) == Native(12, 1) and native_format(f"file://{folder}") == Native(12, 1)
    assert source.classes == ["0", "1", "2", "3"] and source.class_names is None
    assert source.labels.tolist() == [i % 4 for i in range(40)] and source.labels.dtype == np.int64
    assert np.array_equal(np.stack([source.item(i) for i in range(40)])[..., 0], pictures())  # type: ignore[arg-type]


def test_the_name_follows_what_is_inside(tmp_path: Path) -> None:
    def name(**changes: object) -> str:
        return find_source(str(write_pair(tmp_path / f"{len(names)}/mine", **changes))).name  # type: ignore[arg-type]

    names: list[str] = []
    other = pictures()
    other[39, 11, 11] ^= 1
    for changes in ({}, {"packed": True}, {"images": other}, {"classes": 5}, {"images": pictures(10, 24)}):
        names.append(name(**changes))
    assert names[0] == names[1] and len(set(names)) == 4 and ", 2 files, sha256 " in names[0]


def test_packed_or_not_is_told_by_content(tmp_path: Path) -> None:
    plain = find_source(str(write_pair(tmp_path / "a/mine"))).name
    folder = write_pair(tmp_path / "b/mine", packed=True)
    for file in list(folder.iterdir()):
        file.rename(file.with_suffix(""))
    assert find_source(str(folder)).name == plain


@pytest.mark.parametrize("place", ["datasets", "home/.cache/ig_dist/datasets", "debian"])
def test_the_places_of_a_name(place: str, nowhere: Path) -> None:
    folder = nowhere.parent / place / "fashion-mnist"
    write_pair(folder, packed=True)
    write_pair(folder, part="t10k", images=pictures(20))
    train, test = (find_source(name).open() for name in ("fashion-mnist", "fashion-mnist-test"))
    assert (len(train.labels), len(test.labels)) == (40, 20)
    assert train.name.startswith("fashion-mnist, ") and test.name.startswith("fashion-mnist-test, ")
    assert train.class_names == test.class_names == list(idx.FASHION_CLASSES) and len(train.classes) == 10


def test_the_first_place_counts(nowhere: Path) -> None:
    write_pair(nowhere.parent / "debian/fashion-mnist")
    write_pair(nowhere / "fashion-mnist", images=pictures(30))
    assert len(find_source("fashion-mnist").open().labels) == 30


@pytest.mark.parametrize("name", idx.NAMED)
def test_a_name_whose_files_are_nowhere(name: str, nowhere: Path) -> None:
    refuse_missing(name)  # a name is no path
    for look in (find_source, native_format):
        with pytest.raises(ConfigError) as error:
            look(name)
        files = [f"{part}-{kind}.gz" for part in ("train", "t10k") for kind in (IMAGES, LABELS)]
        words = [*files, str(nowhere), ".cache/ig_dist/datasets", "debian", "apt-get install dataset-fashion-mnist"]
        assert all(word in str(error.value) for word in [*words, "IG_DIST_DATASETS", f"--source {name}"])
        assert "\n" not in str(error.value)


def damage(kind: str, change: Callable[[bytes], bytes], *, packed: bool = False) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        write_pair(folder, packed=packed)
        file = folder / f"train-{kind}{'.gz' if packed else ''}"
        file.write_bytes(change(file.read_bytes()))

    return apply


def relabel(labels: list[int]) -> Callable[[bytes], bytes]:
    return lambda data: idx_bytes(np.array(labels, np.uint8))


BAD: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "cut off": (damage(IMAGES, lambda data: data[:-100]), ["5660 bytes of numbers", "says 5760", "fetch it again"]),
    "too long": (damage(LABELS, lambda data: data + b"1"), ["41 bytes of numbers", "says 40"]),
    "cut off in the header": (damage(IMAGES, lambda data: data[:9]), ["is no IDX file of images", "'00 00 08 03'"]),
    "empty": (damage(IMAGES, lambda data: b""), ["is no IDX file of images"]),
    "gzip cut off": (damage(IMAGES, lambda data: data[:-100], packed=True), ["is damaged", "fetch it again"]),
    "gzip of other bytes": (
        damage(IMAGES, lambda data: data[:3000] + bytes(50) + data[3050:], packed=True),
        ["is damaged", "fetch it again"],
    ),
    "a web page": (damage(LABELS, lambda data: b"<html>not found"), ["is no IDX file of labels", "'3c 68 74 6d'"]),
    "numbers of another type": (
        damage(IMAGES, lambda data: b"\0\0\x0d" + data[3:]),
        ["no IDX file of images", "of bytes"],
    ),
    "labels for images": (damage(IMAGES, relabel([0, 1])), ["is no IDX file of images (3 dimensions)"]),
    "no images": (lambda folder: write_pair(folder, images=pictures(0)), ["is empty", "0 x 12 x 12"]),
    "another count": (damage(LABELS, relabel([0, 1, 2])), ["has 40 images", "3 labels", "fetch both"]),
    "a class without images": (damage(LABELS, relabel([0, 2] * 20)), ["1 of the 3 classes", "(the first: 1)"]),
    "not square": (
        lambda folder: write_pair(folder, images=np.zeros((10, 4, 6), np.uint8)),
        ["images of 4 x 6", "only square"],
    ),
    "no labels": (lambda folder: (write_pair(folder) / f"train-{LABELS}").unlink(), [f"no train-{LABELS} (or .gz)"]),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_files_are_one_line(case: str, tmp_path: Path) -> None:
    make, words = BAD[case]
    make(tmp_path / "mine")
    with pytest.raises(ConfigError) as error:
        find_source(str(tmp_path / "mine"))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in ["--source", "mine", *words])


def test_labels_beyond_the_named_classes(nowhere: Path) -> None:
    write_pair(nowhere / "fashion-mnist", classes=11)
    with pytest.raises(ConfigError, match="has label 10, not 0 to 9"):
        find_source("fashion-mnist")


def test_the_options_that_pixels_take(tmp_path: Path) -> None:
    pixel, native = get_tokenizer("pixel"), Native(12, 1)
    assert choose_image_size("mine", native, None, pixel) == 12
    with pytest.raises(ConfigError, match="--image-size is for pictures, mine has 12 x 12 pixels: leave it out"):
        choose_image_size("mine", native, 16, pixel)
    with pytest.raises(ConfigError, match="takes colour images, mine is grey: use pixel"):
        choose_image_size("mine", native, None, replace(pixel, image_channels=3))
    with pytest.raises(ConfigError, match="needs multiples of 8, mine has 12"):
        choose_image_size("mine", native, None, replace(pixel, downsample=8))
    refuse_dest_in_source("fashion-mnist", "fashion-mnist/data")  # a name is no folder
    with pytest.raises(ConfigError, match="lies in --source"):
        refuse_dest_in_source(str(tmp_path), str(tmp_path / "data"))


def test_a_small_folder_is_encoded(tmp_path: Path) -> None:
    folder, dest = write_pair(tmp_path / "mine", packed=True, classes=4), tmp_path / "data"
    command = ["python", "data_prep/encode_latents.py", "--source", folder, "--dest", dest]
    succeed(command)
    index = read_index(str(dest))
    assert index.info.latent.shape == (1, 12, 12) and index.num_samples == 40
    assert (index.info.tokenizer.image_size, index.info.tokenizer.image_channels) == (12, 1)
    assert index.info.source == find_source(str(folder)).name
    # the same files in another place are the same data set, others are not
    moved = shutil.copytree(folder, tmp_path / "moved")
    again = run_command([*command[:3], moved, "--dest", dest])
    assert again.returncode == 0 and "nothing to do" in again.stdout
    write_pair(moved, packed=True, classes=5)
    other = run_command([*command[:3], moved, "--dest", dest])
    assert other.returncode == 2 and "other settings or images" in other.stderr


def test_the_config_is_a_model_of_ten_million_weights() -> None:
    config = load_config(ROOT / "configs/fashion_mnist_ig.yaml", [])
    model = DiT(config.with_data((1, 28, 28), 10).model.to_dit())
    assert 9e6 < sum(weights.numel() for weights in model.parameters()) < 11e6


@pytest.mark.skipif(  # in CI it must be there
    not ((idx.DEBIAN / "fashion-mnist").is_dir() or os.environ.get("CI")),
    reason="apt-get install dataset-fashion-mnist",
)
def test_the_real_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("IG_DIST_DATASETS", raising=False)
    for name, count, hashed in (
        ("fashion-mnist", 60_000, "6ba2795ebd19"),
        ("fashion-mnist-test", 10_000, "eb7d6a637e06"),
    ):
        source = find_source(name).open()
        assert np.bincount(source.labels).tolist() == [count // 10] * 10
        assert native_format(name) == Native(28, 1) and f"sha256 {hashed}" in source.name
    first = find_source("fashion-mnist").open()
    assert first.class_names is not None and first.class_names[first.labels[0]] == "Ankle boot"
    assert first.class_names[first.labels[1]] == "T-shirt/top"
