"""Own pictures: the page's commands on a folder of drawn shapes, with every kind of file in it."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ig_dist.data.index import read_index
from ig_dist.features.images import index_images
from tests.conftest import ROOT, run_command, succeed
from tests.encoding import contents, usually_named
from tests.scoring import all_pictures

SHAPES = ("circle", "square", "triangle")
PER_CLASS = 80
# what makes the page's commands short, by verb
SHORT = {
    "train": [
        "train.steps=20",
        "train.global_batch_size=32",
        "model.hidden_size=32",
        "model.depth=3",
        "ema.decays=[0.9]",
    ],
    "sweep": ["sample.num=40", "sample.steps=2"],
    "sample": ["sample.steps=2"],
}


def draw(shape: str, seed: int) -> Image.Image:
    """A coloured shape somewhere on a dark ground, 40 x 48."""
    random = np.random.default_rng([SHAPES.index(shape), seed])
    x, y, radius = random.integers(14, 26), random.integers(14, 30), random.integers(8, 13)
    image = Image.new("RGB", (40, 48), tuple(random.integers(0, 60, 3).tolist()))
    pen, colour = ImageDraw.Draw(image), tuple(random.integers(120, 256, 3).tolist())
    box = (int(x - radius), int(y - radius), int(x + radius), int(y + radius))
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(int(x), box[1]), (box[2], box[3]), (box[0], box[3])], fill=colour)
    return image


def save(image: Image.Image, folder: Path, i: int) -> None:
    """Save in the i-th of the kinds of file that people have."""
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = image.quantize(16)
    file = folder / f"{i:03d}"
    match i % 8:
        case 0:
            image.save(file.with_suffix(".png"))
        case 1:
            image.save(file.with_suffix(".jpg"), quality=95)
        case 2:
            image.save(file.with_suffix(".webp"))
        case 3:
            image.convert("L").save(file.with_suffix(".png"))
        case 4:
            image.convert("CMYK").save(file.with_suffix(".jpg"), quality=95)
        case 5:
            palette.save(file.with_suffix(".png"), transparency=palette.getpixel((0, 0)))
        case 6:
            image.transpose(Image.Transpose.ROTATE_90).save(file.with_suffix(".jpeg"), exif=exif, quality=95)
        case 7:
            image.save(file.with_suffix(".jpg"), format="PNG")  # a wrong name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to type the page's commands in, with ``pictures`` in it."""
    place = tmp_path_factory.mktemp("own")
    for name in ("data_prep", "configs"):
        (place / name).symlink_to(ROOT / name)
    for shape in SHAPES:
        folder = place / "pictures" / shape
        (folder / "more").mkdir(parents=True)
        for i in range(PER_CLASS):
            save(draw(shape, i), folder / "more" if i % 5 == 0 else folder, i)
    draw("circle", 0).resize((8, 9)).save(place / "pictures/circle/small.png")
    damaged = place / "pictures/square/damaged.jpg"
    draw("square", 0).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:400])
    (place / "pictures/triangle/notes.txt").write_text("three corners")
    (place / "pictures/circle/.DS_Store").write_text("junk")
    (place / "pictures/Thumbs.db").write_text("junk")
    return place


@pytest.fixture(scope="module")
def outputs(place: Path) -> dict[str, str]:
    """What the walk-through's commands printed, by verb; all of them have succeeded."""
    outputs = {}
    for command in walk_through():
        verb = "encode" if command[0] == "python" else command[1]
        done = run_command([*command, *SHORT.get(verb, [])], cwd=place)
        assert done.returncode == 0, (command, done.stderr)
        outputs[verb] = done.stdout
    return outputs


def walk_through() -> list[list[str]]:
    """The page's commands, as typed."""
    block = re.search(r"```\n(.*?)```", (ROOT / "docs/own-pictures.md").read_text(), re.DOTALL)
    assert block is not None
    return [shlex.split(line) for line in block[1].replace("\\\n", " ").splitlines()]


def encode(place: Path, *options: str) -> Sequence[str]:
    return [*walk_through()[0], *options]


