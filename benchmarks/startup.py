"""How long ranks take to go on from a checkpoint of SiT-XL/2's size, beside a bare read of the same files.

    python benchmarks/startup.py                         # 8 ranks, on disk and, where Ceph is installed, from S3
    python benchmarks/startup.py sit_b2_ig --ranks 2

The ranks (processes of this machine, over gloo) save the state as FSDP2 cuts it, then go on from it as a start does:
each reads and checks its share, and all hand out the tensors of each group. What they hand out is dropped, so that the
state is in memory once. The bare read: as many processes read the same files, each its share, in requests of 32 MiB,
and check nothing.
"""

from __future__ import annotations

import os
import statistics
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
from ig_dist.checkpoints.exchange import Loaded
from ig_dist.checkpoints.saving import Saver
from ig_dist.checkpoints.snapshot import Piece
from ig_dist.checkpoints.store import CheckpointStore
from ig_dist.parallel.dist import Dist
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import REQUEST_BYTES, open_url, read_range
from ig_dist.terminal import console, run_app

Times = dict[str, float]


def in_ranks(function: Callable[[Dist], Times], ranks: int) -> Times:
    """Call in so many processes of one gloo group; the longest time of each kind."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_rank, (ranks, folder, function), ranks, start_method="fork")  # type: ignore[no-untyped-call]
        times = [torch.load(file) for file in Path(folder).glob("times_*")]
    return {kind: max(one[kind] for one in times) for kind in times[0]}


def _rank(rank: int, ranks: int, folder: str, function: Callable[[Dist], Times]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.save(function(Dist(rank, ranks, rank, ranks, torch.device("cpu"))), f"{folder}/times_{rank}")
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
    checkpoint = CheckpointStore(url).latest(dist, keep=True)
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


def measure(name: str, url: str, config: str, ranks: int, rounds: int, table: Table) -> None:
    """Save once, then go on and read in turns."""
    times = [in_ranks(partial(save, url, config), ranks)]
    for _ in range(rounds):
        times.append(in_ranks(partial(go_on, url, config), ranks) | in_ranks(partial(bare, url, config), ranks))
    median = {kind: statistics.median(one[kind] for one in times if kind in one) for kind in ("save", *times[-1])}
    ratios = sorted((one["read"] + one["exchange"]) / one["bare"] for one in times[1:])
    seconds = (f"{median[kind]:.1f}" for kind in ("save", "read", "exchange", "bare"))
    table.add_row(name, *seconds, f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def main(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="Whose state.")] = "sit_xl2_ig",
    ranks: Annotated[int, typer.Option(min=1, help="Number of ranks.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Starts of each kind.")] = 3,
    on: Annotated[str, typer.Option(help="Where: disk, s3.")] = "disk,s3",
    folder: Annotated[Path, typer.Option(help="Where on the disk.")] = Path("runs"),
) -> None:
    """Measure, and print the medians."""
    size = sum(tensor.nbytes for tensor in state_shapes(config).values()) / 1e9
    table = Table("where", "save", "read, checked", "exchange", "bare read", "start / bare read", box=MARKDOWN)
    folder.mkdir(parents=True, exist_ok=True)
    if "disk" in on:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            measure("disk", place, config, ranks, rounds, table)
    if "s3" in on:
        with object_store("bluestore") as url:
            if url:
                measure("S3 on loopback", url, config, ranks, rounds, table)
    console.print(f"{config}, {size:.1f} GB of state, {ranks} ranks on {os.cpu_count()} cores; seconds", table)


if __name__ == "__main__":
    run_app(main)
