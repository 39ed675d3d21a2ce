"""What the benchmarks measure on: synthetic latents, models with random weights, the product's training step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ig_dist.config import Config
from ig_dist.data.index import IndexFile, LatentInfo, ShardInfo, Statistics, TokenizerInfo
from ig_dist.data.stream import Batch
from ig_dist.export import ExportInfo
from ig_dist.models.dit import DiT, DiTConfig, initialize
from ig_dist.parallel.build import build_engine
from ig_dist.parallel.dist import Dist
from ig_dist.training.learner import EMA
from ig_dist.training.objective import Task, TaskMaker, training_loss


def latent_info(channels: int, size: int, *, moments: bool = True) -> LatentInfo:
    """Of SD-VAE's means and deviations, or of one sample of a latent that is normalised already."""
    return LatentInfo(
        kind="moments" if moments else "sample",
        shape=(channels, size, size),
        dtype="float16",
        shift=[0.0] * channels,
        scale=[0.18215 if moments else 1.0] * channels,
    )


def synthetic_info(channels: int, size: int, num_classes: int, *, moments: bool = True) -> IndexFile:
    """What an index would say of latents of that shape."""
    return IndexFile(
        format="ig-dist-index/1",
        source="synthetic",
        seed=0,
        tokenizer=TokenizerInfo(name="pixel", sha256="", image_size=8 * size, image_channels=3),
        latent=latent_info(channels, size, moments=moments),
        classes=[str(i) for i in range(num_classes)],
        statistics=Statistics(mean=[0.0] * channels, std=[1.0] * channels),
        table_sha256="",
        shards=[ShardInfo(name="none", bytes=0, samples=1, sha256="")],
    )


def export_info(config: DiTConfig, tokenizer: TokenizerInfo | None = None) -> ExportInfo:
    """What stands beside exported weights of that model."""
    return ExportInfo(
        model=config,
        path="linear",
        latent=latent_info(config.in_channels, config.input_size, moments=False),
        tokenizer=tokenizer or TokenizerInfo(name="pixel", sha256="", image_size=256, image_channels=3),
        classes=[str(i) for i in range(config.num_classes)],
        trained_with_null_label=True,
        ema=None,
        step=0,
        images_seen=0,
        checkpoint_sha256="",
        weights_sha256="",
    )


def build_model(config: Config, info: IndexFile, device: torch.device) -> DiT:
    """As a run begins."""
    with device:
        model = DiT(config.with_data(info.latent.shape, len(info.classes)).model.to_dit())
    initialize(model, 0)
    return model


def build_draws(config: Config, info: IndexFile, dist: Dist) -> Callable[[], Task]:
    """A function that makes the task of a fixed batch: what a step does before the model."""
    rows = config.train.global_batch_size
    generator = torch.Generator().manual_seed(0)
    stored = torch.rand(rows, *info.latent.stored_shape, generator=generator).half()
    numbers = torch.arange(rows)
    columns = [stored, numbers % len(info.classes), numbers, numbers, numbers * 0]
    pinned = dist.device.type == "cuda"  # as a run's loader has them
    batch = Batch(*(column.pin_memory() if pinned else column for column in columns))
    return partial(TaskMaker(config, info, dist.device), batch)


def build_step(config: Config, info: IndexFile, dist: Dist, model: DiT | None = None) -> Callable[[], None]:
    """A function that makes one training step on a fixed batch: draws, loss, engine, fused optimizer, EMA."""
    engine = build_engine(model or build_model(config, info, dist.device), config, None, dist)
    ema = EMA(engine.masters(), config.ema.decays)
    draws = build_draws(config, info, dist)

    def step() -> None:
        task = draws()
        with engine.microbatch(last=True):
            engine.backward(training_loss(engine.module, task, config, step=0).mean(dim=1)[0])
        ema.update(engine.step(1e-4).finite)

    return step
