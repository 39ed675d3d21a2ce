"""Feature files: whose they are, what is stale or damaged, who makes them; and the sets of images that they are of."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import tarfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import webdataset
from PIL import Image
from sklearn.datasets import load_digits

from ig_dist.data.images import center_crop
from ig_dist.errors import ConfigError, DataError
from ig_dist.evaluation.references import Reference
from ig_dist.evaluation.scores import Scores
from ig_dist.features.extractors.extractor import Extractor, get_extractor
from ig_dist.features.features import FeatureFiles, feature_name, make_features
from ig_dist.features.images import UNIT_SIZE, ImageSet, find_images
from tests.scoring import (
    EFFICIENTNET,
    all_pictures,
    extract,
    in_memory,
    noise,
    pixel,
    quadrants,
    require_efficientnet,
)

LABELS = [i % 3 for i in range(40)]


def images_in(folder: Path, seed: int = 0) -> ImageSet:
    return in_memory(noise(40, seed=seed), folder, labels=LABELS)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def made(images: ImageSet, *extractors: Extractor) -> FeatureFiles:
    files = FeatureFiles(images, extractors or [pixel()])
    make_features(files)
    return files


# --- whose they are


def test_a_file_holds_features_and_labels_and_says_whose(tmp_path: Path) -> None:
    images = images_in(tmp_path)
    files = made(images, pixel(), quadrants())
    assert sorted(content(tmp_path)) == sorted(
        feature_name(number, name) for number in range(3) for name in ("pixel", "inception")
    )
    file = tmp_path / "unit_00002.inception.safetensors"
    tensors = safetensors.numpy.load_file(file)  # by the stock library
    assert {name: (values.shape, values.dtype.name) for name, values in tensors.items()} == {
        "pool": ((8, 4), "float32"),
        "spatial": ((8, 4), "float32"),
        "logits": ((8, 8), "float32"),
        "labels": ((8,), "int64"),
    }
    last = noise(40)[32:]
    assert np.array_equal(tensors["pool"], extract(quadrants(), last)["pool"])
    assert tensors["labels"].tolist() == LABELS[32:]
    with safetensors.safe_open(file, "numpy") as opened:
        told = json.loads(opened.metadata()["features"])
    assert told["format"] == "ig-dist-features/1" and told["unit"] == [2, 16] and told["images"] == images.identity
    assert (told["extractor"], told["extractor_sha256"]) == ("inception", "0" * 64)
    assert told["images_sha256"] == hashlib.sha256(last.tobytes()).hexdigest()
    assert {name: entry[2] for name, entry in told["tensors"].items()} == {
        name: hashlib.sha256(values.tobytes()).hexdigest() for name, values in tensors.items()
    }

    pool, pixels = np.concatenate(list(files.rows("pixel", "pool", 40))), noise(40).reshape(40, -1)
    np.testing.assert_allclose(pool, pixels / 127.5 - 1, atol=1e-7)
    assert [len(rows) for rows in files.rows("pixel", "pool", 20)] == [16, 4]
    assert files.read(1, "pixel", "work") is None and files.has("pixel", "labels") and not files.has("pixel", "work")
    assert len(files.images_sha256(40)) == 64 and files.images_sha256(40) != files.images_sha256(16)
    assert files.images_sha256(40) == FeatureFiles(images, [quadrants()]).images_sha256(40)  # of images, not features


def test_its_bytes_are_a_function_of_images_and_extractor(tmp_path: Path) -> None:
    made(images_in(tmp_path / "a"), pixel(), quadrants())
    made(images_in(tmp_path / "b"), quadrants(), pixel())
    assert content(tmp_path / "a") == content(tmp_path / "b")
    made(images_in(tmp_path / "c", seed=1), pixel())
    for name, whole in content(tmp_path / "c").items():
        assert whole != content(tmp_path / "a")[name]


def test_real_features_are_the_same_bytes_from_whichever_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_efficientnet()
    extractor, images = get_extractor(EFFICIENTNET), noise(6, side=9, channels=3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for worker in range(2):
        monkeypatch.setenv("RANK", str(worker))
        files = FeatureFiles(in_memory(images, tmp_path / str(worker), unit_size=3), [extractor])
        make_features(files)
    assert content(tmp_path / "0") == content(tmp_path / "1")
    assert [values.shape for values in files.rows(EFFICIENTNET, "pool", 6)] == [(3, 1280)] * 2


# --- stale and damaged


STALE: dict[str, Callable[[Path], Any]] = {
    "of other images": lambda folder: made(images_in(folder, seed=1)),
    "of other weights": lambda folder: made(images_in(folder), replace(pixel(), sha256="1" * 64)),
    "cut otherwise": lambda folder: made(replace(images_in(folder), unit_size=20)),
    "of another unit": lambda folder: swap(folder),
}


def swap(folder: Path) -> None:
    made(images_in(folder))
    (folder / feature_name(0, "pixel")).rename(folder / "kept")
    (folder / feature_name(1, "pixel")).rename(folder / feature_name(0, "pixel"))
    (folder / "kept").rename(folder / feature_name(1, "pixel"))


@pytest.mark.parametrize("how", STALE)
def test_what_belongs_to_something_else_is_made_again_and_counted(how: str, tmp_path: Path) -> None:
    whole = made(images_in(tmp_path / "whole"))
    STALE[how](tmp_path / "stale")
    assert content(tmp_path / "stale") != content(tmp_path / "whole")
    files = made(images_in(tmp_path / "stale"))
    assert content(tmp_path / "stale") == content(tmp_path / "whole")
    expected = {"cut otherwise": {0, 1}, "of another unit": {0, 1}}.get(how, {0, 1, 2})
    assert files.unfit == {(number, "pixel") for number in expected}
    result = Scores(files, Reference("itself", files=whole)).score(["fd_pixel"])
    assert result["protocol"]["features_made_again"] == len(expected)
    assert result["scores"]["fd_pixel"] == pytest.approx(0, abs=1e-9)
    assert "features_made_again" not in Scores(whole, Reference("itself", files=whole)).score(["fd_pixel"])["protocol"]


def flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "seven bytes": lambda data: data[:7],
    "header only": lambda data: data[: 8 + int.from_bytes(data[:8], "little")],
    "one byte short": lambda data: data[:-1],
    "one byte long": lambda data: data + b"\0",
    "garbage": lambda data: random.Random(0).randbytes(len(data)),
    "text": lambda data: b"<html>503</html>" * 99,
    "a huge header": lambda data: (2**63 - 1).to_bytes(8, "little") + data[8:],
    "a bit in the features": lambda data: flipped(data, 8 * len(data) - 1),
    "a bit in the labels": lambda data: flipped(data, 8 * (8 + int.from_bytes(data[:8], "little")) + 3),
    "no metadata": lambda data: safetensors.numpy.save(safetensors.numpy.load(data)),
    "other metadata": lambda data: safetensors.numpy.save(safetensors.numpy.load(data), {"features": "[]"}),
    "a tensor taken out": lambda data: without(data, "labels"),
}


def without(data: bytes, name: str) -> bytes:
    length = int.from_bytes(data[:8], "little")
    told = json.loads(data[8 : 8 + length])["__metadata__"]
    return safetensors.numpy.save({k: v for k, v in safetensors.numpy.load(data).items() if k != name}, told)


@pytest.mark.parametrize("how", DAMAGE)
def test_what_is_damaged_is_made_again_and_counted(how: str, tmp_path: Path) -> None:
    images = images_in(tmp_path)
    made(images)
    whole, file = content(tmp_path), tmp_path / feature_name(1, "pixel")
    file.write_bytes(DAMAGE[how](file.read_bytes()))
    assert content(tmp_path) != whole
    files = FeatureFiles(images, [pixel()])
    assert [rows.tobytes() for rows in files.rows("pixel", "pool", 40)] == [
        (part / np.float32(127.5) - 1).astype(np.float32).tobytes()
        for part in np.split(noise(40).reshape(40, -1), [16, 32])
    ]
    assert np.concatenate(list(files.rows("pixel", "labels", 40))).tolist() == LABELS
    assert content(tmp_path) == whole and files.unfit == {(1, "pixel")}


def test_no_bit_of_a_file_can_turn_without_notice(tmp_path: Path) -> None:
    """All bits of the header's length, and some of all that follows."""
    images = in_memory(noise(2, side=2), tmp_path, labels=[0, 1])
    expected = {name: made(images).read(0, "pixel", name) for name in ("pool", "labels")}
    (file,) = tmp_path.iterdir()
    whole, draw = file.read_bytes(), random.Random(0)
    for place in [*range(64), *draw.sample(range(64, 8 * len(whole)), 240)]:
        file.write_bytes(flipped(whole, place))
        files = FeatureFiles(images, [pixel()])
        for name, values in expected.items():
            assert np.array_equal(files.read(0, "pixel", name), values), place  # type: ignore[arg-type]
        assert files.unfit == {(0, "pixel")} and file.read_bytes() == whole, place


