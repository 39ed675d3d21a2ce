"""The training objective on a batch of stored latents, and the validation loss at fixed times and noise."""

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ig_dist.arithmetic import compiled
from ig_dist.config import Config
from ig_dist.config.training import LossConfig
from ig_dist.data.cache import BlockCache
from ig_dist.data.index import IndexFile, ShardIndex
from ig_dist.data.latents import check_latents, model_latents, normalisation, normalised
from ig_dist.data.reader import Samples, ShardReader
from ig_dist.data.stream import Batch
from ig_dist.diffusion.loss import accelerated_target, head_difference, ig_loss
from ig_dist.diffusion.path import Path, logit_normal, resolve_shift, shift_time
from ig_dist.errors import ConfigError, DataError, Ending
from ig_dist.models.dit import DiTOutput
from ig_dist.parallel.agreement import Awaited
from ig_dist.parallel.dist import Dist, StopFlag, sum_over_ranks
from ig_dist.rng import Draws, Purpose, Words, normal, to_normal, to_uniform
from ig_dist.storage.background import in_turn
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import REQUEST_BYTES
from ig_dist.this_process import host

VALIDATION_SAMPLES = 4096
VALIDATION_SEED = 0  # not the run's: the loss must be comparable over runs

Model = Callable[[Tensor, Tensor, Tensor], DiTOutput]


class Task(NamedTuple):
    """What the model is asked of a micro-batch, on the device, and the velocity to answer with."""

    x_t: Tensor
    t: Tensor
    labels: Tensor
    velocity: Tensor
    acceleration: Tensor  # weight of training acceleration of each sample, (rows,)


