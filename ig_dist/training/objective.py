"""The training objective on a batch of stored latents, and the validation loss at fixed times and noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ig_dist.background import in_turn
from ig_dist.config import Config
from ig_dist.config.training import LossConfig
from ig_dist.data.cache import BlockCache
from ig_dist.data.index import IndexFile, ShardIndex
from ig_dist.data.latents import check_latents, model_latents
from ig_dist.data.reader import Samples, ShardReader
from ig_dist.data.stream import Batch
from ig_dist.diffusion.loss import accelerated_target, head_difference, ig_loss
from ig_dist.diffusion.path import Path, logit_normal, resolve_shift, shift_time
from ig_dist.errors import DataError, Ending
from ig_dist.models.dit import DiTOutput
from ig_dist.parallel.agreement import Awaited
from ig_dist.parallel.dist import Dist, StopFlag, sum_over_ranks
from ig_dist.rng import Purpose, bernoulli, normal, uniform
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import REQUEST_BYTES
from ig_dist.training.ema import EMA

VALIDATION_SAMPLES = 4096
VALIDATION_SEED = 0  # not the run's: the loss must be comparable over runs

Model = Callable[[Tensor, Tensor, Tensor], DiTOutput]


class Task(NamedTuple):
    """What the model is asked of a micro-batch, on the device, and the velocity to answer with."""

    x_t: Tensor
    t: Tensor
    labels: Tensor
    velocity: Tensor
    acceleration: Tensor
    """Weight of training acceleration of each sample, (rows,)."""


def training_task(batch: Batch, config: Config, info: IndexFile, device: torch.device) -> Task:
    """Noise a micro-batch. All randomness is keyed by (seed, position)."""
    seed = config.run.seed
    positions = batch.positions.to(device, non_blocking=True)
    stored = batch.latents.to(device, non_blocking=True)
    posterior = check_latents(info.latent, config.data.posterior, config.data.flip)
    latents = model_latents(stored, info.latent, posterior=posterior, seed=seed, positions=positions)
    t = training_times(config.loss, seed, positions, info.latent.shape)
    low, high = config.loss.acceleration.interval
    acceleration = config.loss.acceleration.weight * ((low <= t) & (t <= high)).float()
    noise = normal(seed, Purpose.NOISE, positions, info.latent.shape)
    dropped = bernoulli(seed, Purpose.LABEL_DROP, positions, config.loss.label_drop)
    labels = batch.labels.to(device, non_blocking=True).masked_fill(dropped, len(info.classes))
    x_t, velocity = Path(config.loss.path).interpolate(latents, noise, t.float())
    return Task(x_t, t.float(), labels, velocity, acceleration)


def training_times(loss: LossConfig, seed: int, positions: Tensor, latent_shape: Sequence[int]) -> Tensor:
    """Times of the samples at these positions of a run, (rows,) float64, as the config has them."""
    if loss.time == "uniform":
        t = uniform(seed, Purpose.TIME, positions)
    else:
        t = logit_normal(normal(seed, Purpose.TIME, positions, ()), loss.time_mean, loss.time_std)
    return shift_time(t, resolve_shift(loss.time_shift, latent_shape))


def training_loss(model: Model, task: Task, config: Config, *, step: int, difference: Tensor | None = None) -> Tensor:
    """Losses (total, final, aux, cosine) of a micro-batch, (4, rows).

    Args:
        model: in training.
        task: of the micro-batch.
        config: the run's.
        step: batches that were consumed before this one.
        difference: of the EMA's heads, where training acceleration takes it from there, see ``ema_differences``.
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


