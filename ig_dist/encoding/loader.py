"""Images for the tokenizer: read and decoded batch by batch in other processes, ahead of the device."""

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.context import BaseContext
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ig_dist.data.images import RejectedImage, center_crop, load_rgb
from ig_dist.data.sources.source import Item, read_bytes
from ig_dist.errors import DataError

PREFETCH = 4  # batches that each process decodes ahead


class Request(NamedTuple):
    """A batch to be: consecutive places of one shard."""

    shard: int
    last: bool  # whether the shard ends with it
    numbers: list[int]  # of the images in the source
    items: list[Item]


class ImageBatch(NamedTuple):
    """A request, decoded."""

    shard: int
    last: bool
    places: int  # images asked for
    numbers: Tensor  # (B,) int64: those that are pictures
    images: Tensor  # (B, H, W, channels) uint8
    rejected: list[tuple[int, str]]  # (number, reason) of the others
    upscaled: int
    error: str | None  # what ended the reading; an exception would arrive with the traceback of another process


class _Requests(Dataset[Request]):
    def __getitem__(self, request: Request) -> Request:
        return request


def image_batches(
    requests: Iterable[Request], size: int, channels: int, *, workers: int, pin: bool
) -> Iterator[ImageBatch]:
    """Decoded batches in the order of the requests, which are drawn as decoding goes on.

    Processes decode, or without ``workers`` this one; ``pin`` puts images into pinned memory, for copies to a GPU.

    Raises:
        DataError: an image cannot be read, or a process died.
    """
    try:
        with helpers() as context:
            loader: DataLoader[Any] = DataLoader(  # of requests, which it gives decoded
                _Requests(),
                sampler=requests,
                batch_size=None,  # a request is a batch already
                collate_fn=partial(decode, size=size, channels=channels),
                num_workers=workers,
                prefetch_factor=PREFETCH if workers else None,
                pin_memory=pin,
                multiprocessing_context=context if workers else None,
                worker_init_fn=end_with_parent,
            )
            batches = iter(loader)
        for batch in batches:
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


@contextmanager
def helpers() -> Iterator[BaseContext]:
    """For who starts helper processes.

    They are not forked from this process: torch's threads, and a GPU's context, do not survive that. The server that
    forks them has imported torch and nothing else; there is one for all. Nor do they import the script that was
    started, and so run it again, as multiprocessing has its processes do.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["ig_dist.encoding.loader"])
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield context
    finally:
        sys.modules["__main__"] = main


def end_with_parent(*_: object) -> None:
    """To be called in a helper process: end when the process that it helps is killed.

    Watching who forked this one, as the DataLoader does, is not enough: that is the server, which lives as long as
    any of its children.
    """
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
