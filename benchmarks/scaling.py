"""An 800-epoch run on 1 to 512 H100s: what each step computes, keeps and sends, and what failures leave of the time.

    python benchmarks/scaling.py                       # the tables of docs/scaling.md, about a minute
    python benchmarks/scaling.py train.global_batch_size=1024 data.streams=512

The first table is computed with the formulae of `ig-dist train CONFIG --dry-run`. The second simulates whole runs:
failures come at random (exponential) at rates that were measured on large clusters and published (Kokolis et al.,
"Revisiting Reliability in Large-Scale Machine Learning Research Clusters", arXiv 2410.21680: mean time to failure 47.7
days of jobs on 8 GPUs, 7.9 hours on 1,024). Each costs the steps since the newest whole checkpoint and a restart; each
save costs a stall.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.box import MARKDOWN
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ig_dist.config_file import load_config
from ig_dist.dry_run import (
    GIB,
    IMAGENET_CLASSES,
    IMAGENET_IMAGES,
    SD_LATENT,
    communication_bytes,
    count_state,
    memory_per_gpu,
)
from ig_dist.models.presets import forward_flops
from ig_dist.terminal import console, run_app

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# bytes/s that each GPU of a ring sends: NVLink 4 one way; between nodes eight rings, each over one of eight 400 Gb/s
# ports, so that a ring's bytes cross a port once for the eight GPUs of its node
PER_NODE, NVLINK, NETWORK = 8, 450e9, 8 * 50e9
MTTF_S = {8: 47.7 * 86400, 1024: 7.9 * 3600}
INTERVALS_S = (60, 120, 300, 600, 1200, 1800, 3600, 7200)


@dataclass(frozen=True)
class Costs:
    """Seconds that faults and saves cost."""

    stall_s: float
    """Of the loop, for each save."""
    write_s: float
    """From a save until it is whole; a failure before falls back to the one before."""
    restart_s: float
    """From a failure to the next step: noticing, queue, start-up, compilation, reading the checkpoint."""


def mean_time_to_failure(gpus: int) -> float:
    """Seconds, on the line through the two measured points (logarithms of both)."""
    (small, long), (large, short) = MTTF_S.items()
    slope = math.log(short / long) / math.log(large / small)
    return long * (gpus / small) ** slope


def goodput(work_s: float, every_s: float, mttf_s: float, costs: Costs, random: np.random.Generator) -> float:
    """The share of one simulated run's wall-clock that was work which lasted.

    Args:
        work_s: seconds of steps that the run needs.
        every_s: seconds of steps between saves.
        mttf_s: mean time to failure.
        costs: of saves and failures.
        random: draws the failures.
    """
    wall, saved = 0.0, 0.0  # saved: seconds of steps in the newest whole checkpoint
    period = every_s + costs.stall_s
    while True:
        lived = random.exponential(mttf_s)
        left = work_s - saved
        needed = left + costs.stall_s * (math.ceil(left / every_s) - 1) + costs.stall_s + costs.write_s  # and the last
        if lived >= needed:
            return work_s / (wall + needed)
        whole = max(0, math.floor((lived - costs.write_s) / period))  # saves that were whole by then
        saved = min(work_s, saved + whole * every_s)
        wall += lived + costs.restart_s


def best_interval(
    work_s: float, gpus: int, costs: Costs, runs: int, random: np.random.Generator
) -> tuple[float, NDArray[np.float64]]:
    """The interval with the highest mean goodput, and the mean of each interval."""
    means = [
        np.mean([goodput(work_s, every, mean_time_to_failure(gpus), costs, random) for _ in range(runs)])
        for every in INTERVALS_S
    ]
    return INTERVALS_S[int(np.argmax(means))], np.array(means)


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="Of the config: group.key=value.")] = None,
    config: Annotated[Path, typer.Option(help="The run.")] = Path("configs/sit_xl2_ig.yaml"),
    runs: Annotated[int, typer.Option(help="Simulated runs for each number.")] = 200,
    mfu: Annotated[float, typer.Option(help="Share of the peak that is reached.")] = 0.4,
    peak_tflops: Annotated[float, typer.Option(help="Of one GPU, dense bf16: an H100 has 989.")] = 989.0,
    stall_s: Annotated[float, typer.Option(help="Of the loop for each save.")] = 0.5,
    storage_gbs: Annotated[float, typer.Option(help="GB/s that the storage takes from all together.")] = 2.0,
    restart_s: Annotated[float, typer.Option(help="From a failure to the next step.")] = 180.0,
    seed: Annotated[int, typer.Option(help="Of the failures.")] = 0,
) -> None:
    """Print both tables."""
    settings = load_config(config, overrides or []).with_data(SD_LATENT, IMAGENET_CLASSES)
    model, batch = settings.model.to_dit(), settings.train.global_batch_size
    parameters, moments = count_state(model, settings)
    flops, steps = 3 * forward_flops(model), settings.total_steps(IMAGENET_IMAGES)
    state = 4 * (parameters * (1 + len(settings.ema.decays)) + moments)  # a checkpoint: weights, averages, moments
    image = 2 * 2 * math.prod(SD_LATENT)  # stored moments, fp16

    plan = Table(
        title=f"{config.stem}: {steps:,} steps of {batch} images at {mfu:.0%} MFU", title_justify="left", box=MARKDOWN
    )
    for column in (
        "GPUs",
        "images a GPU",
        "engine",
        "GiB a GPU",
        "compute ms",
        "sent GiB",
        "sending ms",
        "data MB/s",
        "days",
    ):
        plan.add_column(column, justify="right")
    costs = Costs(stall_s, state / (storage_gbs * 1e9), restart_s)
    assumed = f"saves stall {stall_s:g} s and take {costs.write_s:.0f} s, restarts {restart_s:g} s"
    failures = Table(
        title=f"goodput: {assumed}, {runs} runs each",
        title_justify="left",
        box=MARKDOWN,
    )
    for column in ("GPUs", "days", "hours to a failure", *(f"{every // 60} min" for every in INTERVALS_S), "best"):
        failures.add_column(column, justify="right")
    random = np.random.default_rng(seed)
    for gpus in GPUS:
        if batch % gpus or settings.data.streams % gpus:
            console.print(f"{gpus} GPUs: do not divide the batch of {batch} or the {settings.data.streams} streams")
            continue
        micro = batch // gpus // settings.train.accumulation or 1
        compute = batch * flops / (gpus * peak_tflops * 1e12 * mfu)
        for engine in ("ddp", "fsdp2"):
            memory = memory_per_gpu(engine, model, parameters, moments, settings, gpus, micro).total / GIB
            sent = communication_bytes(engine, parameters, settings, gpus)
            sending = sent / (NVLINK if gpus <= PER_NODE else NETWORK)
            # what does not fit beside the backward pass (two thirds of the compute) is waited for
            step = compute + max(0.0, sending - 2 / 3 * compute)
            days = steps * step / 86400
            plan.add_row(
                str(gpus), str(micro), engine, f"{memory:.1f}", f"{1e3 * compute:.0f}", f"{sent / GIB:.2f}",
                f"{1e3 * sending:.0f}", f"{batch * image / step / 1e6:.0f}", f"{days:.2f}",
            )  # fmt: skip
            if engine == "ddp":
                best, means = best_interval(steps * step, gpus, costs, runs, random)
                failures.add_row(
                    str(gpus), f"{days:.2f}", f"{mean_time_to_failure(gpus) / 3600:.0f}",
                    *(f"{mean:.2%}" for mean in means), f"{best / 60:.0f} min",
                )  # fmt: skip
    console.print(plan)
    console.print(failures)


if __name__ == "__main__":
    run_app(main)
