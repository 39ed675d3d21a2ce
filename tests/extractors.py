"""Extractors' weights for tests: the public Inception's names with random numbers, and what real weights need."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ig_dist.features.extractors.inception import Inception


def random_inception(seed: int = 0) -> dict[str, Tensor]:
    """A state dict of the public file's form, the same for ever.

    Kaiming's scale, or nothing of a picture would reach the features: by PyTorch's own they have a deviation of 5e-8.
    """
    random = np.random.RandomState(seed)

    def values(name: str, shape: torch.Size) -> Tensor:
        if name.endswith("num_batches_tracked"):
            return torch.tensor(0)
        if name.endswith(("bn.weight", "running_var")):
            return torch.from_numpy(random.uniform(0.5, 1.5, shape).astype(np.float32))
        scale = {"bn.bias": 0.1, "running_mean": 0.1, "fc.bias": 1.0}.get(".".join(name.split(".")[-2:]), 0.1)
        if name.endswith("weight"):
            scale = (2 / shape[1:].numel()) ** 0.5
        return torch.from_numpy(scale * random.standard_normal(shape).astype(np.float32))

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Inception().state_dict().items()}
    return {name: values(name, shape) for name, shape in shapes.items()}


def need(package: str) -> None:
    """Skip a user's test of an optional package; CI has them all."""
    if importlib.util.find_spec(package) is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{package} is not installed")


def save_dinov2(folder: Path, **settings: int) -> Path:
    """A tiny random DINOv2 in a folder, as transformers saves it."""
    from transformers import Dinov2Config, Dinov2Model
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 518, "patch_size": 14}
    Dinov2Model(Dinov2Config(**{**sizes, **settings})).save_pretrained(folder)
    return folder
