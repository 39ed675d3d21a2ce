"""Batches of images to stored latents, without making the device wait for the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ig_dist.autoencoders.tokenizer import Tokenizer
from ig_dist.encoding.loader import ImageBatch
from ig_dist.encoding.settings import Settings
from ig_dist.rng import Purpose, normal

_IN_FLIGHT = 2  # batches whose latents are still on the device


class LatentBatch(NamedTuple):
    """The stored latents of a batch, (B, channels or 2 channels, h, w) float16 on the host."""

    batch: ImageBatch
    latents: NDArray[np.float16]
    flipped: NDArray[np.float16] | None


@torch.inference_mode()
def stored_latents(tokenizer: Tokenizer, images: Tensor, numbers: Tensor, settings: Settings) -> list[Tensor]:
    """What a shard holds of images: their latents, with ``flips`` also those of the mirrored images, float16.

    Args:
        tokenizer: on the device of the images.
        images: (B, H, W, channels) uint8.
        numbers: (B,) int64, of the images in the source: the key of posterior draws.
        settings: what is stored.
    """
    stored = []
    for step, view in enumerate([images, images.flip(2)] if settings.flips else [images]):
        latents = tokenizer.encode(view)
        if tokenizer.stochastic and settings.store == "sample":
            mean, std = latents.chunk(2, dim=1)
            latents = mean + std * normal(settings.seed, Purpose.ENCODE_POSTERIOR, numbers, mean.shape[1:], step=step)
        stored.append(latents.to(torch.float16))
    return stored


def latent_batches(
    batches: Iterable[ImageBatch], tokenizer: Tokenizer, settings: Settings, device: torch.device
) -> Iterator[LatentBatch]:
    """Encode batches. On a GPU the copies back run beside the next batch's encoding."""
    in_flight: deque[tuple[ImageBatch, list[Tensor], Any]] = deque()
    for batch in batches:
        images, numbers = (part.to(device, non_blocking=True) for part in (batch.images, batch.numbers))
        stored = stored_latents(tokenizer, images, numbers, settings) if len(numbers) else []
        done = None
        if device.type == "cuda":
            stored = [
                torch.empty_like(part, device="cpu", pin_memory=True).copy_(part, non_blocking=True) for part in stored
            ]
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        in_flight.append((batch._replace(images=batch.images[:0]), stored, done))
        if len(in_flight) > _IN_FLIGHT or device.type != "cuda":
            yield _arrived(*in_flight.popleft())
    while in_flight:
        yield _arrived(*in_flight.popleft())


def _arrived(batch: ImageBatch, stored: list[Tensor], done: Any) -> LatentBatch:
    if done is not None:
        done.synchronize()
    # Copies: pinned memory goes back to be used again.
    arrays = [part.numpy().copy() for part in stored]
    return LatentBatch(batch, arrays[0] if arrays else np.empty(0, np.float16), arrays[1] if arrays[1:] else None)
