"""Generating the units of a plan, by any number of workers, and collecting them.

No locks: a worker walks the units from its own place on and skips those that exist. A unit's bytes are a function of
(plan, unit), so two workers that make the same one write the same file.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from ig_dist.data.latents import tokenizer_latents
from ig_dist.diffusion.guidance import guided_velocity
from ig_dist.diffusion.path import Path
from ig_dist.diffusion.samplers import NoiseFn, VelocityFn, dopri5, euler, euler_maruyama, heun, sde_grid, time_grid
from ig_dist.errors import DataError
from ig_dist.evaluation.plan import Plan, image_numbers
from ig_dist.export import ExportInfo, ModelInfo
from ig_dist.latents.tokenizer import Tokenizer
from ig_dist.models.dit import DiT, DiTOutput
from ig_dist.rng import Purpose, normal
from ig_dist.storage.files import open_url, write_whole

Images = NDArray[np.uint8]  # (N, H, W, channels)
Labels = NDArray[np.int64]  # (N,)
Work = NDArray[np.int64]  # (N, 3): velocity evaluations, and forward passes of the model and of the second one
DECODED_AT_ONCE = 16  # an autoencoder's activations are far larger than the model's


class Unit(NamedTuple):
    """What one file holds."""

    images: Images
    labels: Labels
    work: Work


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
    weak: ExportInfo | None = None
    """Of the second model, where guidance has an auto term."""


def generate_units(
    model: DiT,
    info: ModelInfo,
    plan: Plan,
    url: str,
    tokenizer: Tokenizer,
    *,
    weak_model: DiT | None = None,
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
        weak_model: the second model of auto guidance, likewise.
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
            unit = make_unit(model, info, plan, number, tokenizer, on_progress, weak_model=weak_model)
            write_whole(fs, _unit_path(path, number), safetensors.numpy.save(unit._asdict()))
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
    *,
    weak_model: DiT | None = None,
) -> Unit:
    """One unit, batch by batch; arguments as for ``generate_units``."""
    unit = plan.unit(number)
    parts = []
    for start in range(unit.start, unit.stop, plan.batch_size):
        numbers = image_numbers(range(start, min(start + plan.batch_size, unit.stop)), model.pos_embed.device)
        batch_labels = plan.image_labels(numbers)
        images, work = generate(model, info, plan, numbers, batch_labels, tokenizer, weak_model)
        parts.append(Unit(images.cpu().numpy(), batch_labels.cpu().numpy(), np.tile(np.array(work), (len(images), 1))))
        on_progress(int(numbers[-1]) + 1 - unit.start)
    return Unit(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def generate(
    model: DiT,
    info: ModelInfo,
    plan: Plan,
    numbers: Tensor,
    labels: Tensor,
    tokenizer: Tokenizer,
    weak_model: DiT | None = None,
) -> tuple[Tensor, tuple[int, int, int]]:
    """Images (B, H, W, channels) uint8 of the plan's image numbers (B,), and the work that each took (see ``Work``)."""
    shape = info.latent.shape
    counted, weak = _Counted(model), None if weak_model is None else _Counted(weak_model)
    guided, evaluations = guided_velocity(counted, labels, plan.terms(), weak), 0

    def velocity(x: Tensor, t: float) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return guided(x, t)

    def noise(step: int, x: Tensor) -> Tensor:
        return normal(plan.seed, Purpose.SAMPLE_STEP, numbers, shape, step=step)

    x = normal(plan.seed, Purpose.SAMPLE_NOISE, numbers, shape).double()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
        x = solve(plan, velocity, x, Path(info.path), noise)
    latents = tokenizer_latents(x, info.latent)
    images = torch.cat([tokenizer.decode(part) for part in torch.split(latents, DECODED_AT_ONCE)])
    forwards = [0 if model is None else model.rows // len(numbers) for model in (counted, weak)]
    return images, (evaluations, forwards[0], forwards[1])


def solve(plan: Plan, velocity: VelocityFn, x: Tensor, path: Path, noise: NoiseFn) -> Tensor:
    """From noise x (B, C, H, W), the state at t = 1, to latents, by the plan's solver on its grid."""
    if plan.solver == "euler":
        return euler(velocity, x, time_grid(plan.steps, plan.time_shift))
    if plan.solver == "heun":
        grid = time_grid(plan.steps, plan.time_shift)
        return heun(velocity, x, grid, correct_last_step=plan.correct_last_step)
    if plan.solver == "dopri5":
        return dopri5(velocity, x, rtol=plan.rtol, atol=plan.atol)
    return euler_maruyama(velocity, x, sde_grid(plan.steps), path, noise)


class _Counted:
    """A model, and the rows that went through it."""

    def __init__(self, model: DiT) -> None:
        self._model, self.rows = model, 0
        self.null_label, self.has_aux_head = model.null_label, model.has_aux_head

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> DiTOutput:
        self.rows += len(labels)
        output: DiTOutput = self._model(x_t, t, labels)
        return output


def read_units(plan: Plan, url: str) -> Iterator[Unit]:
    """The units in order.

    Raises:
        DataError: a unit is missing or damaged.
    """
    fs, path = open_url(url, "sample.url")
    for number in range(plan.num_units):
        try:
            unit = safetensors.numpy.load(fs.cat_file(_unit_path(path, number)))
            whole = Unit(unit["images"], unit["labels"], unit["work"])
        except FileNotFoundError:
            raise DataError(
                f"{url}: unit {number} of {plan.num_units} is missing: run the same sampling again"
            ) from None
        except (KeyError, safetensors.SafetensorError):
            raise DataError(
                f"{_unit_path(path, number)} is damaged: delete it and run the same sampling again"
            ) from None
        yield whole


def collect(plan: Plan, url: str) -> tuple[Images, Labels]:
    """All images of a plan, in order, and ``samples.npz`` beside the units (arr_0 images, arr_1 labels, as ADM's)."""
    units = list(read_units(plan, url))
    images, labels, _ = (np.concatenate(column) for column in zip(*units, strict=True))
    fs, path = open_url(url, "sample.url")
    temporary = f"{path}/samples.npz.{uuid.uuid4().hex}.tmp"
    with fs.open(temporary, "wb") as file:
        np.savez(file, images, labels)
    fs.mv(temporary, f"{path}/samples.npz")
    return images, labels


def _unit_path(path: str, number: int) -> str:
    return f"{path}/unit_{number:05d}.safetensors"