class TaskMaker:
    """Makes tasks of micro-batches, all of one size. All randomness is keyed by (seed, position).

    What is the same in every step is on the device once: to make it of Python's numbers would wait for a GPU. With
    ``train.compile`` the draws are compiled, which changes no bit of them.
    """

    def __init__(self, config: Config, info: IndexFile, device: torch.device) -> None:
        self._loss, self._info, self._device = config.loss, info, device
        self._affine = normalisation(info.latent, device)
        numbers = math.prod(info.latent.shape)
        wanted = {Purpose.NOISE: numbers, Purpose.TIME: 1, Purpose.LABEL_DROP: 1}
        if check_latents(info.latent, config.data.posterior, config.data.flip) == "draw":
            wanted[Purpose.POSTERIOR] = numbers
        self._words = Draws(config.run.seed, wanted, device)
        self._drawn = compiled(self._draw, dynamic=False) if config.train.compile else self._draw

    def __call__(self, batch: Batch) -> Task:
        """The task of a micro-batch."""
        stored, labels, positions = (
            column.to(self._device, non_blocking=True) for column in (batch.latents, batch.labels, batch.positions)
        )
        noise, posterior, t, dropped = self._drawn(positions)
        latents = normalised(stored, posterior, self._info.latent, self._affine)
        low, high = self._loss.acceleration.interval
        acceleration = self._loss.acceleration.weight * ((low <= t) & (t <= high)).float()
        t = t.float()
        x_t, velocity = Path(self._loss.path).interpolate(latents, noise, t)
        return Task(x_t, t, labels.masked_fill(dropped, len(self._info.classes)), velocity, acceleration)

    def _draw(self, positions: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Noise, posterior's noise, times in float64, and whose label is dropped."""
        words, shape = self._words(positions), self._info.latent.shape
        posterior = to_normal(words[Purpose.POSTERIOR], shape) if Purpose.POSTERIOR in words else None
        return (
            to_normal(words[Purpose.NOISE], shape),
            posterior,
            training_times(self._loss, words[Purpose.TIME], shape),
            to_uniform(words[Purpose.LABEL_DROP]) < self._loss.label_drop,
        )


def training_times(loss: LossConfig, words: Words, latent_shape: Sequence[int]) -> Tensor:
    """Times, (rows,) float64, that the config makes of the words of ``Purpose.TIME``."""
    uniform = loss.time == "uniform"
    t = to_uniform(words) if uniform else logit_normal(to_normal(words), loss.time_mean, loss.time_std)
    return shift_time(t, resolve_shift(loss.time_shift, latent_shape))


def training_loss(model: Model, task: Task, config: Config, *, step: int, difference: Tensor | None = None) -> Tensor:
    """Losses (total, final, aux, cosine) of a micro-batch, (4, rows); ``step`` batches were consumed before.

    Where training acceleration takes the difference of the heads from the EMA, it is ``difference``.
    """
    output = model(task.x_t, task.t, task.labels)
    target = None
    if accelerates(config, step):
        found = head_difference(output) if difference is None else difference
        target = accelerated_target(task.velocity, found, task.acceleration)
    loss = config.loss
    return torch.stack(
        ig_loss(output, task.velocity, loss.aux_weight, cosine_weight=loss.cosine_weight, final_target=target)
    )


def accelerates(config: Config, step: int) -> bool:
    """Whether training acceleration is on in the step before which ``step`` batches were consumed."""
    acceleration = config.loss.acceleration
    return acceleration.weight > 0 and step >= acceleration.start_step


def open_reader(index: ShardIndex, config: Config) -> ShardReader:
    """The run's way to read samples: what damage, faults and hangs get, and the node's cache."""
    data = config.data
    folder = os.path.expandvars(data.cache_dir)  # as the node has them, $SLURM_TMPDIR for one
    if "$" in folder:
        raise ConfigError(f"data.cache_dir {folder}: there is no such variable on {host()}")
    cache = BlockCache(folder, data.cache_bytes, index) if folder else None
    return ShardReader(index, data.on_corrupt, patience=Patience(data.stall_s, data.retry_s), cache=cache)


@torch.no_grad()
def validation_loss(
    model: Model, index: ShardIndex, config: Config, reader: ShardReader, batch_size: int, dist: Dist, stop: StopFlag
) -> list[float]:
    """Losses (total, final, aux, cosine) over the first samples of the held-out shards, but damaged ones. COLLECTIVE.

    Sample i of n has time (i + 0.5) / n, noise keyed by i and the plain velocity as its target, whatever the run, so
    the numbers of two runs with the same held-out shards differ by their weights only. Every rank reads its own
    samples, a request's worth at a time, and makes the same number of forward passes. Raises as ``Awaited.next``.
    """
    info = index.info.latent
    first = index.num_samples - sum(index.shard_sizes[-config.data.validation_shards :])
    count = min(VALIDATION_SAMPLES, index.num_samples - first)
    per_rank = -(-count // dist.world_size)
    mine = torch.arange(dist.rank * per_rank, (dist.rank + 1) * per_rank)
    at_once = batch_size * max(1, REQUEST_BYTES // (batch_size * info.stored_bytes))
    chunks = [mine[start : start + at_once] for start in range(0, per_rank, at_once)]

    def read(numbers: Tensor) -> tuple[int, Samples, NDArray[np.bool_], NDArray[np.int64]]:
        begin, end = (min(int(number), count - 1) for number in (numbers[0], numbers[-1]))
        latents, good = reader.read_ids(first + begin, first + end + 1)
        latents[~good] = 0  # they do not count, and must not be NaN
        return begin, latents, good, reader.table.label[first + begin : first + end + 1].astype(np.int64)

    arriving = Awaited(in_turn(partial(read, chunk) for chunk in chunks), stop, dist, finish=True)
    total = torch.zeros(5, dtype=torch.float64)
    for chunk in chunks:
        begin, latents, good, classes = arriving.next(final=chunk is chunks[-1])
        for part in (chunk[start : start + batch_size] for start in range(0, len(chunk), batch_size)):
            ids = part.clamp(max=count - 1)  # past the end the last sample stands in and does not count
            at, numbers = (ids - begin).numpy(), ids.to(dist.device)
            stored, labels = (torch.from_numpy(column[at]).to(dist.device) for column in (latents, classes))
            x = model_latents(stored, info, posterior="mean", seed=VALIDATION_SEED, positions=numbers)
            t = (numbers.float() + 0.5) / count
            noise = normal(VALIDATION_SEED, Purpose.VALIDATION_NOISE, numbers, info.shape)
            loss = config.loss
            x_t, velocity = Path(loss.path).interpolate(x, noise, t)
            losses = ig_loss(model(x_t, t, labels), velocity, loss.aux_weight, cosine_weight=loss.cosine_weight)
            counted = torch.from_numpy(good[at]) & (part < count)
            total += torch.cat([torch.stack(losses).cpu().double() * counted, counted[None]]).sum(dim=1)
    *sums, counts = sum_over_ranks(total, dist).tolist()
    if not counts:
        raise Ending(DataError(f"{index.folder}: all held-out samples are damaged: restore the shards"))
    return [value / counts for value in sums]
