"""DINOv2 by transformers: a tiny random one."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ig_dist.errors import ConfigError
from ig_dist.features.extractors.dinov2 import position_embeddings, resize
from ig_dist.features.extractors.extractor import get_extractor
from tests.extractors import need, save_dinov2

RANDOM = np.random.RandomState(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("transformers")
    return save_dinov2(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No weights of this machine, and no network."""
    monkeypatch.setenv("IG_DIST_EXTRACTORS", str(tmp_path / "extractors"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield


def test_the_class_token_after_the_last_norm(folder: Path) -> None:
    from transformers import Dinov2Model

    extractor = get_extractor("dinov2", weights=str(folder))
    assert extractor.name == "dinov2" and dict(extractor.dimensions) == {"pool": 32}
    images = RANDOM.randint(0, 256, (3, 40, 30, 3)).astype(np.uint8)
    found = extractor(images)["pool"]
    model = Dinov2Model.from_pretrained(folder).eval()
    pictures = [Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC) for image in images]
    pixels = np.stack([np.asarray(picture, dtype=np.float64) for picture in pictures]) / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]

    def expected() -> torch.Tensor:
        with torch.no_grad():
            return model(torch.from_numpy(pixels).permute(0, 3, 1, 2).float()).last_hidden_state[:, 0]

    assert (expected() - found).abs().max() > 1e-4  # by transformers' own interpolation
    embeddings = position_embeddings(model.embeddings.position_embeddings.detach(), 16)
    assert embeddings.shape == (1, 257, 32)
    model.embeddings.position_embeddings = torch.nn.Parameter(embeddings)
    torch.testing.assert_close(found, expected(), rtol=1e-4, atol=1e-5)
    grey = images[..., :1]
    assert torch.equal(extractor(grey)["pool"], extractor(grey.repeat(3, axis=3))["pool"])


def test_a_grid_of_the_same_size_is_left_alone() -> None:
    learned = torch.randn(1, 1 + 256, 4)
    assert position_embeddings(learned, 16) is learned


def test_resize_is_pils_and_antialiased() -> None:
    stripes = torch.zeros(1, 896, 896, 1, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    assert resize(stripes).min() > 110 and resize(stripes).max() < 145  # grey; without the filter black or white
    same = torch.from_numpy(RANDOM.randint(0, 256, (2, 224, 224, 3)).astype(np.uint8))
    assert resize(same) is same


def test_where_it_is_looked_for(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        get_extractor("dinov2")
    command = "hf download facebook/dinov2-large config.json model.safetensors --local-dir"
    assert f"{command} {tmp_path}/extractors/dinov2" in str(caught.value) and "HF_HUB_OFFLINE" in str(caught.value)
    sha256 = get_extractor("dinov2", weights=str(folder)).sha256
    snapshot = tmp_path / "hub/models--facebook--dinov2-large/snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(folder)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0" * 40)
    assert get_extractor("dinov2").sha256 == sha256  # from the cache
    save_dinov2(tmp_path / "extractors/dinov2", hidden_size=16)
    assert get_extractor("dinov2").sha256 != sha256  # a folder of ours comes first


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "in config.json and model"),
        (lambda folder: (folder / "config.json").unlink(), "No such file"),
        (lambda folder: edit(folder, model_type="vit"), "it is of a vit"),
        (lambda folder: edit(folder, patch_size=15), "no multiple of its patch size 15"),
        (lambda folder: edit(folder, num_hidden_layers=3), "without encoder.layer.2"),
        (lambda folder: edit(folder, hidden_size=64), "DINOv2 network"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no tensors"), "DINOv2 network"),
    ],
)
def test_damaged_folders(harm: object, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    need("transformers")
    folder = save_dinov2(tmp_path / "damaged")
    harm(folder)
    capfd.readouterr()
    with pytest.raises(ConfigError) as caught:
        get_extractor("dinov2", weights=str(folder))
    message = str(caught.value)
    assert said in message and str(folder) in message and "\n" not in message and len(message) < 600
    assert capfd.readouterr().err == ""


def edit(folder: Path, **settings: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_without_transformers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy"  # a path that was not loaded before
    copy.symlink_to(folder)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"extractor dinov2 needs transformers: pip install 'transformers>=5'"):
        get_extractor("dinov2", weights=str(copy))
