"""The Inception of 2015 by its definition: names, resize, and every trap with an error planted into it.

What the features of known weights and pictures are was taken from this network when it agreed with torch-fidelity's
(tests/integration/test_torch_fidelity.py).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ig_dist.features.extractors import inception as module
from ig_dist.features.extractors.extractor import fold_norms, get_extractor
from ig_dist.features.extractors.inception import DIMENSIONS, Inception, preprocess, tf1_bilinear
from tests.extractors import random_inception

# at PLACES of the pictures of 32 and of 350 pixels
PLACES = [0, 1, 500, -1]
EXPECTED = {
    "pool": [[0.10768, 1.40461, 3.42689, 5.44864], [0.3052, 1.48624, 3.93397, 5.99658]],
    "spatial": [[0.38698, 0.0, 3.4194, 0.49604], [0.87093, 0.0, 2.58678, 0.0]],
    "logits": [[2.78674, 0.70751, 4.28934, -4.99817], [3.22856, 0.7038, 4.10051, -4.66386]],
}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_inception()


@pytest.fixture(scope="module")
def pictures() -> list[Tensor]:
    random = np.random.RandomState(1)
    return [torch.from_numpy(random.randint(0, 256, (1, s, s, 3)).astype(np.uint8)) for s in (32, 350)]


def build(weights: dict[str, Tensor]) -> Inception:
    with torch.device("meta"):
        model = Inception()
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def features(model: Inception, pictures: list[Tensor]) -> dict[str, Tensor]:
    found = [model(module.preprocess(picture)) for picture in pictures]
    return {name: torch.cat([each[name] for each in found]) for name in DIMENSIONS}


def wrong(found: dict[str, Tensor]) -> set[str]:
    """The names of those that are not as expected."""
    off = {name: (values[:, PLACES] - torch.tensor(EXPECTED[name])).abs().max() for name, values in found.items()}
    return {name for name, error in off.items() if error > 1e-3}


def test_features_of_known_weights(weights: dict[str, Tensor], pictures: list[Tensor]) -> None:
    model = build(weights)
    found = features(model, pictures)
    assert {name: values.shape[1] for name, values in found.items()} == DIMENSIONS
    assert wrong(found) == set()
    fold_norms(model)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    for name, values in features(model, pictures).items():
        torch.testing.assert_close(values, found[name], rtol=1e-4, atol=1e-4)


def test_names_and_shapes(weights: dict[str, Tensor]) -> None:
    convolutions = [name for name in weights if name.endswith(".conv.weight")]
    assert len(convolutions) == 94 and len(weights) == 94 * 6 + 2
    assert sum(tensor.numel() for tensor in weights.values()) == 23_885_392 + 94
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_5b.branch5x5_2.conv.weight"] == (64, 48, 5, 5)
    assert shapes["Mixed_6c.branch7x7dbl_4.conv.weight"] == (160, 160, 7, 1)
    assert shapes["Mixed_6e.branch7x7_2.conv.weight"] == (192, 192, 1, 7)
    assert shapes["Mixed_7a.branch7x7x3_4.conv.weight"] == (192, 192, 3, 3)
    assert shapes["Mixed_7b.branch_pool.conv.weight"] == (192, 1280, 1, 1)
    assert shapes["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == (384,)
    assert shapes["fc.weight"] == (1008, 2048) and shapes["fc.bias"] == (1008,)


def counting_average_pool(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, stride=1, padding=1)


def half_pixel_bilinear(pixels: Tensor, size: int) -> Tensor:
    return functional.interpolate(pixels, (size, size), mode="bilinear", align_corners=False)


def corner_bilinear(pixels: Tensor, size: int) -> Tensor:
    return functional.interpolate(pixels, (size, size), mode="bilinear", align_corners=True)


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("average_pool", counting_average_pool),
        ("max_pool", module.average_pool),  # torchvision's last block
        ("tf1_bilinear", half_pixel_bilinear),
        ("tf1_bilinear", corner_bilinear),
    ],
)
def test_planted_errors(
    name: str,
    planted: Callable[..., Tensor],
    weights: dict[str, Tensor],
    pictures: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, name, planted)
    expected = {"pool", "logits"} if name == "max_pool" else {"pool", "spatial", "logits"}
    assert wrong(features(build(weights), pictures)) == expected


def test_planted_epsilon_and_scale(
    weights: dict[str, Tensor], pictures: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(weights)
    with monkeypatch.context() as patch:
        patch.setattr(module, "preprocess", lambda images: preprocess(images) * (128 / 127.5))
        assert wrong(features(model, pictures)) == set(DIMENSIONS)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 1e-5
    assert wrong(features(model, pictures)) == set(DIMENSIONS)


def test_planted_places_of_logits_and_spatial(weights: dict[str, Tensor], pictures: list[Tensor]) -> None:
    model, outputs = build(weights), {}
    watched = ("Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_6d.branch1x1.bn", "Mixed_6d.branch7x7_3")
    for name in watched:
        model.get_submodule(name).register_forward_hook(
            lambda *call, name=name: outputs.setdefault(name, []).append(call[2].clone())
        )
    found = features(model, pictures)
    assert wrong({"logits": model.fc(found["pool"])}) == {"logits"}  # with the bias

    def flattened(values: Tensor, order: tuple[int, ...] = (0, 2, 3, 1)) -> Tensor:
        return values[:, :7].permute(order).flatten(1)

    hooked = {name: torch.cat(values) for name, values in outputs.items()}
    right = hooked["Mixed_6d"]
    assert torch.equal(flattened(right), found["spatial"])
    assert torch.equal(hooked["Mixed_6d.branch1x1.bn"].relu(), right[:, :192])
    planted = [
        flattened(hooked["Mixed_6c"]),
        flattened(hooked["Mixed_6e"]),
        flattened(hooked["Mixed_6d.branch7x7_3"]),
        flattened(hooked["Mixed_6d.branch1x1.bn"]),  # before the ReLU
        flattened(right, (0, 1, 2, 3)),
        flattened(right[:, 185:]),
    ]
    assert all(wrong({"spatial": values}) == {"spatial"} for values in planted)


def transcribed_resize(image: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow 1's rule, pixel by pixel, of (H, W) in float64."""
    height, width = image.shape
    result = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            y, x = i * float(np.float32(height / size)), j * float(np.float32(width / size))
            top, left = int(np.floor(y)), int(np.floor(x))
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            dy, dx = y - top, x - left
            upper = image[top, left] * (1 - dx) + image[top, right] * dx
            lower = image[bottom, left] * (1 - dx) + image[bottom, right] * dx
            result[i, j] = upper * (1 - dy) + lower * dy
    return result


