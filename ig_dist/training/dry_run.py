"""What a training run will take, told before it starts: parameters, FLOPs, memory on each GPU, steps, days.

Nothing is allocated: shapes are traced on fake tensors. The state is counted exactly, activations are what autograd
keeps of one image; what the allocator, kernels and libraries need beside it (some 2 GiB on a GPU) is not in here.
"""

from functools import lru_cache
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ig_dist.config import Config
from ig_dist.data.index import read_index
from ig_dist.errors import ConfigError
from ig_dist.models.dit import DiT, DiTConfig, count_parameters
from ig_dist.models.presets import forward_flops
from ig_dist.parallel.deepspeed import BUCKET_ELEMENTS
from ig_dist.terminal import console

IMAGENET_IMAGES, IMAGENET_CLASSES, SD_LATENT = 1_281_167, 1000, (4, 32, 32)
GIB = 2**30
PER_NODE = 8  # GPUs
ENGINES = ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")


def dry_run(config: Config, *, gpus: int, mfu: float, peak_tflops: float) -> dict[str, Any]:
    """What the run will take on ``gpus`` GPUs.

    Raises:
        ConfigError: the config does not fit so many processes, or not the data.
    """
    try:
        index = read_index(config.data.index)
        shape, classes, images = index.info.latent.shape, len(index.info.classes), index.num_samples
    except ConfigError:  # there may be no data yet
        index, (channels, side, _) = None, SD_LATENT
        shape = (config.model.in_channels or channels, *2 * (config.model.input_size or side,))
        classes, images = config.model.num_classes or IMAGENET_CLASSES, IMAGENET_IMAGES
    config = config.with_data(shape, classes)
    config.check_world_size(gpus, min(PER_NODE, gpus))
    model, batch = config.model.to_dit(), config.train.global_batch_size
    parameters, moments = count_state(model, config)
    acceleration = config.loss.acceleration
    passes = 3  # backward costs twice the forward
    passes += bool(acceleration.weight and acceleration.source == "ema") + config.train.activation_checkpointing
    flops, steps, micro = passes * forward_flops(model), config.total_steps(images), config.micro_batch(gpus)
    return {
        "index": config.data.index,
        "assumed_imagenet": index is None,
        "samples": images,
        "latent_shape": list(shape),
        "classes": classes,
        "parameters": parameters,
        "flops_per_image": flops,
        "steps": steps,
        "epochs": steps * batch / images,
        "global_batch_size": batch,
        "micro_batch_size": micro,
        "accumulation": config.train.accumulation,
        "gpus": gpus,
        "gpus_per_node": min(PER_NODE, gpus),
        "replicate": groups_of(config, gpus),
        "mfu": mfu,
        "peak_tflops": peak_tflops,
        "seconds": steps * batch * flops / (gpus * peak_tflops * 1e12 * mfu),
        "engines": {
            engine: memory_per_gpu(engine, model, parameters, moments, config, gpus, micro)
            | sent_per_gpu(engine, parameters, moments, config, gpus)
            for engine in engines_of(config, gpus)
        },
    }


def print_dry_run(told: dict[str, Any]) -> None:
    """Print what ``dry_run`` says as lines and a table."""
    assumed = f"{told['index']}: no index there, so ImageNet is assumed: " if told["assumed_imagenet"] else ""
    shape = "x".join(map(str, told["latent_shape"]))
    console.print(f"{assumed}{told['samples']:,} samples of {shape}, {told['classes']} classes")
    console.print(
        f"{told['parameters']:,} parameters, {told['flops_per_image'] / 1e9:.1f} GFLOP a training image"
        " (2 per multiply-accumulate)"
    )
    console.print(
        f"{told['steps']:,} steps of {told['global_batch_size']} images ({told['epochs']:.1f} epochs):"
        f" {told['gpus']} GPUs x {told['micro_batch_size']} images x {told['accumulation']} micro-batches"
    )
    seconds, gpus = told["seconds"], told["gpus"]
    console.print(
        f"{seconds / 86400:.2f} days on {gpus} GPUs at {told['mfu']:.0%} of {told['peak_tflops']:g} TFLOP/s"
        f" ({seconds * gpus / 3600:,.0f} GPU hours)"
    )
    columns = ("engine", "state", "working", "activations", "total", "sent a step", "between nodes")
    nodes = f" ({told['gpus_per_node']} GPUs a node)" if gpus > told["gpus_per_node"] else ""
    table = Table(*columns, title=f"GiB of each GPU: memory, and what it sends{nodes}", title_justify="left")
    for engine, sizes in told["engines"].items():
        table.add_row(engine, *(f"{size / GIB:.2f}" for size in sizes.values()))
    console.print(table)
    if told["replicate"] > 1:
        console.print(f"hsdp: engine.kind=fsdp2 engine.replicate={told['replicate']}")


def engines_of(config: Config, gpus: int) -> tuple[str, ...]:
    """Engines that the config could run under."""
    engines = ENGINES[: 3 if config.optimizer.kind == "muon" else None]
    return tuple(engine for engine in engines if engine != "hsdp" or groups_of(config, gpus) > 1)


