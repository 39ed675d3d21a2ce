"""What 50,000 images of 256 x 256 take to merge and to score: peak memory, and times beside a plain copy of the bytes.

    python benchmarks/evaluation.py --folder DISK            # 24 GB of disk, about 20 minutes on one core
    python benchmarks/evaluation.py --folder DISK --num 2000

Pictures and features are random numbers of the true shapes: what is measured is what happens to them. Each part runs
in a process of its own, whose peak memory is the kernel's figure.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.synthetic import export_info
from ig_dist.evaluation.references import Reference
from ig_dist.evaluation.scores import Scores
from ig_dist.features.extractors.extractor import Extractor
from ig_dist.features.features import FeatureFiles
from ig_dist.features.images import ImageSet, plan_images
from ig_dist.models.dit import DiTConfig
from ig_dist.plans.plan import Plan
from ig_dist.plans.samples import Pictures, Samples, write_unit
from ig_dist.sampling.run import NPZ_NAME, write_samples_npz
from ig_dist.terminal import console, run_app

METRICS = ("fid", "sfid", "inception_score", "precision", "recall", "kid")
SIDE, REFERENCE = 256, 10_000
DIMENSIONS = {"pool": 2048, "spatial": 2023, "logits": 1008}


def extractor() -> Extractor:
    """Stands for Inception: its features are there already."""

    def network(images: Tensor) -> dict[str, Tensor]:
        raise AssertionError("all features are there")

    return Extractor("inception", "of random numbers", "none", DIMENSIONS, 64, torch.device("cpu"), network)


def samples(folder: Path, num: int) -> Samples:
    """A plan of so many pictures."""
    shape: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "patch_size": 2,
        "input_size": 32,
        "in_channels": 4,
    }
    info = export_info(DiTConfig(**shape, num_classes=1000, aux_depth=None))
    plan = Plan(
        num=num,
        labels="balanced",
        num_classes=1000,
        seed=0,
        solver="euler",
        steps=1,
        guidance=(),
        precision="fp32",
        unit_size=512,
        batch_size=64,
        weights_sha256="",
    )
    return Samples(plan, info, str(folder / "samples"), "")


def real(folder: Path) -> ImageSet:
    """The reference: features alone."""

    def read(rows: range) -> Pictures:
        raise AssertionError("all features are there")

    return ImageSet("random", "random", REFERENCE, 512, str(folder / "reference"), read)


def write_features(images: ImageSet, seed: int) -> None:
    """Random features of every unit, positive as Inception's are."""
    files, random = FeatureFiles(images, [extractor()]), np.random.default_rng(seed)
    mixing = {name: random.standard_normal((64, size), np.float32) for name, size in DIMENSIONS.items()}
    blank: NDArray[np.uint8] = np.zeros((0, 1, 1, 1), np.uint8)
    for number in range(images.num_units):
        count = len(images.unit(number))
        features = {}
        for name, size in DIMENSIONS.items():
            values = random.standard_normal((count, 64), np.float32) @ mixing[name] / 8
            features[name] = np.abs(values + 0.3 * random.standard_normal((count, size), np.float32))
        files.write(number, extractor(), Pictures(blank, np.zeros(count, np.int64)), features)


def make(folder: Path, num: int) -> None:
    """Units with random pictures, and the features of both sets."""
    drawn, random = samples(folder, num), np.random.default_rng(0)
    (folder / "samples").mkdir(parents=True)
    for number in range(drawn.plan.num_units):
        numbers = drawn.plan.unit(number)
        images = np.frombuffer(random.bytes(len(numbers) * SIDE * SIDE * 3), np.uint8).reshape(-1, SIDE, SIDE, 3)
        labels = np.arange(numbers.start, numbers.stop) % 1000
        write_unit(drawn.url, number, Pictures(images, labels, np.zeros((len(numbers), 3), np.int64)))
    write_features(plan_images(drawn), 1)
    write_features(real(folder), 2)


def copy(folder: Path) -> None:
    """What merging is held against: the units' bytes, one file after the other, into one file."""
    with (folder / "copy").open("wb") as out:
        for file in sorted((folder / "samples").glob("unit_?????.safetensors")):
            with file.open("rb") as unit:
                shutil.copyfileobj(unit, out, 2**20)
    (folder / "copy").unlink()


def score(folder: Path, num: int, metric: str) -> None:
    """One score, and the time that it takes."""
    one = FeatureFiles(plan_images(samples(folder, num)), [extractor()])
    reference = Reference("random", files=FeatureFiles(real(folder), [extractor()]))
    print(Scores(one, reference).score([metric])["scores"])


def run_part(part: str, folder: Path, num: int) -> None:
    """One part, in this process."""
    {
        "make": lambda: make(folder, num),
        "copy": lambda: copy(folder),
        "merge": lambda: write_samples_npz(samples(folder, num)),
    }.get(part, lambda: score(folder, num, part))()


def main(
    num: Annotated[int, typer.Option(min=2000)] = 50_000,
    folder: Annotated[Path | None, typer.Option(help="On the disk to measure. Default: a temporary one.")] = None,
    part: Annotated[str | None, typer.Option(help="Used by the command itself: one part, in this process.")] = None,
) -> None:
    """Merge and score random pictures, and print peak memory and times."""
    if part is not None and folder is not None:
        began = time.monotonic()
        run_part(part, folder, num)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        console.print(f"RESULT {time.monotonic() - began:.2f} {peak}")
        return
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work, seconds = Path(name) / "work", dict[str, float]()
        console.print(
            f"{num:,} pictures of {SIDE} x {SIDE}, {num * SIDE * SIDE * 3 / 1e9:.2f} GB; peak memory, seconds"
        )
        for step in ("make", "copy", "merge", *METRICS):
            command = [sys.executable, __file__, "--num", str(num), "--folder", str(work), "--part", step]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            took, bytes_used = (float(word) for word in done.stdout.split("RESULT ")[1].split())
            seconds[step] = took
            beside = f", {took / seconds['copy']:.2f} of a copy of the bytes" if step == "merge" else ""
            console.print(f"{step:16} {bytes_used / 1e9:5.2f} GB {took:8.1f} s{beside}")
        size = (work / "samples" / NPZ_NAME).stat().st_size
        console.print(f"{NPZ_NAME}: {size:,} bytes")


if __name__ == "__main__":
    run_app(main)