def test_two_that_find_the_same_damage_mend_it(tmp_path: Path) -> None:
    images = images_in(tmp_path)
    made(images)
    whole, file = content(tmp_path), tmp_path / feature_name(1, "pixel")
    damaged = flipped(file.read_bytes(), 8 * file.stat().st_size - 1)
    for _ in range(20):
        file.write_bytes(damaged)
        barrier, failed = threading.Barrier(4), list[BaseException]()

        def read(barrier: threading.Barrier = barrier, failed: list[BaseException] = failed) -> None:
            try:
                files = FeatureFiles(images, [pixel()])
                barrier.wait()
                assert np.array_equal(np.concatenate(list(files.rows("pixel", "labels", 40))), LABELS)
                assert len(np.concatenate(list(files.rows("pixel", "pool", 40)))) == 40
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed and content(tmp_path) == whole


def test_a_worker_goes_on_where_another_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    images = images_in(tmp_path / "worked")

    def counted(rows: range) -> Any:
        read.append(rows.start // 16)
        return images.read(rows)

    made(images_in(tmp_path / "whole"), pixel(), quadrants())
    whole = content(tmp_path / "whole")
    for name in (feature_name(0, "pixel"), feature_name(2, "pixel"), feature_name(2, "inception")):
        (tmp_path / "worked").mkdir(exist_ok=True)
        (tmp_path / "worked" / name).write_bytes(whole[name])
    (tmp_path / "worked" / f"{feature_name(1, 'pixel')}.{'0' * 32}.tmp").write_bytes(b"torn")  # what it left behind
    files = FeatureFiles(replace(images, read=counted), [pixel(), quadrants()])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    make_features(files)
    assert read == [1, 0] and not files.unfit  # its own place first, each unit read once
    assert {name: data for name, data in content(tmp_path / "worked").items() if name in whole} == whole  # type: ignore[misc]
    make_features(files)
    assert read == [1, 0]


# --- sets of images


def write_pictures(folder: Path, images: np.ndarray[Any, Any], names: Callable[[int], str]) -> None:
    for i, image in enumerate(images):
        file = folder / names(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file)


RGB = noise(30, side=6, channels=3)


def the_forms(folder: Path) -> dict[str, tuple[str, list[int] | None]]:
    """The same pictures in every form, with the labels that it knows."""
    labels = [i * 3 // 30 for i in range(30)]
    np.savez(folder / "stored.npz", arr_0=RGB, arr_1=np.array(labels, np.int32))
    np.savez_compressed(folder / "compressed.npz", RGB, np.array(labels, np.uint8))  # numpy's names: arr_0, arr_1
    np.savez(folder / "without.npz", arr_0=RGB)
    write_pictures(folder / "flat", RGB, lambda i: f"{i:03d}.png")
    (folder / "flat/notes.txt").write_text("no picture")
    (folder / "flat/._001.png").write_text("what macOS leaves")
    write_pictures(folder / "classes", RGB, lambda i: f"{'abc'[labels[i]]}/{i:03d}.png")
    (folder / "tars").mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"tars/train-{shard}.tar")) as writer:
            for i in range(15 * shard, 15 * shard + 15):
                data = io.BytesIO()
                Image.fromarray(RGB[i]).save(data, "PNG")
                writer.write({"__key__": f"{i:03d}", "png": data.getvalue(), "cls": labels[i]})
    named = {"stored.npz": labels, "compressed.npz": labels, "without.npz": None, "flat": None, "classes": labels}
    return {name: (str(folder / name), known) for name, known in {**named, "tars": labels}.items()}


