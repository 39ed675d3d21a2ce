"""What a start costs: from a large checkpoint on, and from the command to the first step.

    python benchmarks/startup.py --table                 # 8 ranks, on disk and, where Ceph is installed, from S3
    python benchmarks/startup.py sit_b2_ig --ranks 2
    python benchmarks/startup.py --digits --rounds 5     # the quickstart's training; compiled, cold and from the cache

With ``--digits``: until the first step is in ``metrics.jsonl``. Without: how long ranks take to go on from a checkpoint
of SiT-XL/2's size beside a bare read of the same files, and (``--table``) what a restart of it on GPUs would take, put
together of such parts. The ranks, processes of this machine over gloo, save the state as FSDP2 cuts it, then go on from
it as a start does: each reads and checks its share, and is sent what it has not read. What they get is dropped, so that
the state is in memory once. The bare read: as many processes read the same files, each its share, in requests of 32
MiB, and check nothing.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as torch_dist
import typer
from rich.box import MARKDOWN
from rich.table import Table
from torch.multiprocessing.spawn import start_processes

from benchmarks.checkpoint import object_store
from benchmarks.restart import cut_by_rows, state_shapes
from benchmarks.side_by_side import Record, Result, interleaved, show, show_results
from ig_dist.checkpoints.exchange import Loaded
from ig_dist.checkpoints.saving import Saver
from ig_dist.checkpoints.store import CheckpointStore
from ig_dist.parallel.dist import Dist
from ig_dist.parallel.engine import Piece
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import REQUEST_BYTES, open_url, read_range
from ig_dist.terminal import console, run_app

Times = dict[str, float]
ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 8.0
STORAGE_GB_S, TO_GPU_GB_S, GPUS = 2.0, 10.0, 8  # of a machine; from host memory that is not pinned; a machine's


def in_ranks(function: Callable[[Dist], Times], ranks: int) -> Times:
    """Call in so many processes of one gloo group; the longest time of each kind."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_rank, (ranks, folder, function), ranks, start_method="fork")  # type: ignore[no-untyped-call]
        times = [torch.load(file) for file in Path(folder).glob("times_*")]
    return {kind: max(one[kind] for one in times) for kind in times[0]}


