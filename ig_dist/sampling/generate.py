"""Generating the units of a plan, and their features, by any number of workers.

No locks: a worker walks the units from its own place on and skips what exists. Beside the solver, which has the
device's main stream, a unit's latents are decoded and its features extracted on a second stream; a thread writes them.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ig_dist.features.extractors.extractor import Extractor
from ig_dist.features.features import FeatureFiles
from ig_dist.features.images import plan_images
from ig_dist.plans.plan import Plan, image_numbers
from ig_dist.plans.samples import Pictures, Samples, existing, read_unit, unit_name, write_unit
from ig_dist.sampling.solving import Models, Sampler
from ig_dist.storage.background import in_background
from ig_dist.storage.files import open_url
from ig_dist.this_process import this_process

R = TypeVar("R")


def generate_units(
    models: Models,
    samples: Samples,
    extractors: Sequence[Extractor] = (),
    *,
    num: int | None = None,
    keep_images: bool = True,
    on_progress: Callable[[int], None] = lambda images: None,
) -> FeatureFiles:
    """Make every unit of a plan that does not exist yet, and the features of each; gives the feature files.

    Without ``keep_images`` the features stand for the images, and only unit 0 keeps its own. This process, as one of
    several workers, begins at its own place. ``num``: only the units of the first so many images. ``on_progress`` is
    told the number of finished images of the unit in hand, 0 between units.
    """
    plan, (fs, path) = samples.plan, open_url(samples.url, "sample.url")
    sampler, files = Sampler(models, plan), FeatureFiles(plan_images(samples), extractors)
    beside, (worker, workers) = _Beside(sampler.device), this_process()[:2]

    def write(
        number: int,
        images: Tensor,
        work: NDArray[np.int64] | None,
        made: Sequence[tuple[Extractor, dict[str, Tensor]]],
        write_images: bool,
    ) -> None:
        with beside.alone():
            pictures = Pictures(images.cpu().numpy(), plan.unit_labels(number), work)
            if write_images:
                write_unit(samples.url, number, pictures)
            for extractor, features in made:
                files.write(number, extractor, pictures, features)

    units, writing = -(-min(num or plan.num, plan.num) // plan.unit_size), in_background(lambda: None)
    for k in range(units):
        number = (worker * units // workers + k) % units
        missing, has_images = files.missing(number), unit_name(number) in existing(fs, path)
        write_images = not has_images and (keep_images or number == 0 or not extractors)
        if missing or write_images:
            if has_images:
                found = read_unit(plan, samples.url, number)
                images, work = torch.from_numpy(found.images), found.work
            else:
                images, work = solve_unit(sampler, number, beside, on_progress)
            made = [(extractor, beside(extractor, images)) for extractor in missing]
            writing.result()  # one unit at most waits for the storage
            writing = in_background(partial(write, number, images, work, made, write_images))
        on_progress(0)
    writing.result()
    return files


class _Beside:
    """Calls on what the solver made, on a stream of their own where the device has streams."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, function: Callable[..., R], *arguments: Tensor) -> R:
        """Call a function there, once what is asked of the main stream until now is done."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            for tensor in arguments:
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)
        with self.alone():
            return function(*arguments)

    def alone(self) -> contextlib.AbstractContextManager[Any]:
        """Within it the stream is the current one, and waits for nothing but itself."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def solve_unit(
    sampler: Sampler,
    number: int,
    beside: _Beside | None = None,
    on_progress: Callable[[int], None] = lambda images: None,
) -> tuple[Tensor, NDArray[np.int64]]:
    """Images of a unit on the device, and the work of each, batch by batch."""
    plan, images, work, beside = sampler.plan, [], [], beside or _Beside(torch.device("cpu"))
    for batch in sampler.batches(number):
        latents, took = sampler.solve(image_numbers(batch.solved))
        images.append(beside(sampler.decode, latents[: len(batch.kept)]))
        work += [took] * len(batch.kept)
        on_progress(batch.kept.stop - plan.unit(number).start)
    return beside(lambda *parts: torch.cat(parts), *images), np.array(work)


def make_unit(models: Models, plan: Plan, number: int) -> Pictures:
    """One unit, not written."""
    images, work = solve_unit(Sampler(models, plan), number)
    return Pictures(images.cpu().numpy(), plan.unit_labels(number), work)
