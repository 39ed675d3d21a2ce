"""Tokenizers by name: ``pixel``, and the autoencoders.

The weights of these lie in a folder or file (``weights.py``); they run on diffusers (``vae.py``), which is imported
when the first of them is asked for.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from ig_dist.autoencoders.tokenizer import PIXEL, Precision, Tokenizer
from ig_dist.autoencoders.weights import canonical_name, find_weights
from ig_dist.data.index import LatentInfo, TokenizerInfo
from ig_dist.errors import ConfigError


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
    return _load(canonical_name(name), find_weights(name), str(device), precision)


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