@pytest.mark.parametrize("shape", [(1, 1), (28, 28), (32, 17), (299, 299), (350, 64), (700, 613)])
def test_resize(shape: tuple[int, int]) -> None:
    image = np.random.RandomState(2).randint(0, 256, shape).astype(np.float64)
    expected = transcribed_resize(image, 299)
    found = tf1_bilinear(torch.from_numpy(image)[None, None], 299)[0, 0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-8)
    rounded = tf1_bilinear(torch.from_numpy(image).float()[None, None], 299)[0, 0].numpy()
    np.testing.assert_allclose(
        rounded, expected, atol=1e-2
    )  # positions of float32: 2e-5 of a pixel, of 255 grey levels
    assert shape != (299, 299) or np.array_equal(found, image)
    if shape == (28, 28):
        off = half_pixel_bilinear(torch.from_numpy(image)[None, None], 299)[0, 0].numpy()
        assert np.abs(off - expected).max() > 10


def test_extractor(weights: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({name: t for name, t in weights.items() if "num_batches_tracked" not in name}, file)
    extractor = replace(get_extractor("inception", weights=str(file), allow_other=True), batch_size=3)
    assert extractor.name == f"inception-{extractor.sha256[:8]}"  # never FID's
    assert dict(extractor.dimensions) == DIMENSIONS == {"pool": 2048, "spatial": 2023, "logits": 1008}
    random = np.random.RandomState(3)
    grey = random.randint(0, 256, (3, 28, 28, 1)).astype(np.uint8)
    found, again = extractor(grey), extractor(grey.repeat(3, axis=3))
    for name, dimensions in DIMENSIONS.items():
        assert found[name].shape == (3, dimensions) and found[name].dtype == torch.float32
        assert torch.equal(found[name], again[name])
    alone = extractor(grey[2:])
    for name in DIMENSIONS:
        torch.testing.assert_close(alone[name], found[name][2:], rtol=1e-5, atol=1e-5)
