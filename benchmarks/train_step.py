"""A training step of a preset on synthetic latents: eager against per-block compile, auxiliary head on and off.

    python benchmarks/train_step.py --preset SiT-B/2 --aux-depth 4 --batch-size 64

The variants run in turn, round by round, in one process, so that a machine whose speed drifts slows all of them alike;
the table shows the median of the rounds and the median of the ratios to the first variant of the same round. The step
is the product's own: draws, engine, loss, fused AdamW, EMA. Absolute numbers mean something on a GPU only.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from ig_dist.config import Config
from ig_dist.config_file import config_from_tree
from ig_dist.data.index import IndexFile, LatentInfo, ShardInfo, Statistics, TokenizerInfo
from ig_dist.data.stream import Batch
from ig_dist.models.dit import DiT, initialize
from ig_dist.models.presets import forward_flops
from ig_dist.parallel.build import build_engine
from ig_dist.parallel.dist import Dist, init_distributed
from ig_dist.terminal import console, run_app
from ig_dist.training.ema import EMA
from ig_dist.training.metrics import model_flops_utilisation
from ig_dist.training.objective import Task, TaskMaker, training_loss


def synthetic_info(channels: int, size: int, num_classes: int) -> IndexFile:
    """What an index would say of latents of that shape."""
    return IndexFile(
        format="ig-dist-index/1",
        source="synthetic",
        seed=0,
        tokenizer=TokenizerInfo(name="pixel", sha256="", image_size=8 * size, image_channels=3),
        latent=LatentInfo(
            kind="moments",
            shape=(channels, size, size),
            dtype="float16",
            shift=[0.0] * channels,
            scale=[0.18215] * channels,
        ),
        classes=[str(i) for i in range(num_classes)],
        statistics=Statistics(mean=[0.0] * channels, std=[1.0] * channels),
        table_sha256="",
        shards=[ShardInfo(name="none", bytes=0, samples=1, sha256="")],
    )


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


def build_step(config: Config, info: IndexFile, dist: Dist) -> tuple[Callable[[], None], int]:
    """A function that makes one training step on a fixed batch, and the FLOPs of a training image."""
    model = DiT(config.with_data(info.latent.shape, len(info.classes)).model.to_dit())
    initialize(model, 0)
    flops = 3 * forward_flops(model.config)
    engine = build_engine(model, config, None, dist)
    ema = EMA(engine.masters(), config.ema.decays)
    draws = build_draws(config, info, dist)

    def step() -> None:
        task = draws()
        with engine.microbatch(last=True):
            engine.backward(training_loss(engine.module, task, config, step=0).mean(dim=1)[0])
        ema.update(engine.step(1e-4).finite)

    return step, flops


def seconds_per_step(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Wall time of a step, the device waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / steps


def main(
    preset: Annotated[str, typer.Option(help="Model size.")] = "SiT-B/2",
    aux_depth: Annotated[int, typer.Option(help="Block of the auxiliary head where it is on.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 64,
    channels: Annotated[int, typer.Option(help="Latent channels.")] = 4,
    size: Annotated[int, typer.Option(help="Latent side.")] = 32,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "bf16",
    rounds: Annotated[int, typer.Option(help="Rounds; the table shows medians.")] = 5,
    steps: Annotated[int, typer.Option(help="Steps a round.")] = 10,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Time the compiled variants too.")] = True,
) -> None:
    """Time a training step, eager and compiled, with and without the auxiliary head."""
    dist = init_distributed(600, 600)
    info = synthetic_info(channels, size, 1000)
    variants: dict[str, tuple[Callable[[], object], int]] = {}
    before: dict[str, Callable[[], Task]] = {}
    peaks: dict[str, float] = {}
    for compile_blocks in (False, True) if compiled else (False,):
        for depth in (None, aux_depth):
            name = f"{'compiled' if compile_blocks else 'eager'}, {'with' if depth else 'no'} auxiliary head"
            tree: dict[str, Any] = {
                "model": {"preset": preset, "aux_depth": depth},
                "data": {"index": "synthetic", "streams": 1},
                "train": {
                    "steps": 1,
                    "global_batch_size": batch_size,
                    "precision": precision,
                    "compile": compile_blocks,
                },
            }
            if dist.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                allocated = torch.cuda.memory_allocated()
            config = config_from_tree(tree, "benchmark")
            step, flops = build_step(config, info, dist)
            step()  # warm: compilation, optimizer state
            variants[name] = step, flops
            before[f"{'compiled' if compile_blocks else 'eager'}, the draws alone"] = build_draws(config, info, dist)
            if dist.device.type == "cuda":
                peaks[name] = (torch.cuda.max_memory_allocated() - allocated) / 2**30
    for name, draws in before.items():
        draws()
        variants[name] = draws, 0
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (timed, _) in variants.items():
            times[name].append(seconds_per_step(timed, steps, dist.device))

    device = torch.cuda.get_device_name() if dist.device.type == "cuda" else platform.processor() or platform.machine()
    title = (
        f"{preset}, batch {batch_size}, {channels} x {size} x {size}, {precision}, {device}, torch {torch.__version__}"
    )
    table = Table("variant", "ms a step", "images/s", "MFU", "peak GiB", "time / first", title=title)
    first = times[next(iter(times))]
    for name, (_, flops) in variants.items():
        seconds = statistics.median(times[name])
        ratio = statistics.median(mine / theirs for mine, theirs in zip(times[name], first, strict=True))
        mfu = model_flops_utilisation(flops, batch_size / seconds, 1, dist.device, None)
        table.add_row(
            name,
            f"{1000 * seconds:.1f}",
            f"{batch_size / seconds:.1f}",
            "-" if not mfu else f"{100 * mfu:.1f}%",
            f"{peaks[name]:.2f}" if name in peaks else "-",
            f"{ratio:.4f}",
        )
    console.print(table)
    console.print(f"{datetime.now(UTC):%Y-%m-%d}, {rounds} rounds of {steps} steps, medians")


if __name__ == "__main__":
    run_app(main)
