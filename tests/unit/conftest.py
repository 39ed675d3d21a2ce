"""What the tests of tokenizers share."""

from pathlib import Path

import pytest
from torch import nn


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tokenizer of this machine, and no network."""
    monkeypatch.setenv("IG_DIST_TOKENIZERS", str(tmp_path / "tokenizers"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    from tests.autoencoders import save_vae  # slow to import: only for who asks

    folder = tmp_path_factory.mktemp("small")
    return folder, save_vae(folder)
