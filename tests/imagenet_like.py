"""A small ImageNet: 20 of its classes with real synsets, real JPEG files, and what is odd in the real one.

Each form of it (the functions) holds the same files: class folders, Kaggle's layout, the tar of class tars, WebDataset
shards, parquet shards.
"""

from __future__ import annotations

import functools
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from ig_dist.data.classes import imagenet_classes

CLASSES = 20
PER_CLASS = 12
SYNSETS = list(imagenet_classes())[::50]
CORRUPT, TRUNCATED = f"{SYNSETS[0]}_7.JPEG", f"{SYNSETS[10]}_11.JPEG"  # the files that hold no picture


class File(NamedTuple):
    name: str
    label: int
    data: bytes


@functools.cache
def files() -> list[File]:
    """All files, sorted by class and name."""
    made = [_file(label, i) for label in range(CLASSES) for i in range(PER_CLASS)]
    return sorted(made, key=lambda file: (file.label, file.name))


def _file(label: int, i: int) -> File:
    """A photograph-like JPEG of an odd size: smooth colours that tell class and number apart."""
    random = np.random.default_rng([label, i])
    width, height = (int(size) for size in random.integers(33, 120, 2))
    seed = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(seed).resize((width, height), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if i == 3:
        image = image.convert("L")
    elif i == 4:
        image = image.convert("CMYK")
    elif i == 5:
        exif[0x0112] = 6
    data = io.BytesIO()
    image.save(data, "JPEG", quality=90, exif=exif)
    name = f"{SYNSETS[label]}_{i}.JPEG"
    damaged = {CORRUPT: b"<html>404</html>" * 20, TRUNCATED: data.getvalue()[:600]}
    return File(name, label, damaged.get(name, data.getvalue()))


def image_folder(root: Path) -> Path:
    """``root/SYNSET/NAME.JPEG``."""
    for file in files():
        path = root / SYNSETS[file.label] / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.data)
    return root


def kaggle(root: Path) -> Path:
    """The competition's layout, with its mapping file."""
    image_folder(root / "ILSVRC/Data/CLS-LOC/train")
    (root / "ILSVRC/Data/CLS-LOC/val").mkdir()
    words = imagenet_classes()
    lines = [f"{synset} {words[synset]}\n" for synset in SYNSETS]
    (root / "LOC_synset_mapping.txt").write_text("".join(lines))
    return root


def class_tars(root: Path) -> Path:
    """``ILSVRC2012_img_train.tar``; the class tars in no order, as in the real one."""
    root.mkdir(parents=True, exist_ok=True)
    outer = root / "ILSVRC2012_img_train.tar"
    with tarfile.open(outer, "w") as tar:
        for label in np.random.default_rng(0).permutation(CLASSES):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as class_tar:
                for file in files():
                    if file.label == label:
                        _add(class_tar, file.name, file.data)
            _add(tar, f"{SYNSETS[label]}.tar", inner.getvalue())
    return outer


def webdataset(root: Path, shards: int = 3) -> Path:
    """``train-00000.tar`` and so on, shuffled, and a shard of another split."""
    root.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(_shuffled_parts(shards)):
        with tarfile.open(root / f"train-{number:05d}.tar", "w") as tar:
            for file in part:
                key = Path(file.name).stem
                _add(tar, f"{key}.cls", str(file.label).encode())
                _add(tar, f"{key}.jpg", file.data)
                _add(tar, f"{key}.json", json.dumps({"label": file.label}).encode())
    with tarfile.open(root / "validation-00000.tar", "w") as tar:
        _add(tar, "other.cls", b"3")
        _add(tar, "other.jpg", files()[0].data)
    return root


def parquet(root: Path, shards: int = 2) -> Path:
    """``data/train-00000-of-00002.parquet`` and so on, as ``datasets`` writes them."""
    (root / "data").mkdir(parents=True, exist_ok=True)
    words = imagenet_classes()
    features = {
        "image": {"_type": "Image"},
        "label": {"names": [words[synset] for synset in SYNSETS], "_type": "ClassLabel"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for number, part in enumerate(_shuffled_parts(shards)):
        images = [{"bytes": file.data, "path": file.name} for file in part]
        table = pyarrow.table(
            {
                "image": pyarrow.array(
                    images, pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
                ),
                "label": pyarrow.array([file.label for file in part], pyarrow.int64()),
            }
        ).replace_schema_metadata(metadata)
        name = f"train-{number:05d}-of-{shards:05d}.parquet"
        pyarrow.parquet.write_table(table, root / "data" / name, row_group_size=50)
    (root / "data/validation-00000-of-00001.parquet").write_bytes(b"not looked at")
    return root


FORMS = {
    "ImageFolder": image_folder,
    "Kaggle": kaggle,
    "class tars": class_tars,
    "WebDataset": webdataset,
    "parquet": parquet,
}


def _shuffled_parts(parts: int) -> Iterator[list[File]]:
    everything = files()
    for chosen in np.array_split(np.random.default_rng(1).permutation(len(everything)), parts):
        yield [everything[i] for i in chosen]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