def test_the_walk_through_encodes_trains_and_scores(place: Path, outputs: dict[str, str]) -> None:
    assert list(outputs) == ["encode", "train", "sweep", "sample"]
    run = place / "runs/pictures"
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 20
    (folder,) = (run / "sweeps").iterdir()
    sweep = json.loads((folder / "sweep.json").read_text())
    assert len(sweep["rows"]) == 3 and all(row["scores"]["fd_pixel"] > 0 for row in sweep["rows"])
    assert sweep["protocol"]["reference"].startswith("folder pictures, 243 files, sha256 ")
    for name in ("sweep.png", "grid.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    (samples,) = (found for found in map(np.load, run.glob("samples/*/samples.npz")) if len(found["arr_0"]) == 64)
    assert samples["arr_0"].shape == (64, 16, 16, 3) and set(samples["arr_1"]) == {0, 1, 2}


def test_the_summary_and_the_list_of_rejected_files(place: Path, outputs: dict[str, str]) -> None:
    said = " ".join(outputs["encode"].split())
    assert "241 images of 3 classes (80 to 81 a class)" in said and "3x16x16 latents" in said
    assert "2 rejected (runs/pictures-data/rejected.csv), 1 upscaled" in said
    with (place / "runs/pictures-data/rejected.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["square/damaged.jpg", "triangle/notes.txt"]
    assert "truncated" in rows[0]["reason"].lower() and rows[1]["reason"] == "not a PNG, JPEG, WebP, GIF or BMP picture"


def test_every_stored_image_is_the_drawing_it_was(place: Path, outputs: dict[str, str]) -> None:
    index = read_index(str(place / "runs/pictures-data"))
    assert index.info.classes == list(SHAPES)
    images, labels, _ = all_pictures(index_images(index))
    assert labels.tolist() != sorted(labels.tolist())  # shuffled
    for label, shape in enumerate(SHAPES):
        found = images[labels == label].astype(int)
        for i in range(PER_CLASS):
            drawing = draw(shape, i)
            if i % 8 == 3:
                drawing = drawing.convert("L").convert("RGB")
            if i % 8 == 5:  # the ground was transparent
                palette = drawing.quantize(16)
                ground = np.asarray(palette) == palette.getpixel((0, 0))
                drawing = Image.fromarray(
                    np.where(ground[..., None], 255, np.asarray(palette.convert("RGB"))).astype("u1")
                )
            half = drawing.resize((20, 24), Image.Resampling.BOX).resize((16, 19), Image.Resampling.BICUBIC)
            distance = np.abs(found - np.asarray(half)[1:17]).mean((1, 2, 3)).min()
            assert distance < 4, (shape, i, distance)


def test_running_again_does_nothing_and_changes_are_refused(place: Path, outputs: dict[str, str]) -> None:
    data = place / "runs/pictures-data"
    before = {path: path.stat().st_mtime_ns for path in data.iterdir()}
    again = run_command(encode(place), cwd=place)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    done = run_command(encode(place, "--image-size", "8"), cwd=place)
    assert done.returncode == 2 and "other settings or images" in done.stderr
    extra = place / "pictures/circle/extra.png"
    draw("circle", 500).save(extra)
    done = run_command(encode(place), cwd=place)
    extra.unlink()
    assert done.returncode == 2 and "other settings or images" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in data.iterdir()} == before


def test_shards_do_not_depend_on_threads_or_on_an_interruption(place: Path, outputs: dict[str, str]) -> None:
    first, second = place / "first", place / "second"
    options = ["--samples-per-shard", "100", "--dest"]
    succeed(encode(place, "--workers", "1", *options, str(first)), cwd=place)
    shutil.copytree(first, second)  # killed before the index was written
    (second / "index.json").unlink()
    (second / "shard-000002.tar").unlink()
    (second / "shard-000001.tar").write_bytes(b"half")
    succeed(encode(place, "--workers", "5", *options, str(second)), cwd=place)
    assert contents(first) == usually_named(contents(second))
    assert len(list(first.glob("shard-*.tar"))) == 3


def test_grey_pictures_alone_are_stored_in_colour_too(tmp_path: Path) -> None:
    for shape in SHAPES[:2]:
        (tmp_path / "grey" / shape).mkdir(parents=True)
        draw(shape, 0).convert("L").save(tmp_path / "grey" / shape / "1.png")
    options = ["--source", str(tmp_path / "grey"), "--dest", str(tmp_path / "out"), "--image-size", "16"]
    succeed(["python", "data_prep/encode_latents.py", *options])
    assert read_index(str(tmp_path / "out")).info.latent.shape == (3, 16, 16)
