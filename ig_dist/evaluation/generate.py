"""Generating the units of a plan, by any number of workers, and collecting them.

No locks: a worker walks the units from its own place on and skips those that exist. A unit's bytes are a function of
(plan, unit), so two workers that make the same one write the same file.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from ig_dist.data.latents import tokenizer_latents
from ig_dist.diffusion.guidance import guided_velocity
from ig_dist.diffusion.path import Path
from ig_dist.diffusion.samplers import euler, euler_maruyama, heun, sde_grid, time_grid
from ig_dist.errors import DataError
from ig_dist.evaluation.plan import Plan, image_numbers
from ig_dist.export import ExportInfo, ModelInfo
from ig_dist.latents.tokenizer import Tokenizer
from ig_dist.models.dit import DiT
from ig_dist.rng import Purpose, normal
from ig_dist.storage.files import open_url, write_whole

Images = NDArray[np.uint8]  # (N, H, W, channels)
Labels = NDArray[np.int64]  # (N,)
DECODED_AT_ONCE = 16  # an autoencoder's activations are far larger than the model's


@dataclass(frozen=True)
class Samples:
    """Where the images of a plan are, and all that a score's protocol needs."""

    plan: Plan
    info: ExportInfo
    url: str
    uint8_rule: str
    """How decoded values became uint8."""
    tokenizer: str = ""
    """Where the tokenizer was found; empty: under its name in the index."""


def generate_units(
    model: DiT,
    info: ModelInfo,
    plan: Plan,
    url: str,
    tokenizer: Tokenizer,
    *,
    worker: int = 0,
    workers: int = 1,
    on_progress: Callable[[int], None] = lambda images: None,
) -> None:
    """Make every unit of the plan that does not exist yet.

    Args:
        model: on its device, in eval mode.
        info: what stands beside the weights.
        plan: the plan.
        url: folder of the plan's samples, a path or any fsspec URL.
        tokenizer: decodes the latents.
        worker: this worker's number; it begins at unit worker * units / workers.
        workers: number of workers that may be at work.
        on_progress: called with the number of finished images of the unit in hand, 0 between units.
    """
    fs, path = open_url(url, "sample.url")
    fs.makedirs(path, exist_ok=True)
    first = worker * plan.num_units // workers
    for k in range(plan.num_units):
        number = (first + k) % plan.num_units
        fs.invalidate_cache()
        if not fs.exists(_unit_path(path, number)):
            images, labels = make_unit(model, info, plan, number, tokenizer, on_progress)
            write_whole(fs, _unit_path(path, number), safetensors.numpy.save({"images": images, "labels": labels}))
        on_progress(0)


def finished_images(plan: Plan, url: str) -> int:
    """Images in the units that exist, whoever made them."""
    fs, path = open_url(url, "sample.url")
    fs.invalidate_cache()
    names = {PurePosixPath(name).name for name in fs.ls(path, detail=False)} if fs.exists(path) else set()
    return sum(len(plan.unit(k)) for k in range(plan.num_units) if PurePosixPath(_unit_path("", k)).name in names)


def make_unit(
    model: DiT,
    info: ModelInfo,
    plan: Plan,
    number: int,
    tokenizer: Tokenizer,
    on_progress: Callable[[int], None] = lambda images: None,
) -> tuple[Images, Labels]:
    """Images and labels of one unit, batch by batch."""
    unit = plan.unit(number)
    images, labels = [], []
    for start in range(unit.start, unit.stop, plan.batch_size):
        numbers = image_numbers(range(start, min(start + plan.batch_size, unit.stop)), model.pos_embed.device)
        batch_labels = plan.image_labels(numbers)
        images.append(generate(model, info, plan, numbers, batch_labels, tokenizer).cpu().numpy())
        labels.append(batch_labels.cpu().numpy())
        on_progress(int(numbers[-1]) + 1 - unit.start)
    return np.concatenate(images), np.concatenate(labels)


@torch.no_grad()
def generate(model: DiT, info: ModelInfo, plan: Plan, numbers: Tensor, labels: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Images (B, H, W, channels) uint8 of the plan's image numbers (B,). The state is float64."""
    path, shape = Path(info.path), info.latent.shape
    velocity = guided_velocity(model, labels, plan.terms())
    x = normal(plan.seed, Purpose.SAMPLE_NOISE, numbers, shape).double()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
        if plan.solver == "euler":
            x = euler(velocity, x, time_grid(plan.steps))
        elif plan.solver == "heun":
            x = heun(velocity, x, time_grid(plan.steps))
        else:

            def noise(step: int, x: Tensor) -> Tensor:
                return normal(plan.seed, Purpose.SAMPLE_STEP, numbers, shape, step=step)

            x = euler_maruyama(velocity, x, sde_grid(plan.steps), path, noise)
    latents = tokenizer_latents(x, info.latent)
    return torch.cat([tokenizer.decode(part) for part in torch.split(latents, DECODED_AT_ONCE)])


def read_units(plan: Plan, url: str) -> Iterator[tuple[Images, Labels]]:
    """The units in order.

    Raises:
        DataError: a unit is missing or damaged.
    """
    fs, path = open_url(url, "sample.url")
    for number in range(plan.num_units):
        try:
            unit = safetensors.numpy.load(fs.cat_file(_unit_path(path, number)))
            images, labels = unit["images"], unit["labels"]
        except FileNotFoundError:
            raise DataError(
                f"{url}: unit {number} of {plan.num_units} is missing: run the same sampling again"
            ) from None
        except (KeyError, safetensors.SafetensorError):
            raise DataError(
                f"{_unit_path(path, number)} is damaged: delete it and run the same sampling again"
            ) from None
        yield images, labels


def collect(plan: Plan, url: str) -> tuple[Images, Labels]:
    """All images of a plan, in order, and ``samples.npz`` beside the units (arr_0 images, arr_1 labels, as ADM's)."""
    units = list(read_units(plan, url))
    images, labels = (np.concatenate(column) for column in zip(*units, strict=True))
    fs, path = open_url(url, "sample.url")
    temporary = f"{path}/samples.npz.{uuid.uuid4().hex}.tmp"
    with fs.open(temporary, "wb") as file:
        np.savez(file, images, labels)
    fs.mv(temporary, f"{path}/samples.npz")
    return images, labels


def _unit_path(path: str, number: int) -> str:
    return f"{path}/unit_{number:05d}.safetensors"