def test_every_form_gives_the_same_pictures(tmp_path: Path) -> None:
    found = {name: (find_images(src), labels) for name, (src, labels) in the_forms(tmp_path).items()}
    for name, (images, labels) in found.items():
        assert (images.num, images.unit_size, images.num_units) == (30, UNIT_SIZE, 1), name
        pictures = all_pictures(images)
        assert np.array_equal(pictures.images, RGB) and pictures.images.dtype == np.uint8, name
        if labels is None:
            assert pictures.labels is None, name
        else:
            assert pictures.labels is not None and pictures.labels.tolist() == labels, name
            assert pictures.labels.dtype == np.int64
        assert np.array_equal(images.read(range(7, 9)).images, RGB[7:9]), name
        assert np.array_equal(images.read(range(3, 4)).images, RGB[3:4]), name  # backwards, too
        again = find_images(images.name)
        assert (again.identity, again.features_url) == (images.identity, images.features_url)
        assert images.features_url.startswith(os.environ["IG_DIST_CACHE"] + "/features/")
    assert len({images.features_url for images, _ in found.values()}) == len(found)


def test_units_of_a_compressed_npz_are_read_in_any_order(tmp_path: Path) -> None:
    many = noise(2 * UNIT_SIZE + 5, side=2)
    np.savez_compressed(tmp_path / "many.npz", many)
    images = find_images(str(tmp_path / "many.npz"))
    for number in (1, 2, 0, 0, 2, 1):
        unit = images.unit(number)
        assert np.array_equal(images.read(unit).images, many[unit.start : unit.stop])
    assert images.num_units == 3


