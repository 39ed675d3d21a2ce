"""The configuration: typed groups with a description per field, and what two fields say together.

How files and overrides become a ``Config`` is in ``file.py``.
"""

import math
from typing import Self

from pydantic import Field, model_validator

from ig_dist.config.model import ModelConfig
from ig_dist.config.sampling import EvaluateConfig, SampleConfig
from ig_dist.config.training import (
    CheckpointConfig,
    DataConfig,
    EMAConfig,
    EngineConfig,
    LogConfig,
    LossConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from ig_dist.config.types import Group
from ig_dist.diffusion.guidance import GuidanceTerm, check_overlap
from ig_dist.errors import ConfigError


class Config(Group):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guidance: list[GuidanceTerm] = Field(default_factory=list)
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _cross_fields(self) -> Self:
        if not self.data.index:
            raise ValueError("data.index is empty: give the folder that ig-dist encode wrote")
        batch, streams = self.train.global_batch_size, self.data.streams
        if batch % streams:
            raise ValueError(
                f"train.global_batch_size {batch} is not a multiple of data.streams {streams}:"
                f" use data.streams={math.gcd(batch, streams)}"
                f" or train.global_batch_size={math.ceil(batch / streams) * streams}"
            )
        check_overlap(self.guidance)
        active = {term.kind for term in self.guidance if term.scale != 1}
        if "cfg" in active and not self.loss.label_drop:
            raise ValueError("guidance asks for cfg, but no label is ever dropped: set loss.label_drop=0.1")
        if self.run.fork_from and self.train.init_from:
            raise ValueError("run.fork_from and train.init_from both say where to begin: give one of them")
        if self.log.validate_every_steps and not self.data.validation_shards:
            raise ValueError("log.validate_every_steps needs held-out shards: set data.validation_shards=1 or more")
        if self.optimizer.kind == "muon" and self.engine.kind == "deepspeed":
            raise ValueError(
                "optimizer.kind=muon needs whole matrices, and DeepSpeed cuts them anywhere:"
                " use engine.kind=fsdp2 or ddp, or optimizer.kind=adamw"
            )
        if self.optimizer.implementation == "apex" and (
            self.optimizer.kind != "adamw" or self.engine.kind == "deepspeed"
        ):
            raise ValueError(
                f"optimizer.implementation=apex is for adamw under ddp and fsdp2, not for {self.optimizer.kind} under"
                f" {self.engine.kind}: use optimizer.implementation=fused"
            )
        if "auto" in active and not self.sample.weak_model:
            raise ValueError(
                "guidance asks for auto, but there is no second model: set sample.weak_model=RUN, or RUN@STEP of an"
                " earlier checkpoint"
            )
        if self.loss.acceleration.weight and self.model.aux_depth is None:
            raise ValueError(
                "loss.acceleration needs the auxiliary head: set model.aux_depth, or loss.acceleration.weight=0"
            )
        if "ig" in active and self.model.aux_depth is None:
            raise ValueError("guidance asks for ig, but the model has no auxiliary head: set model.aux_depth")
        return self

    def warnings(self) -> list[str]:
        """What is allowed, and likely a mistake; a line each."""
        aux, depth = self.model.aux_depth, self.model.depth
        assert depth is not None
        if aux is None or 2 * aux <= depth:
            return []
        return [
            f"model.aux_depth {aux} is beyond half of the {depth} blocks, where the paper found the auxiliary head"
            f" harmful (SiT-B/2 after block 8 of 12: FID 38.05 instead of 30.60): use {max(1, depth // 3)} or so"
        ]

    def with_data(self, latent_shape: tuple[int, int, int], num_classes: int) -> Self:
        """A copy whose model has the shapes of the data.

        Raises:
            ConfigError: the config asks for other shapes than the data has, or the patch does not fit.
        """
        channels, height, width = latent_shape
        found = {"in_channels": channels, "input_size": height, "num_classes": num_classes}
        for name, value in found.items():
            asked = getattr(self.model, name)
            if asked is not None and asked != value:
                raise ConfigError(f"model.{name} is {asked}, the data at {self.data.index} has {value}: remove the key")
        if height != width:
            raise ConfigError(f"the latents at {self.data.index} are {height}x{width}: only square ones are supported")
        model = self.model.model_copy(update=found)
        try:
            model.to_dit()
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None
        return self.model_copy(update={"model": model})

    def total_steps(self, num_samples: int) -> int:
        """Steps of the whole run."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.epochs is not None
        return math.ceil(self.train.epochs * num_samples / self.train.global_batch_size)

    def micro_batch(self, world_size: int) -> int:
        """Rows of a micro-batch on each of so many ranks."""
        return self.train.global_batch_size // world_size // self.train.accumulation

    def check_world_size(self, world_size: int, per_node: int | None = None) -> None:
        """Raise ConfigError unless ``world_size`` processes, ``per_node`` of them a machine, can share the work.

        That is the streams, the batch, and the model where the engine cuts it.
        """
        streams, batch, accumulation = (self.data.streams, self.train.global_batch_size, self.train.accumulation)
        if streams % world_size:
            allowed = [n for n in range(1, streams + 1) if streams % n == 0]
            raise ConfigError(
                f"{world_size} processes do not divide data.streams {streams}:"
                f" use {', '.join(map(str, allowed))} processes, or another data.streams in a new run"
            )
        if (batch // world_size) % accumulation:
            raise ConfigError(
                f"train.accumulation {accumulation} does not divide the {batch // world_size} images that each of"
                f" {world_size} processes has of train.global_batch_size {batch}:"
                f" use train.accumulation={math.gcd(batch // world_size, accumulation)}"
            )
        layouts = _layouts(world_size, per_node or world_size)
        if self.engine.replicate not in layouts:
            machines = "" if per_node is None else f", {per_node} on each machine,"
            raise ConfigError(
                f"engine.replicate {self.engine.replicate} does not cut {world_size} processes{machines} into equal"
                f" groups that fit the machines: use engine.replicate={' or '.join(map(str, layouts))}"
            )


def _layouts(world_size: int, per_node: int) -> list[int]:
    """Numbers of groups of neighbours that have whole machines, or share one with other whole groups."""
    groups = [n for n in range(1, world_size + 1) if world_size % n == 0]
    return [n for n in groups if n == 1 or per_node % (world_size // n) == 0 or (world_size // n) % per_node == 0]
