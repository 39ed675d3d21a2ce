"""What a tokenizer is, and tokenizers by name: ``pixel`` (small images are their own latents), and the autoencoders.

The weights of these are at a path, in the tokenizers' folder, or in the Hugging Face cache and hub; they run on
diffusers (``vae.py``), which is imported when the first of them is asked for.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ig_dist.data.index import LatentInfo, TokenizerInfo
from ig_dist.errors import ConfigError, nearest
from ig_dist.storage.hub import HubWeights, weights_root

Precision = Literal["fp32", "tf32", "bf16", "fp16"]  # tf32 is of GPUs, see `ig_dist.arithmetic`, and fp32 elsewhere

FOLDER_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
"""What diffusers' ``AutoencoderKL.save_pretrained`` writes."""
VA_VAE = "va-vae-f16d32"
PUBLISHED = [
    *(
        HubWeights("tokenizer", f"stabilityai/{short}", short, f"stabilityai/{short}", FOLDER_FILES, "vae")
        for short in ("sd-vae-ft-ema", "sd-vae-ft-mse")
    ),
    HubWeights(
        "tokenizer",
        VA_VAE,
        VA_VAE,
        "hustvl/vavae-imagenet256-f16d32-dinov2",
        ("vavae-imagenet256-f16d32-dinov2.pt",),
        "vae",
    ),
]
"""A user may give the name, which stands in an index, or the folder's. The hub is not asked for ``VA_VAE``."""


@dataclass(frozen=True)
class Tokenizer:
    """Images (B, H, W, channels) uint8 <-> latents (B, C, h, w). Results lie on the device of what was given."""

    name: str
    sha256: str  # hash of weights and settings, whatever file they came in and whatever they are run on
    downsample: int  # side of the image over the side of its latent
    image_channels: int | None  # None: any
    stochastic: bool  # whether `encode` gives mean and std of a posterior
    scale: float | None
    """The model sees latent * scale; None: (latent - mean) / std by the data set's statistics per channel."""
    uint8_rule: str  # how decoded values become uint8; part of every score's protocol
    encode: Callable[[Tensor], Tensor]  # to fp32 latents, or to mean and std stacked, (B, 2C, h, w), if stochastic
    decode: Callable[[Tensor], Tensor]
    """Latents of any float type, without the model's normalisation, to uint8 images (B, H, W, channels)."""
    latent_channels: int | None = None  # None: those of the image

    def latent_shape(self, image_size: int, image_channels: int) -> tuple[int, int, int]:
        """Shape of the latent that a model sees of such images, (C, h, w)."""
        side = image_size // self.downsample
        return self.latent_channels or image_channels, side, side


_PIXEL_RULE = "clip(round(127.5 (x + 1)), 0, 255) of [-1, 1]"


def _pixel_encode(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)  # in place: large batches are slow to allocate


def _pixel_decode(latents: Tensor) -> Tensor:
    values = (127.5 * (latents.double() + 1.0)).round().clamp(0, 255)
    return values.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


PIXEL = Tokenizer(
    name="pixel",
    sha256=hashlib.sha256(f"pixel: x / 127.5 - 1; {_PIXEL_RULE}".encode()).hexdigest(),
    downsample=1,
    image_channels=None,
    stochastic=False,
    scale=1.0,
    uint8_rule=_PIXEL_RULE,
    encode=_pixel_encode,
    decode=_pixel_decode,
)


def get_tokenizer(name: str, *, device: str | torch.device = "cpu", precision: Precision = "fp32") -> Tokenizer:
    """A tokenizer by name, or by the path of its weights. Equal arguments give the same one, loaded once.

    Args:
        name: ``pixel``, a published autoencoder's name, or a folder or file with the weights of one.
        device: where the autoencoder runs.
        precision: arithmetic of the autoencoder; the hash does not depend on it.

    Raises:
        ConfigError: unknown name, weights that are not there or do not fit, or diffusers is not installed.
    """
    if name == "pixel":
        return PIXEL
    return _load(*_find_weights(name), str(device), precision)


def _find_weights(name: str) -> tuple[str, Path]:
    """A tokenizer's name as it stands in an index, and the folder or file with its weights.

    Looked for in this order: the path ``name``, then ``name`` in the tokenizers' folder, then, for the Stable Diffusion
    autoencoders, the Hugging Face cache and hub (which downloads into it).
    """
    known = next((p for p in PUBLISHED if name in (p.name, p.folder)), None)
    root, full = weights_root("tokenizer"), known.name if known else name
    inside = [known.name, known.folder] if known else [name]
    for place in [Path(name).expanduser(), *(root / folder for folder in inside)]:
        if name and os.path.exists(place):  # noqa: PTH110  (raises nothing, also of a name too long)
            return full, place
    if known is None:
        near = nearest(name, ["pixel", *(p.name for p in PUBLISHED), *(p.folder for p in PUBLISHED)], n=3)
        raise ConfigError(
            f"unknown tokenizer {name!r}: no such path, nothing of that name in {root};"
            f" the nearest names are {', '.join(map(repr, near))}"
        )
    if known.name == VA_VAE:
        raise known.not_found(f"it is not in {root / known.folder}")
    return full, known.fetch()


@lru_cache(maxsize=4)
def _load(name: str, weights: Path, device: str, precision: Precision) -> Tokenizer:
    from ig_dist.autoencoders.vae import load_vae

    return load_vae(name, weights, torch.device(device), precision)


def index_tokenizer(
    info: TokenizerInfo,
    latent: LatentInfo,
    place: str = "",
    *,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
) -> Tokenizer:
    """The tokenizer that made an index, for decoding; ``place``: where it is if not under its name in the index.

    Raises:
        ConfigError: it is not found, another one is found, or it does not make latents of that shape.
    """
    if info.name == "pixel" or not place:
        place = info.name
    try:
        tokenizer = get_tokenizer(place, device=device, precision=precision)
    except ConfigError as error:
        raise ConfigError(
            f"{error} (sample.tokenizer=PLACE says where the data's tokenizer is; where there is"
            " no such option, put it into $IG_DIST_TOKENIZERS)"
        ) from None
    if tokenizer.sha256 != info.sha256:
        raise ConfigError(
            f"the data were encoded by tokenizer {info.name} (sha256 {info.sha256[:16]}), but {place} is another one"
            f" (sha256 {tokenizer.sha256[:16]}): point sample.tokenizer to the one that encoded them"
        )
    shape = tokenizer.latent_shape(info.image_size, info.image_channels)
    if latent.shape != shape:
        raise ConfigError(
            f"tokenizer {tokenizer.name} makes latents of shape {'x'.join(map(str, shape))} from images of side"
            f" {info.image_size}, the index says {'x'.join(map(str, latent.shape))}: encode or index again"
        )
    return tokenizer