def _rank(rank: int, ranks: int, folder: str, function: Callable[[Dist], Times]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    began = time.perf_counter()
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    times = {"group": time.perf_counter() - began}
    times |= function(Dist(rank, ranks, rank, ranks, torch.device("cpu")))
    torch.save(times, f"{folder}/times_{rank}")
    torch_dist.destroy_process_group()


def shards(config: str, dist: Dist) -> dict[str, Piece]:
    """What a rank writes and wants back, without memory."""
    return cut_by_rows(state_shapes(config), dist.rank, dist.world_size)


def save(url: str, config: str, dist: Dist) -> Times:
    """Write the checkpoint; the contents are one random block, over and over."""
    block = torch.randn(max(piece.data.numel() for piece in shards(config, dist).values()))

    def filled(piece: Piece) -> Piece:
        return piece._replace(data=block[: piece.data.numel()].view(piece.data.shape))

    saver = Saver(CheckpointStore(url), dist)
    began = time.perf_counter()
    saver.save(1, {name: filled(piece) for name, piece in shards(config, dist).items()}, {"optimizer_steps": 1})
    saver.wait()
    return {"save": time.perf_counter() - began}


def go_on(url: str, config: str, dist: Dist) -> Times:
    """From the newest checkpoint, as a start does."""
    began = _together(url, dist)
    checkpoint = CheckpointStore(url).find(dist, keep=True)
    assert checkpoint is not None
    torch_dist.barrier()
    read = time.perf_counter()
    loaded, mine = Loaded(checkpoint, dist), shards(config, dist)
    for group in sorted({name.partition("/blocks")[0] for name in mine if "/blocks" in name}):
        loaded.parts(
            group, {n.removeprefix(f"{group}/"): piece for n, piece in mine.items() if n.startswith(f"{group}/")}
        )
    torch_dist.barrier()
    return {"read": read - began, "exchange": time.perf_counter() - read}


def bare(url: str, config: str, dist: Dist) -> Times:
    """Read the same files, as many bytes a rank, and look at none of them."""
    fs, path = open_url(url, "url")
    sizes = {file: size for file in sorted(fs.find(path)) if (size := fs.size(file)) >= REQUEST_BYTES}
    began = _together(url, dist)
    for file, size in [*sizes.items()][dist.rank :: dist.world_size]:
        for start in range(0, size, REQUEST_BYTES):
            read_range(fs, file, start, min(start + REQUEST_BYTES, size), Patience())
    torch_dist.barrier()
    return {"bare": time.perf_counter() - began}


def _together(url: str, dist: Dist) -> float:
    """The time at which all ranks begin, with nothing of a disk's files in memory."""
    if dist.is_main and Path(url).is_dir():
        for file in Path(url).rglob("*.safetensors"):
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    torch_dist.barrier()
    return time.perf_counter()


def measure(name: str, url: str, config: str, ranks: int, rounds: int, table: Table, *, record: bool) -> Times:
    """Save once, then go on and read in turns; the medians."""
    times = [in_ranks(partial(save, url, config), ranks)]
    for _ in range(rounds):
        times.append(in_ranks(partial(go_on, url, config), ranks) | in_ranks(partial(bare, url, config), ranks))
    median = {kind: statistics.median(one[kind] for one in times if kind in one) for kind in ("save", *times[-1])}
    ratios = sorted((one["read"] + one["exchange"]) / one["bare"] for one in times[1:])
    seconds = (f"{median[kind]:.1f}" for kind in ("save", "read", "exchange", "bare"))
    table.add_row(name, *seconds, f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    claim = f"start from a checkpoint of {config} by {ranks} ranks / bare read, {name}"
    show_results([Result(claim, statistics.median(ratios), ratios[0], ratios[-1], "<= 2.5")], record=record)
    return median


def python(*words: str) -> None:
    """Run a command of this checkout to its end."""
    subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def first_step(folder: Path, verb: str, *options: str) -> float:
    """Seconds from a command until the first line of its run's metrics is there."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    metrics, began = folder / "run/metrics.jsonl", time.perf_counter()
    steps = ["train.steps=1", "log.every_steps=1", "log.sample_every_steps=0"]
    paths = [f"run.dir={folder / 'run'}", f"data.index={folder / 'data'}"]
    command = [sys.executable, "-m", "ig_dist.cli", verb, "configs/digits.yaml", *steps, *paths, *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.01)
        return time.perf_counter() - began


def digits_ways(folder: Path) -> dict[str, Callable[[], float]]:
    """Starts of the quickstart's training."""
    python("-m", "ig_dist.cli", "encode", "--source", "digits", "--dest", f"{folder / 'data'}", "--tokenizer", "pixel")
    os.environ["IG_DIST_COMPILED"] = f"{folder / 'compiled'}"
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)

    def cold() -> float:
        shutil.rmtree(folder / "compiled", ignore_errors=True)
        return first_step(folder, "train", "train.compile=true")

    return {
        "one process": partial(first_step, folder, "train"),
        "two processes": partial(first_step, folder, "launch", "--processes", "2"),
        "compiled, cold": cold,
        "compiled, kept": partial(first_step, folder, "train", "train.compile=true"),
    }


def measure_digits(rounds: int, *, record: bool) -> None:
    """Commands to first steps; compiled, each kept start follows the cold one that has compiled for it."""
    with tempfile.TemporaryDirectory() as place:
        ways = digits_ways(Path(place))
        few = dict.fromkeys(("one process", "two processes"))
        times = interleaved({name: ways[name] for name in few}, rounds)
        pairs = [[ways[f"compiled, {how}"]() for how in ("cold", "kept")] for _ in range(min(rounds, 3))]
    cold, kept = (list(column) for column in zip(*pairs, strict=True))
    show(times | {"compiled, cold": cold, "compiled, kept": kept}, [], title="command to first step, digits")
    claims = [
        Result(f"command to first step of the digits, {name}, s", statistics.median(times[name]), limit=f"<= {LIMIT_S}")
        for name in few
    ]
    saved = statistics.median(k / c for c, k in pairs)
    claims.append(
        Result(
            "start that finds compiled kernels / one that compiles",
            saved,
            min(k / c for c, k in pairs),
            max(k / c for c, k in pairs),
            "<= 0.7",
        )
    )
    show_results(claims, record=record)


def restart_on_gpus(config: str, ranks: int, measured: Times) -> Table:
    """Seconds of a restart on a machine of GPUs, part by part."""
    size = sum(tensor.nbytes for tensor in state_shapes(config).values()) / 1e9
    began = time.perf_counter()
    python("-c", "import ig_dist.training.trainer")
    imports = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as place:
        ways = digits_ways(Path(place))
        plain, _, kept = ways["one process"](), ways["compiled, cold"](), ways["compiled, kept"]()
    cores = min(ranks, len(os.sched_getaffinity(0)))
    read = max(measured["read"] * cores / GPUS, size / STORAGE_GB_S)
    parts = {
        "imports": (imports, "measured"),
        "group": (measured["group"], f"measured, {ranks} processes"),
        "read, checked": (read, f"the more of: measured here, on {GPUS} cores; {STORAGE_GB_S:g} GB/s of a storage"),
        "exchange": (measured["exchange"] * cores / GPUS, f"measured here, on {GPUS} cores"),
        "to the GPUs": (size / GPUS / TO_GPU_GB_S, f"{TO_GPU_GB_S:g} GB/s each"),
        "compiler, kernels from the cache": (kept - plain, "measured, of the digits"),
        "first batch": (32 * 8 * 2**20 / 1e9 / STORAGE_GB_S, f"8 windows of 32 MiB at {STORAGE_GB_S:g} GB/s"),
    }
    table = Table(f"restart of {config} on {GPUS} GPUs under FSDP2", "s", "how it is known", box=MARKDOWN)
    for name, (seconds, how) in parts.items():
        table.add_row(name, f"{seconds:.1f}", how)
    table.add_row("command to first step", f"{sum(seconds for seconds, _ in parts.values()):.1f}", "sum")
    return table


def main(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="Whose state.")] = "sit_xl2_ig",
    ranks: Annotated[int, typer.Option(min=1, help="Number of ranks.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Starts of each kind.")] = 3,
    on: Annotated[str, typer.Option(help="Where: disk, s3.")] = "disk,s3",
    folder: Annotated[Path, typer.Option(help="Where on the disk.")] = Path("runs"),
    digits: Annotated[bool, typer.Option("--digits", help="From the command to the first step of the digits.")] = False,
    table_of_parts: Annotated[bool, typer.Option("--table", help="Of a restart on GPUs, part by part.")] = False,
    record: Record = False,
) -> None:
    """Measure, and print the medians."""
    if digits:
        return measure_digits(rounds, record=record)
    size = sum(tensor.nbytes for tensor in state_shapes(config).values()) / 1e9
    table = Table("where", "save", "read, checked", "exchange", "bare read", "start / bare read", box=MARKDOWN)
    folder.mkdir(parents=True, exist_ok=True)
    if "disk" in on:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            measured = measure("disk", place, config, ranks, rounds, table, record=record)
    if "s3" in on:
        with object_store("bluestore") as url:
            if url:
                measure("S3 on loopback", url, config, ranks, rounds, table, record=record)
    console.print(f"{config}, {size:.1f} GB of state, {ranks} ranks on {os.cpu_count()} cores; seconds", table)
    if table_of_parts and "disk" in on:
        console.print(restart_on_gpus(config, ranks, measured))


if __name__ == "__main__":
    run_app(main)
