"""The training objective on a batch of stored latents, and the validation loss at fixed times and noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ig_dist.config import Config
from ig_dist.data.cache import BlockCache
from ig_dist.data.index import IndexFile, ShardIndex
from ig_dist.data.latents import check_latents, model_latents
from ig_dist.data.reader import ShardReader
from ig_dist.data.stream import Batch
from ig_dist.diffusion.loss import ig_loss
from ig_dist.diffusion.path import Path
from ig_dist.errors import DataError
from ig_dist.models.dit import DiTOutput
from ig_dist.parallel.dist import Dist, sum_over_ranks
from ig_dist.rng import Purpose, bernoulli, normal, uniform
from ig_dist.storage import Patience

VALIDATION_SAMPLES = 4096
VALIDATION_SEED = 0  # not the run's: the loss must be comparable over runs

Model = Callable[[Tensor, Tensor, Tensor], DiTOutput]


def training_loss(model: Model, batch: Batch, config: Config, info: IndexFile, device: torch.device) -> Tensor:
    """Losses (total, final, aux) of a micro-batch, (3, rows). All randomness is keyed by (seed, position)."""
    seed = config.run.seed
    positions = batch.positions.to(device, non_blocking=True)
    stored = batch.latents.to(device, non_blocking=True)
    posterior = check_latents(info.latent, config.data.posterior, config.data.flip)
    latents = model_latents(stored, info.latent, posterior=posterior, seed=seed, positions=positions)
    t = uniform(seed, Purpose.TIME, positions).float()
    noise = normal(seed, Purpose.NOISE, positions, info.latent.shape)
    dropped = bernoulli(seed, Purpose.LABEL_DROP, positions, config.loss.label_drop)
    labels = batch.labels.to(device, non_blocking=True).masked_fill(dropped, len(info.classes))
    x_t, velocity = Path(config.loss.path).interpolate(latents, noise, t)
    return torch.stack(ig_loss(model(x_t, t, labels), velocity, config.loss.aux_weight))


def open_reader(index: ShardIndex, config: Config) -> ShardReader:
    """The run's way to read samples: what damage, faults and hangs get, and the node's cache."""
    data = config.data
    cache = BlockCache(data.cache_dir, data.cache_bytes, index) if data.cache_dir else None
    return ShardReader(index, data.on_corrupt, patience=Patience(data.stall_s, data.retry_s), cache=cache)


@torch.no_grad()
def validation_loss(model: Model, index: ShardIndex, config: Config, batch_size: int, dist: Dist) -> list[float]:
    """Losses (total, final, aux) over the held-out shards. COLLECTIVE.

    Sample i of n has time (i + 0.5) / n and noise keyed by i, whatever the run, so the numbers of two runs with the
    same held-out shards differ by their weights only. Every rank makes the same number of forward passes.
    """
    latents, labels = _held_out(index, config)
    count = len(labels)
    per_rank = -(-count // dist.world_size)
    mine = torch.arange(dist.rank * per_rank, (dist.rank + 1) * per_rank)
    total = torch.zeros(3, dtype=torch.float64)
    for start in range(0, per_rank, batch_size):
        part = mine[start : start + batch_size]
        counted = part < count  # past the end the last sample stands in and does not count
        ids = part.clamp(max=count - 1)
        stored, numbers = latents[ids].to(dist.device), ids.to(dist.device)
        info = index.info.latent
        x = model_latents(stored, info, posterior="mean", seed=VALIDATION_SEED, positions=numbers)
        t = (numbers.float() + 0.5) / count
        noise = normal(VALIDATION_SEED, Purpose.VALIDATION_NOISE, numbers, info.shape)
        x_t, velocity = Path(config.loss.path).interpolate(x, noise, t)
        losses = ig_loss(model(x_t, t, labels[ids].to(dist.device)), velocity, config.loss.aux_weight)
        total += (torch.stack(losses).cpu().double() * counted).sum(dim=1)
    return [float(value) / count for value in sum_over_ranks(total, dist)]


def _held_out(index: ShardIndex, config: Config) -> tuple[Tensor, Tensor]:
    """Stored latents and labels of the first samples of the held-out shards, without damaged ones."""
    reader, sizes = open_reader(index, config), index.shard_sizes
    first = len(sizes) - config.data.validation_shards
    latents, whole = [], []
    wanted = VALIDATION_SAMPLES
    for shard in range(first, len(sizes)):
        count = min(sizes[shard], wanted)
        found, good = reader.read(shard, 0, count)
        latents.append(found)
        whole.append(good)
        wanted -= count
    kept = np.concatenate(whole)
    if not kept.any():
        raise DataError(f"{index.folder}: every sample of the held-out shards is damaged: restore the shards")
    begin = sum(sizes[:first])
    labels = index.table.label[begin : begin + len(kept)].astype(np.int64)
    return torch.from_numpy(np.concatenate(latents)[kept]), torch.from_numpy(labels[kept])