@torch.no_grad()
def ema_differences(model: Model, ema: EMA, tasks: Sequence[Task], config: Config, *, step: int) -> list[Tensor | None]:
    """v_final - v_aux of the first EMA for each micro-batch; None where the step needs no such thing. COLLECTIVE.

    Before any forward pass of the step: the weights may not change between a forward and its backward. ``model`` is
    called past the engine's own forward, which would wait for a backward pass.
    """
    if not accelerates(config, step) or config.loss.acceleration.source != "ema":
        return [None] * len(tasks)
    with ema.swapped_in(config.ema.decays[0]):
        return [head_difference(model(task.x_t, task.t, task.labels)) for task in tasks]


def open_reader(index: ShardIndex, config: Config) -> ShardReader:
    """The run's way to read samples: what damage, faults and hangs get, and the node's cache."""
    data = config.data
    cache = BlockCache(data.cache_dir, data.cache_bytes, index) if data.cache_dir else None
    return ShardReader(index, data.on_corrupt, patience=Patience(data.stall_s, data.retry_s), cache=cache)


@torch.no_grad()
def validation_loss(
    model: Model, index: ShardIndex, config: Config, reader: ShardReader, batch_size: int, dist: Dist, stop: StopFlag
) -> list[float]:
    """Losses (total, final, aux, cosine) over the first samples of the held-out shards, but damaged ones. COLLECTIVE.

    Sample i of n has time (i + 0.5) / n, noise keyed by i and the plain velocity as its target, whatever the run, so
    the numbers of two runs with the same held-out shards differ by their weights only. Every rank reads its own
    samples, a request's worth at a time, and makes the same number of forward passes.

    Raises:
        Ending: a rank cannot read its samples, or is asked to stop while it waits for them.
    """
    info = index.info.latent
    first = index.num_samples - sum(index.shard_sizes[-config.data.validation_shards :])
    count = min(VALIDATION_SAMPLES, index.num_samples - first)
    per_rank = -(-count // dist.world_size)
    mine = torch.arange(dist.rank * per_rank, (dist.rank + 1) * per_rank)
    at_once = batch_size * max(1, REQUEST_BYTES // (batch_size * info.stored_bytes))
    chunks = [mine[start : start + at_once] for start in range(0, per_rank, at_once)]

    def read(numbers: Tensor) -> tuple[int, Samples, NDArray[np.bool_]]:
        begin, end = (min(int(number), count - 1) for number in (numbers[0], numbers[-1]))
        latents, good = reader.read_ids(first + begin, first + end + 1)
        latents[~good] = 0  # they do not count, and must not be NaN
        return begin, latents, good

    arriving = Awaited(in_turn(partial(read, chunk) for chunk in chunks), stop, dist, finish=True)
    total = torch.zeros(5, dtype=torch.float64)
    for chunk in chunks:
        begin, latents, good = arriving.next(final=chunk is chunks[-1])
        for part in (chunk[start : start + batch_size] for start in range(0, len(chunk), batch_size)):
            ids = part.clamp(max=count - 1)  # past the end the last sample stands in and does not count
            at, numbers = (ids - begin).numpy(), ids.to(dist.device)
            labels = torch.from_numpy(index.table.label[first + ids.numpy()].astype(np.int64)).to(dist.device)
            stored = torch.from_numpy(latents[at]).to(dist.device)
            x = model_latents(stored, info, posterior="mean", seed=VALIDATION_SEED, positions=numbers)
            t = (numbers.float() + 0.5) / count
            noise = normal(VALIDATION_SEED, Purpose.VALIDATION_NOISE, numbers, info.shape)
            x_t, velocity = Path(config.loss.path).interpolate(x, noise, t)
            loss = config.loss
            losses = ig_loss(model(x_t, t, labels), velocity, loss.aux_weight, cosine_weight=loss.cosine_weight)
            counted = torch.from_numpy(good[at]) & (part < count)
            total += torch.cat([torch.stack(losses).cpu().double() * counted, counted[None]]).sum(dim=1)
    *sums, counts = sum_over_ranks(total, dist).tolist()
    if not counts:
        raise Ending(DataError(f"{index.folder}: all held-out samples are damaged: restore the shards"))
    return [value / counts for value in sums]
