"""Real pictures and real features: a part of Fashion-MNIST through the whole system; scores behave like scores.

The features are EfficientNet-lite0's. Its weights come from a package, the pictures from Debian: CI has both.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ig_dist.data.sources import find_source
from ig_dist.evaluation.references import Reference
from ig_dist.evaluation.scores import Scores
from ig_dist.features.extractors.extractor import Extractor, get_extractor
from ig_dist.features.features import FeatureFiles
from tests.conftest import succeed
from tests.scoring import in_memory, require_efficientnet
from tests.unit.test_fashion_mnist import write_pair

Images = np.ndarray[Any, Any]
NUM = 400
METRICS = ["fd_efficientnet", "precision_efficientnet", "recall_efficientnet"]


@pytest.fixture(scope="module")
def real() -> dict[str, Images]:
    """Pictures of the train and of the test part, (NUM, 28, 28, 1) each, and labels of the first."""
    from ig_dist.errors import ConfigError

    require_efficientnet()
    try:
        parts = {part: find_source(f"fashion-mnist{part}").open() for part in ("", "-test")}
    except ConfigError as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(missing))
    images = {part: np.stack([np.asarray(source.item(i)) for i in range(NUM)]) for part, source in parts.items()}
    return {"train": images[""], "test": images["-test"], "labels": parts[""].labels[:NUM]}


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return get_extractor("efficientnet_lite0")


def blurred(images: Images) -> Images:
    pictures = [Image.fromarray(image[..., 0]).filter(ImageFilter.GaussianBlur(1)) for image in images]
    return np.stack([np.asarray(picture) for picture in pictures])[..., None]


def noisy(images: Images, deviation: float) -> Images:
    noise = np.random.default_rng(0).normal(0, deviation, images.shape)
    return (images + noise).clip(0, 255).round().astype(np.uint8)


def test_scores_order_pictures_as_people_do(real: dict[str, Images], extractor: Extractor, tmp_path: Path) -> None:
    """Other real pictures come nearest; blur and more and more noise lead away; half as many pictures read higher."""

    def files(name: str, images: Images) -> FeatureFiles:
        return FeatureFiles(in_memory(images, tmp_path / name, unit_size=100), [extractor])

    reference = Reference("the train part", files=files("train", real["train"]))
    sets = {
        "real": real["test"],
        "some noise": noisy(real["test"], 10),
        "more noise": noisy(real["test"], 40),
        "blur": blurred(real["test"]),
    }
    scored = {name: Scores(files(name, images), reference).score(METRICS)["scores"] for name, images in sets.items()}
    distance = {name: scores["fd_efficientnet"] for name, scores in scored.items()}
    assert 0 < distance["real"] < distance["some noise"] < distance["more noise"]
    assert distance["real"] < 0.8 * distance["blur"]
    assert scored["real"]["precision_efficientnet"] > 0.6 > scored["more noise"]["precision_efficientnet"]
    few = Scores(files("real", real["test"]), reference, num=NUM // 2).score(["fd_efficientnet"])
    assert few["scores"]["fd_efficientnet"] > 1.05 * distance["real"] and few["protocol"]["num"] == NUM // 2


def test_from_idx_files_to_a_score(real: dict[str, Images], tmp_path: Path) -> None:
    """The page's commands, on few pictures and a small model: encode, train, sample with features, sweep, report."""
    few = NUM // 2
    pictures = write_pair(tmp_path / "pictures", images=real["train"][:few, ..., 0], labels=real["labels"][:few])
    data, run = tmp_path / "data", tmp_path / "run"
    small = [
        "model.depth=3",
        "model.hidden_size=64",
        "model.aux_depth=1",
        "train.compile=false",
        "train.precision=fp32",
    ]
    short = ["train.steps=40", "train.global_batch_size=16", "optimizer.warmup_steps=5", "ema.decays=[0.9]"]
    commands = [
        ["python", "data_prep/encode_latents.py", "--source", pictures, "--dest", data, "--tokenizer", "pixel"],
        ["ig-dist", "train", "configs/fashion_mnist_ig.yaml", f"data.index={data}", f"run.dir={run}", *small, *short],
        ["ig-dist", "reference", data, "--out", tmp_path / "real.npz", "--extractors", "efficientnet_lite0"],
        [
            *("ig-dist", "sweep", run, "sample.num=64", "sample.unit_size=32", "sample.steps=2", "--ig-scale", "1,1.5"),
            *("--metrics", "fd_efficientnet,recall_efficientnet", f"evaluate.reference={tmp_path / 'real.npz'}"),
            "sample.keep_images=false",
        ],
        ["ig-dist", "report", run],
    ]
    for command in commands:
        succeed(command)
    (file,) = run.glob("sweeps/*/sweep.json")
    sweep = json.loads(file.read_text())
    assert [row["ig_scale"] for row in sweep["rows"]] == [1, 1.5] and sweep["target"] == "fd_efficientnet"
    assert all(row["scores"]["fd_efficientnet"] > 0 for row in sweep["rows"])
    assert sweep["protocol"]["reference"].endswith("real.npz") and sweep["protocol"]["reference_images"] == few
    told = sweep["protocol"]  # how images were made and how they were scored, neither in the other's place
    assert told["precision"] == "bf16" and told["precision_rule"] == "k = 3, distances in float32"
    assert "efficientnet_lite0" in (run / "report.html").read_text()
    assert not list(run.glob("samples/*/unit_00001.safetensors")), "the images of a sweep were to be dropped"
