"""From a built model and a config to an engine that is ready for its first step.

Blocks that are compiled or computed again get another ``forward``, below their hooks: FSDP2 and DeepSpeed gather the
weights in hooks of the block, which must neither be compiled nor run again.
"""

import importlib.util
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ig_dist.arithmetic import compiled
from ig_dist.config import Config
from ig_dist.errors import ConfigError
from ig_dist.models.dit import DiT
from ig_dist.optim.optimizer import check_apex
from ig_dist.parallel.ddp import DDPEngine
from ig_dist.parallel.dist import Dist, align_timeouts, gather_objects
from ig_dist.parallel.engine import Engine, LoadedState
from ig_dist.terminal.extras import missing


def check_engine(config: Config) -> None:
    """Raise ConfigError unless the packages of engine and optimizer are installed."""
    if config.engine.kind == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise missing("deepspeed", "engine.kind=deepspeed needs", "use engine.kind=fsdp2")
    if config.optimizer.implementation == "apex":
        check_apex()


def build_engine(model: DiT, config: Config, state: LoadedState | None, dist: Dist) -> Engine:
    """Apply precision, compilation and checkpointing, then hand the model to the configured engine. COLLECTIVE.

    The model is initialised on the CPU, the same on every rank; or without memory, to be given the weights of
    ``state``, which goes in here because not every engine can take it later.
    """
    if config.engine.replicate > 1 and any(gather_objects(dist.rank % dist.local_world_size != dist.local_rank, dist)):
        raise ConfigError(
            "engine.replicate needs ranks that follow each other on the same machine, and these were dealt out over the"
            " machines in turn: start them with srun --distribution=block, or set engine.replicate=1"
        )
    if state is not None and config.engine.kind != "fsdp2":  # which takes its part by itself
        model.load_state_dict(state.whole("model"), assign=True)
    apply(model, config, dist.device)
    if config.engine.kind == "fsdp2":
        from ig_dist.parallel.fsdp2 import FSDP2Engine  # 1.3 s, for DTensor, that DDP need not wait for

        engine: Engine = FSDP2Engine(model, config, state, dist)
    elif config.engine.kind == "deepspeed":
        from ig_dist.parallel.deepspeed import DeepSpeedEngine

        engine = DeepSpeedEngine(model, config, dist)
    else:
        engine = DDPEngine(model, config, dist)
    if state is not None and state.optimizer_steps:
        engine.load_moments(state)
    if config.engine.kind == "ddp":
        warm_up(engine, model, config, dist)
    align_timeouts(dist)
    return engine


def apply(model: DiT, config: Config, device: torch.device) -> None:
    """What is done to the model before an engine takes it: precision, per-block compilation, checkpointing.

    Forward runs under bf16 autocast, the tokens between blocks in fp32 or bf16; weights stay fp32. Each block is
    compiled on its own: one graph for all of them, and no graph break is tolerated.
    """
    if config.train.precision == "bf16":
        model.residual = torch.bfloat16 if config.train.residual == "bf16" else None
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)  # type: ignore[method-assign]
    for block in model.blocks:
        assert isinstance(block, nn.Module)
        if config.train.compile:
            block.forward = compiled(block.forward)
        if config.train.activation_checkpointing:  # nothing in a block is random: no state is kept
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def warm_up(engine: Engine, model: DiT, config: Config, dist: Dist) -> None:
    """Forward and backward passes on zeros, gradients discarded.

    DDP orders its buckets anew after the first backward pass, and with three or more ranks the order decides how
    sums round: without two of them, the first step after a restart would differ from the same step without one.
    Compilation happens here too, before the first batch is waited for.
    """
    device, batch_size = dist.device, config.micro_batch(dist.world_size)
    size, channels = model.config.input_size, model.config.in_channels
    x = torch.zeros(batch_size, channels, size, size, device=device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
    for _ in range(2 if dist.world_size > 1 else int(config.train.compile)):
        with engine.microbatch(last=True):
            output = engine.module(x, torch.zeros(batch_size, device=device), labels)
            engine.backward(
                sum((v.float().sum() for v in output if v is not None), start=torch.zeros((), device=device))
            )
        for parameter in model.parameters():
            parameter.grad = None
