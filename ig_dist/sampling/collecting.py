"""What is made of a plan's units for others: one npz as ADM's evaluator reads it, and single pictures for people."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ig_dist.features.images import plan_images
from ig_dist.features.npz_writing import Streamed, npz_bytes, remove_stale, write_npz
from ig_dist.plans.units import Samples, make_folder, read_unit, write_file
from ig_dist.sampling.pictures import pictures_in_rows, pil_images, png
from ig_dist.storage.files import open_url
from ig_dist.storage.urls import is_local
from ig_dist.storage.writable import why_unwritable

NPZ_NAME = "samples.npz"
SHOWN, IN_A_ROW = 64, 8  # images in the picture of a plan


def write_samples_npz(samples: Samples) -> None:
    """All images of a plan in order as ``samples.npz`` beside the units (arr_0 images, arr_1 labels), unit by unit.

    Consecutive blocks of 5,000 are mixed in their classes, whatever the plan's labels, as the inception score wants it.
    One that is there with the right size is left as it is. What killed workers left of their units is removed.
    """
    plan, (fs, path) = samples.plan, open_url(samples.url, "sample.url")
    if is_local(fs):
        remove_stale(Path(path), "unit_*.tmp")
    shape, labels = read_unit(plan, samples.url, 0).images.shape[1:], list[NDArray[Any]]()

    def images() -> Iterator[NDArray[Any]]:
        for number in range(plan.num_units):
            unit = read_unit(plan, samples.url, number)
            labels.append(unit.labels)  # they follow the images in the file, and are small
            yield unit.images

    arrays = {
        "arr_0": Streamed((plan.num, *shape), "uint8", images),
        "arr_1": Streamed((plan.num,), "int64", lambda: labels),
    }
    file = f"{path}/{NPZ_NAME}"
    if not (fs.exists(file) and fs.size(file) == npz_bytes(arrays)):
        write_npz(fs, file, arrays)


def write_picture(samples: Samples, run: Path, classes: Sequence[str]) -> str:
    """The first images with the names of their classes as one PNG: in the run, or beside samples that lie elsewhere.

    Returns:
        Where it is.
    """
    plan, unit = samples.plan, read_unit(samples.plan, samples.url, 0)
    names, starts = [classes[label] for label in unit.labels], range(0, min(SHOWN, len(unit.images)), IN_A_ROW)
    rows = [("", unit.images[i : i + IN_A_ROW], names[i : i + IN_A_ROW]) for i in starts]
    inside, place = run / "samples", samples.url.rsplit("/", 1)[0]
    if samples.url.rsplit("/", 1)[-1] != plan.digest:  # a folder that was asked for
        file = f"{samples.url}/samples.png"
    elif Path(place) != inside and (run / "config.yaml").is_file() and not why_unwritable(inside):
        file = f"{inside}/{plan.digest}.png"
    else:
        file = f"{samples.url}.png"
    fs, path = open_url(file, "sample.url")
    make_folder(fs, path.rsplit("/", 1)[0])
    write_file(fs, path, png(pictures_in_rows(rows, plan.describe())))
    return file


def write_pngs(samples: Samples, num: int, classes: list[str]) -> None:
    """The first ``num`` images as ``png/000000_class.png`` beside the units."""
    fs, path = open_url(samples.url, "sample.url")
    make_folder(fs, f"{path}/png")
    images = plan_images(samples)
    for number in range(min(num, images.num)):
        pixels, labels, _ = images.read(range(number, number + 1))
        assert labels is not None
        name = re.sub(r"[^\w-]+", "_", classes[int(labels[0])])
        write_file(fs, f"{path}/png/{number:06d}_{name}.png", png(pil_images(pixels)[0]))