def test_an_index_and_names_of_data_sets(digits_index: Path) -> None:
    truth = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    index = find_images(str(digits_index))
    assert index.features_url == find_images(str(digits_index / "index.json")).features_url
    pictures, source = all_pictures(index), all_pictures(find_images("digits"))
    assert np.array_equal(source.images[..., 0], truth)
    assert source.labels is not None and source.labels.tolist() == load_digits().target.tolist()
    assert pictures.labels is not None and pictures.labels.tolist() != source.labels.tolist()  # in its own order
    assert sorted(image.tobytes() for image in pictures.images) == sorted(image.tobytes() for image in truth)


def test_sizes_are_cut_as_asked_and_one_picture_in_colour_makes_all_rgb(tmp_path: Path) -> None:
    grey, wide = noise(1, side=6)[0], noise(1, side=9, channels=3)[0, :7]
    Image.fromarray(grey[..., 0]).save(tmp_path / "a.png")
    Image.fromarray(grey[..., 0].T).save(tmp_path / "b.png")
    assert np.array_equal(all_pictures(find_images(str(tmp_path))).images, [grey, grey.transpose(1, 0, 2)])
    Image.fromarray(wide).save(tmp_path / "c.png")
    images = find_images(str(tmp_path), image_size=6)
    pictures = all_pictures(images).images
    assert np.array_equal(pictures[0], np.repeat(grey, 3, axis=2))
    assert np.array_equal(pictures[2], center_crop(Image.fromarray(wide), 6))
    with pytest.raises(ConfigError, match=r"c.png has 9 x 7 pixels, the first one 6 x 6: say --image-size"):
        all_pictures(find_images(str(tmp_path)))
    assert find_images(str(tmp_path)).features_url != images.features_url
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").unlink()
    with pytest.raises(ConfigError, match=r"pictures of 9 x 7: say --image-size to cut squares"):
        all_pictures(find_images(str(tmp_path)))


def test_a_picture_that_changed_is_another_set(tmp_path: Path) -> None:
    write_pictures(tmp_path / "flat", RGB, lambda i: f"{i:03d}.png")
    before = find_images(str(tmp_path / "flat"))
    file = tmp_path / "flat/004.png"
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)  # of the same size
    assert find_images(str(tmp_path / "flat")).features_url != before.features_url


@pytest.mark.parametrize("place", ["flat", "a"])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_called_a_picture_and_is_none_is_named(place: str, first: bool, tmp_path: Path) -> None:
    folder = tmp_path if place == "flat" else tmp_path / "pictures"
    root = folder if place == "flat" else folder / place
    write_pictures(root, RGB[:3], lambda i: f"{i + 1}.png")
    for content, reason in (
        (b"<html>404</html>", "not a PNG, JPEG, WebP, GIF or BMP picture"),
        ((root / "1.png").read_bytes()[:60], "cannot be decoded"),
    ):
        (root / ("0.png" if first else "9.png")).write_bytes(content)
        images = find_images(str(folder))
        assert images.num == 4
        with pytest.raises(DataError, match=rf"/?{'0' if first else '9'}\.png: {reason}.*: remove it"):
            all_pictures(images)


def test_an_npz_must_be_pictures_and_labels(tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    for arrays, message in (
        ({"arr_0": RGB.astype(np.float32)}, "arr_0 of .* is float32, pictures are uint8"),
        ({"arr_0": RGB.transpose(0, 3, 1, 2)}, r"has the shape \(30, 3, 6, 6\), pictures are \(N, H, W, 3\)"),
        ({"images": RGB}, "has no arr_0, it has images"),
        ({"arr_0": RGB, "arr_1": np.zeros(29, int)}, r"int64 of shape \(29,\), labels are .* each of the 30 pictures"),
        ({"arr_0": RGB, "arr_1": np.zeros(30)}, "arr_1 .* is float64 of shape"),
        ({"arr_0": RGB, "arr_1": np.zeros((30, 10), int)}, r"of shape \(30, 10\)"),
    ):
        np.savez(file, **arrays)
        with pytest.raises(ConfigError, match=message):
            find_images(str(file))


def test_what_is_nothing_of_all_that_is_said_without_the_encodings_options(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no pictures")
    (tmp_path / "empty").mkdir()
    for name, message in (("nowhere", "does not exist: give an npz"), ("file", "is a file"), ("empty", "is empty")):
        with pytest.raises(ConfigError, match=message) as error:
            find_images(str(tmp_path / name))
        assert not str(error.value).startswith("--source")


def test_a_tar_with_no_picture_in_it_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w"):
        pass
    with pytest.raises(ConfigError):
        find_images(str(tmp_path / "x.tar"))
