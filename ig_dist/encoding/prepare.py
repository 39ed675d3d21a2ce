"""From the options of the command to settings that can be encoded, or to one line that says why not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import cast, get_args

import torch
from rich.filesize import decimal

from ig_dist.autoencoders.tokenizer import Precision, Tokenizer
from ig_dist.data.sources import Native, is_name
from ig_dist.encoding.records import Dest
from ig_dist.encoding.settings import Settings, Store
from ig_dist.errors import ConfigError
from ig_dist.storage.urls import is_local
from ig_dist.this_process import Process

MAX_DECODERS = 16
FEW_IMAGES = 2000  # decoded sooner than processes start
VAE_IMAGE_SIZE = 256
BATCH_SIZE = {"cuda": 64, "cpu": 16}  # what a CPU works on should stay in its cache


def choose_precision(precision: str | None, tokenizer: str, device: torch.device) -> Precision:
    """The arithmetic of the encoder: bf16 on a GPU, fp32 elsewhere and where nothing is computed.

    Raises:
        ConfigError: unknown.
    """
    if precision is None:
        return "bf16" if device.type == "cuda" and tokenizer != "pixel" else "fp32"
    if precision not in get_args(Precision):
        raise ConfigError(f"--precision {precision!r} is unknown: use {', '.join(get_args(Precision))}")
    return cast(Precision, precision)


def choose_store(store: str | None, tokenizer: Tokenizer) -> Store:
    """What is stored: the moments of a posterior where there is one.

    Raises:
        ConfigError: unknown, or moments of a tokenizer that has none.
    """
    if store is None:
        return "moments" if tokenizer.stochastic else "sample"
    if store not in get_args(Store):
        raise ConfigError(f"--store {store!r} is unknown: use {' or '.join(get_args(Store))}")
    if store == "moments" and not tokenizer.stochastic:
        raise ConfigError(f"--store moments needs a posterior, {tokenizer.name} has none: leave it out")
    return cast(Store, store)


def choose_image_size(source: str, native: Native | None, image_size: int | None, tokenizer: Tokenizer) -> int:
    """The side of the square images: of a source of pixels its own, else as the user gives it.

    Raises:
        ConfigError: missing, or not one that the tokenizer takes.
    """
    if native is not None:
        size = native.size
        if image_size is not None:
            raise ConfigError(f"--image-size is for pictures, {source} has {size} x {size} pixels: leave it out")
        if tokenizer.image_channels not in (None, native.channels):
            raise ConfigError(f"--tokenizer {tokenizer.name} takes colour images, {source} is grey: use pixel")
        if size % tokenizer.downsample:
            raise ConfigError(
                f"--tokenizer {tokenizer.name} needs multiples of {tokenizer.downsample}, {source} has {size}"
            )
        return size
    if tokenizer.image_channels not in (None, 3):
        raise ConfigError(f"--tokenizer {tokenizer.name} takes no colour images: use another, e.g. sd-vae-ft-ema")
    if image_size is None and tokenizer.downsample > 1:
        image_size = VAE_IMAGE_SIZE
    if image_size is None:
        raise ConfigError(f"--source {source} needs --image-size, the side of the square images, e.g. --image-size 16")
    if image_size < 1:
        raise ConfigError(f"--image-size {image_size} is not positive: use e.g. --image-size 16")
    if image_size % tokenizer.downsample:
        near = max(1, round(image_size / tokenizer.downsample)) * tokenizer.downsample
        raise ConfigError(
            f"--image-size {image_size} is not a multiple of {tokenizer.downsample}, as {tokenizer.name} needs:"
            f" use e.g. --image-size {near}"
        )
    return image_size


def choose_decoders(workers: int | None, worker: Process, images: int) -> int:
    """Processes that decode: this worker's share of the cores, 16 at most; none for few images."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) // worker.local_world_size
    return 0 if images < FEW_IMAGES else max(1, min(MAX_DECODERS, cores))


def latent_shape(tokenizer: Tokenizer, settings: Settings) -> tuple[int, int, int]:
    """Shape of a latent that the model sees, (C, h, w)."""
    side = settings.image_size // tokenizer.downsample
    return tokenizer.latent_channels or settings.image_channels, side, side


def refuse_dest_in_source(source: str, dest: str) -> None:
    """Shards must not lie where they would count as part of the source.

    Raises:
        ConfigError: they would.
    """
    if is_name(source):
        return
    folder = source if "://" in source or Path(source).is_dir() else str(Path(source).parent)
    if "://" in folder or "://" in dest:
        inside = f"{dest.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")
    elif Path(source).is_dir():
        inside = Path(dest).resolve().is_relative_to(Path(folder).resolve())
    else:  # a glob takes in its own folder only
        inside = Path(dest).resolve() == Path(folder).resolve()
    if inside:
        raise ConfigError(f"--dest {dest} lies in --source {folder}, where shards would count as pictures: move it out")


def refuse_full_disk(dest: Dest, needed: int) -> None:
    """Say before the first image what would come after hours.

    Raises:
        ConfigError: they do not fit.
    """
    if not is_local(dest.fs):
        return
    folder = next(path for path in (Path(dest.path), *Path(dest.path).parents) if path.exists())
    free = shutil.disk_usage(folder).free + sum(dest.sizes().values())
    if needed > free:
        raise ConfigError(
            f"--dest {dest.url} needs about {decimal(needed)}, {decimal(free)} are free: choose another disk"
        )