def groups_of(config: Config, gpus: int) -> int:
    """Groups that HSDP would hold everything in: those of the config, else the machines."""
    return config.engine.replicate if config.engine.replicate > 1 else max(1, gpus // PER_NODE)


def count_state(model: DiTConfig, config: Config) -> tuple[int, int]:
    """Numbers of the model's parameters, and of what the optimizer keeps: Adam two a parameter, Muon one a matrix."""
    with torch.device("meta"):
        built = DiT(model)
    parameters, vectors = count_parameters(built), sum(p.numel() for p in built.parameters() if p.ndim < 2)
    return parameters, parameters + vectors if config.optimizer.kind == "muon" else 2 * parameters


def memory_per_gpu(
    engine: str, model: DiTConfig, parameters: int, moments: int, config: Config, gpus: int, micro: int
) -> dict[str, int]:
    """Bytes on each GPU under one of ``ENGINES``, of ``micro`` images in a pass.

    The state, between a backward pass and its step: weights, gradients, moments and averages, fp32 under every engine,
    ours of ZeRO too; a test holds it against memory measured under each. Working: copies of weights that a pass makes,
    and buffers.
    """
    bf16 = config.train.precision == "bf16"
    cast = 2 * parameters if bf16 else 0  # autocast's copies, for the backward pass
    kept = 4 * parameters * (1 + len(config.ema.decays)) + 4 * moments
    accumulated = 4 * parameters if config.train.accumulation > 1 else 0
    size = gpus // groups_of(config, gpus)
    state = {
        "ddp": kept + 4 * parameters,
        "fsdp2": (kept + 4 * parameters) // gpus,
        "hsdp": (kept + 4 * parameters) // size,
        "zero1": 4 * parameters + (kept + 4 * parameters) // gpus,  # the weights are whole beside their masters
        "zero2": 4 * parameters + (kept + 4 * parameters) // gpus,
        "zero3": (kept + 8 * parameters) // gpus,  # what is gathered from lies beside the masters
    }[engine]
    block = -(-parameters // model.depth)
    gathered = (2 if bf16 else 4) * (parameters if config.engine.reshard_after_forward is False else 2 * block)
    working = {
        "ddp": cast,
        # the block in use and the next one; and gradients, which are shared out after the last micro-batch
        "fsdp2": gathered + accumulated * (gpus - 1) // gpus,
        "hsdp": gathered,
        "zero1": cast + 4 * parameters,  # gradients, until they are shared out
        "zero2": cast + 4 * BUCKET_ELEMENTS,
        "zero3": (8 + 2 * bf16) * block + 4 * BUCKET_ELEMENTS,
    }[engine]
    kept_of_image = activation_bytes(model, bf16)
    if config.train.activation_checkpointing:  # the input of each block, and what is kept of the one computed again
        tokens = (model.input_size // model.patch_size) ** 2
        kept_of_image = kept_of_image // model.depth + 4 * model.depth * tokens * model.hidden_size
    activations = micro * kept_of_image
    memory = {"state_bytes": state, "working_bytes": working, "activation_bytes": activations}
    return {**memory, "total_bytes": sum(memory.values())}


def sent_per_gpu(engine: str, parameters: int, moments: int, config: Config, gpus: int) -> dict[str, int]:
    """Bytes that each GPU sends in a step (rings: an all-reduce is a reduce-scatter and an all-gather).

    Gradients are reduced in fp32: by DDP, FSDP2 and ZeRO-1 once a step, by ZeRO-2 and 3 after each micro-batch, by HSDP
    within a group after each micro-batch and between groups once. FSDP2 gathers weights in the precision of the forward
    pass, ZeRO in fp32: for each micro-batch twice, or once where FSDP2 keeps them. Of Muon ranks exchange the matrices.
    """
    low, micro = 2 if config.train.precision == "bf16" else 4, config.train.accumulation
    gathers = 1 if config.engine.reshard_after_forward is False else 2
    matrices = 2 * parameters - moments  # that Muon makes orthogonal; Adam none
    if engine == "hsdp":
        groups = groups_of(config, gpus)
        size = gpus // groups
        inside = parameters * (4 + low * gathers) * micro + 8 * matrices // gpus
        outside = (8 * parameters + 4 * matrices) // size
        rings = [(inside, size, PER_NODE), (outside, groups, max(1, PER_NODE // size))]
    else:
        payload = {
            "ddp": (4 + 4) * parameters + 4 * matrices,
            "fsdp2": (4 + low * gathers * micro) * parameters + 8 * matrices // gpus,
            "zero1": (4 + 4) * parameters,
            "zero2": (4 * micro + 4) * parameters,
            "zero3": (4 * micro + 2 * 4 * micro) * parameters,
        }[engine]
        rings = [(payload, gpus, PER_NODE)]
    total = between = 0
    for payload, ranks, neighbours in rings:  # of neighbours one sends to the next node, and they take turns
        total += (sent := payload * (ranks - 1) // ranks)
        between += sent // neighbours if ranks > neighbours else 0
    return {"sent_bytes_per_step": total, "sent_between_nodes_bytes_per_step": between}


@lru_cache
def activation_bytes(model: DiTConfig, bf16: bool) -> int:
    """What autograd keeps of one image for the backward pass, in bytes. Traced on fake tensors."""
    return _saved_bytes(model, bf16, 2) - _saved_bytes(model, bf16, 1)  # what both have are casts of weights


def _saved_bytes(config: DiTConfig, bf16: bool, batch: int) -> int:
    with FakeTensorMode():
        model = DiT(config)
        weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        saved: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        size = config.input_size
        latents = torch.zeros(batch, config.in_channels, size, size)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            output = model(latents, torch.zeros(batch), torch.zeros(batch, dtype=torch.int64))
        assert output.velocity.shape == latents.shape  # and keeps the graph until here
    return sum(saved.values())
