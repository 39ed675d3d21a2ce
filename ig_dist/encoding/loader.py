"""Images for the tokenizer: read and decoded batch by batch in other processes, ahead of the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ig_dist.data.images import RejectedImage, center_crop, load_rgb
from ig_dist.data.processes import end_with_parent, helpers
from ig_dist.data.sources.source import Item, read_bytes
from ig_dist.errors import DataError

PREFETCH = 4  # batches that each process decodes ahead


class Request(NamedTuple):
    """A batch to be: consecutive places of one shard."""

    shard: int
    last: bool
    """Whether the shard ends with it."""
    numbers: list[int]
    """Of the images in the source."""
    items: list[Item]


class ImageBatch(NamedTuple):
    """A request, decoded."""

    shard: int
    last: bool
    places: int
    """Images asked for."""
    numbers: Tensor  # (B,) int64: those that are pictures
    images: Tensor  # (B, H, W, channels) uint8
    rejected: list[tuple[int, str]]
    """(number, reason) of the others."""
    upscaled: int
    error: str | None
    """What ended the reading; an exception would arrive with the traceback of another process."""


class _Images(Dataset[ImageBatch]):
    def __init__(self, size: int, channels: int) -> None:
        self.size, self.channels = size, channels

    def __getitem__(self, request: Request) -> ImageBatch:
        return decode(request, self.size, self.channels)


def image_batches(
    requests: Iterable[Request], size: int, channels: int, *, workers: int, pin: bool
) -> Iterator[ImageBatch]:
    """Decoded batches in the order of the requests, which are drawn as decoding goes on.

    Args:
        requests: what to decode.
        size: side of the images.
        channels: of the images.
        workers: processes that decode; 0: this one does.
        pin: put images into pinned memory, for copies to a GPU.

    Raises:
        DataError: an image cannot be read, or a process died.
    """
    loader: DataLoader[ImageBatch] = DataLoader(
        _Images(size, channels),
        sampler=requests,
        batch_size=None,  # a request is a batch already
        collate_fn=_as_it_is,  # without it, arrays and lists would become tensors
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=pin,
        multiprocessing_context=helpers() if workers else None,
        worker_init_fn=end_with_parent,
    )
    try:
        for batch in loader:
            if batch.error is not None:
                raise DataError(batch.error)
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            "a process that decodes images died (for want of memory, or of shared memory, /dev/shm):"
            f" use fewer than --workers {workers}, a smaller --batch-size, or `docker run --shm-size`, and run again"
        ) from None


def decode(request: Request, size: int, channels: int) -> ImageBatch:
    """Read and decode the images of a request."""
    numbers: list[int] = []
    images: list[NDArray[np.uint8]] = []
    rejected: list[tuple[int, str]] = []
    upscaled, failure = 0, None
    for number, item in zip(request.numbers, request.items, strict=True):
        try:
            if isinstance(item, np.ndarray):
                image = item
            else:
                picture = load_rgb(read_bytes(item))
                image = center_crop(picture, size)
                upscaled += min(picture.size) < size
        except RejectedImage as rejection:
            rejected.append((number, str(rejection)))
        except DataError as error:
            failure = str(error)
            break
        else:
            numbers.append(number)
            images.append(image)
    stacked = np.stack(images) if images else np.empty((0, size, size, channels), np.uint8)
    return ImageBatch(
        request.shard,
        request.last,
        len(request.numbers),
        torch.tensor(numbers, dtype=torch.int64),
        torch.from_numpy(stacked),
        rejected,
        upscaled,
        failure,
    )


def _as_it_is(batch: Any) -> Any:
    return batch
