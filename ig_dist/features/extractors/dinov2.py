"""DINOv2's class token, for FD-DINOv2 (Oquab et al. 2023; Stein et al. 2023), by transformers' network."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ig_dist.errors import ConfigError, first_line
from ig_dist.features.extractors.extractor import Extractor, channels_first
from ig_dist.terminal.extras import imported

SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
POSITION_OFFSET = 0.1
PREPROCESSING = (
    "grey repeated to RGB; 224 x 224 by PIL's bicubic filter (antialiased, rounded to uint8);"
    " (x / 255 - mean) / std of ImageNet"
)


def load_dinov2(weights: Path, sha256: str, device: torch.device) -> Extractor:
    """The extractor of a folder that transformers saved, by its file with the weights.

    The one that FD-DINOv2 means is ViT-L/14 (1,024 numbers); another is told by its hash and its dimensions.
    """
    model = _read_model(weights)
    model.to(device)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))

    def network(images: Tensor) -> dict[str, Tensor]:
        pixels = channels_first(resize(images), "dinov2").to(torch.float32).expand(-1, 3, -1, -1)
        return {"pool": model(pixel_values=(pixels / 255 - mean) / std).pooler_output}

    dimensions, batch_size = {"pool": model.config.hidden_size}, 8 if device.type == "cpu" else 128
    return Extractor("dinov2", sha256, PREPROCESSING, dimensions, batch_size, device, network)


def resize(images: Tensor) -> Tensor:
    """Images (B, H, W, 1 or 3) to (B, 224, 224, same) by PIL, which works on the CPU; the same device comes back."""
    if images.shape[1:3] == (SIDE, SIDE):
        return images
    resized = np.empty((len(images), SIDE, SIDE, images.shape[3]), np.uint8)
    for i, image in enumerate(images.cpu().numpy()):
        picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        resized[i] = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).reshape(resized.shape[1:])
    return torch.from_numpy(resized).to(images.device)


def _read_model(weights: Path) -> Any:
    """Transformers' Dinov2Model with the weights, its position embeddings laid out for 224 x 224."""
    Dinov2Model = imported("dinov2", "extractor dinov2 needs", "Dinov2Model")
    folder = weights.parent
    try:
        settings = json.loads((folder / "config.json").read_text())
        if (kind := settings.get("model_type")) != "dinov2":
            raise ValueError(f"it is of a {kind}")
        if SIDE % (patch := settings["patch_size"]):
            raise ValueError(f"{SIDE} pixels are no multiple of its patch size {patch}")
        with _quiet():
            model, info = Dinov2Model.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{weights.name} is without {missing[0]}")
    except Exception as error:  # of the files, or whatever transformers says of them
        reason = first_line(error)
        raise ConfigError(
            f"{folder} does not hold a DINOv2 network in config.json and {weights.name} ({reason}): download both again"
        ) from None
    embeddings = model.embeddings
    embeddings.position_embeddings = torch.nn.Parameter(
        position_embeddings(embeddings.position_embeddings.detach(), SIDE // patch)
    )
    return model.eval().requires_grad_(False)


def position_embeddings(learned: Tensor, side: int) -> Tensor:
    """Those of the class and of the learned grid (1, 1 + S S, D), for a grid of side x side.

    As DINOv2's own code interpolates them, by a scale of (side + 0.1) / S: transformers uses side / S.
    """
    grid = round((learned.shape[1] - 1) ** 0.5)
    if grid == side:
        return learned
    patches = learned[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    scale = (side + POSITION_OFFSET) / grid
    patches = interpolate(patches, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return torch.cat([learned[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and its tables of tensors: what is wrong is said in an error."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
