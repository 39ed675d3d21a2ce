"""An 800-epoch run on 1 to 512 H100s: what each step computes, keeps and sends, and what failures leave of the time.

    python benchmarks/scaling.py                       # the tables of docs/scaling.md, about a minute
    python benchmarks/scaling.py train.global_batch_size=1024 data.streams=512

The first table is computed with the formulae of `ig-dist train CONFIG --dry-run`, and NCCL's own of what a collective
waits for beside its bytes (its src/graph/tuning.cc, protocol LL128). The second simulates whole runs:
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
from typing import Annotated, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray
from rich.box import MARKDOWN
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ig_dist.config import Config
from ig_dist.config.file import load_config
from ig_dist.models.presets import forward_flops
from ig_dist.terminal import console, run_app
from ig_dist.training.dry_run import (
    GIB,
    IMAGENET_CLASSES,
    IMAGENET_IMAGES,
    PER_NODE,
    SD_LATENT,
    count_state,
    engines_of,
    groups_of,
    memory_per_gpu,
    sent_per_gpu,
)

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
NVLINK, NETWORK = 450e9, 50e9  # bytes/s that each GPU sends: NVLink 4 one way, and one of eight 400 Gb/s ports a node
# seconds of a collective and of a step of it, over NVLink and between nodes: of a ring, and of an all-reduce's tree
BEGIN, RING, TREE = 14e-6, (1.9e-6, 4.0e-6), (1.25e-6, 8.5e-6)
DDP_BUCKET = 25 * 2**20
MTTF_S = {8: 47.7 * 86400, 1024: 7.9 * 3600}
COLUMNS = (
    *("GPUs", "images a GPU", "engine", "GiB a GPU", "compute ms", "sent GiB", "between nodes", "wire ms"),
    *("sending ms", "data MB/s", "days"),
)
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
    return float(long * (gpus / small) ** slope)


def stored_bytes() -> int:
    """Of an image: moments, fp16."""
    return 2 * 2 * math.prod(SD_LATENT)


def waiting(engine: str, parameters: int, blocks: int, config: Config, gpus: int) -> float:
    """Seconds a step that collectives take beside their bytes: all-gather and reduce-scatter are rings of all ranks."""
    groups, units, micro = groups_of(config, gpus), blocks + 1, config.train.accumulation
    gathers = (1 if config.engine.reshard_after_forward is False else 2) * micro
    if engine == "fsdp2":
        return units * (gathers + 1) * _ring(gpus)
    if engine == "hsdp":
        return units * (gathers + micro) * _ring(gpus // groups) + units * _tree(groups, per_node=1)
    return math.ceil(4 * parameters / DDP_BUCKET) * _tree(gpus)


def _ring(ranks: int) -> float:
    nodes = math.ceil(ranks / PER_NODE)
    return BEGIN + (ranks - nodes) * RING[0] + (nodes - 1) * RING[1] if ranks > 1 else 0.0


def _tree(ranks: int, per_node: int = PER_NODE) -> float:
    near, nodes = min(ranks, per_node), math.ceil(ranks / per_node)
    return BEGIN + 2 * ((near - 1) * TREE[0] + math.log2(nodes) * TREE[1]) if ranks > 1 else 0.0


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


class Row(NamedTuple):
    """What a step takes on so many GPUs under an engine."""

    gpus: int
    images: int
    """Of each GPU."""
    engine: str
    memory: float
    """GiB."""
    compute: float
    """Seconds."""
    sent: float
    """GiB, by each GPU."""
    between: float
    """Of these, from node to node."""
    wire: float
    """Seconds that the bytes take."""
    sending: float
    """Seconds with what collectives wait for beside them."""
    seconds: float
    """Of the step."""

    def cells(self, image_bytes: int, batch: int, steps: int) -> list[str]:
        """As the table has it."""
        milliseconds = (f"{1e3 * seconds:.0f}" for seconds in (self.wire, self.sending))
        data = f"{batch * image_bytes / self.seconds / 1e6:.0f}"
        return [
            *(str(self.gpus), str(self.images), self.engine, f"{self.memory:.1f}", f"{1e3 * self.compute:.0f}"),
            *(f"{self.sent:.2f}", f"{self.between:.2f}", *milliseconds, data, f"{steps * self.seconds / 86400:.2f}"),
        ]


def plan(config: Config, mfu: float, peak_tflops: float) -> list[Row]:
    """Steps on all numbers of GPUs that share the batch."""
    model, batch, rows = config.model.to_dit(), config.train.global_batch_size, []
    (parameters, moments), flops = count_state(model, config), 3 * forward_flops(model)
    for gpus in (number for number in GPUS if batch % number == 0 and config.data.streams % number == 0):
        images = batch // gpus // config.train.accumulation or 1
        compute = batch * flops / (gpus * peak_tflops * 1e12 * mfu)
        for engine in [name for name in engines_of(config, gpus) if not name.startswith("zero")]:
            memory = memory_per_gpu(engine, model, parameters, moments, config, gpus, images)["total_bytes"] / GIB
            total, between = sent_per_gpu(engine, parameters, moments, config, gpus).values()
            wire = max((total - between) / NVLINK, between / NETWORK)
            sending = wire + waiting(engine, parameters, model.depth, config, gpus)
            # what does not fit beside the backward pass (two thirds of the compute) is waited for
            step = compute + max(0.0, sending - 2 / 3 * compute)
            told = total / GIB, between / GIB
            rows.append(Row(gpus, images, engine, memory, compute, *told, wire, sending, step))
    return rows


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
    batch, steps = settings.train.global_batch_size, settings.total_steps(IMAGENET_IMAGES)
    parameters, moments = count_state(settings.model.to_dit(), settings)
    state = 4 * (parameters * (1 + len(settings.ema.decays)) + moments)  # a checkpoint: weights, averages, moments

    table = Table(
        title=f"{config.stem}: {steps:,} steps of {batch} images at {mfu:.0%} MFU", title_justify="left", box=MARKDOWN
    )
    for column in COLUMNS:
        table.add_column(column, justify="right")
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
    for row in plan(settings, mfu, peak_tflops):
        table.add_row(*row.cells(stored_bytes(), batch, steps))
        if row.engine == "ddp":
            best, means = best_interval(steps * row.seconds, row.gpus, costs, runs, random)
            failures.add_row(
                str(row.gpus), f"{steps * row.seconds / 86400:.2f}", f"{mean_time_to_failure(row.gpus) / 3600:.0f}",
                *(f"{mean:.2%}" for mean in means), f"{best / 60:.0f} min",
            )  # fmt: skip
    left = [str(gpus) for gpus in GPUS if batch % gpus or settings.data.streams % gpus]
    if left:
        divided = f"the batch of {batch} or the {settings.data.streams} streams"
        console.print(f"{', '.join(left)} GPUs: do not divide {divided}")
    console.print(table)
    console.print(failures)


if __name__ == "__main__":
    run_app(main)
