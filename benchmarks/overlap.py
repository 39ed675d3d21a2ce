"""How much of DDP's reduction hides behind the backward pass, with 2 processes of gloo on this machine.

    python benchmarks/overlap.py --rate 1gbit        # as root: in a network of its own, as slow as that

Without ``--rate`` the bytes cross the loopback, and copying them takes the cores that the backward pass needs: nothing
can hide. A slow network leaves the cores free, as NCCL leaves most of a GPU. Hidden is (afterwards - engine) /
(afterwards - alone): "alone" reduces nothing, "afterwards" begins when the backward pass has ended, "engine" is ours,
and the others are DDP with buckets of so many MB.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as torch_dist
import typer
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.side_by_side import Claim, Record, Result, Rounds, interleaved, show, show_results
from benchmarks.synthetic import build_model, synthetic_info
from ig_dist.config.file import config_from_tree
from ig_dist.parallel.build import build_engine
from ig_dist.parallel.dist import init_distributed, shut_down
from ig_dist.terminal import run_app

BUCKETS_MB = (5, 100)


def passes(module: nn.Module, rows: int) -> Callable[[], None]:
    """Forward and backward pass; the gradients are left to whoever looks at them."""
    x, t = torch.randn(rows, 4, 32, 32), torch.rand(rows)
    labels = torch.zeros(rows, dtype=torch.int64)

    def call() -> None:
        module.zero_grad()
        sum(v.square().mean() for v in module(x, t, labels) if v is not None).backward()

    return call


def reduce_afterwards(parameters: list[nn.Parameter]) -> None:
    """Average all gradients, in one piece."""
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.view(-1) for grad in grads]) / torch_dist.get_world_size()
    torch_dist.all_reduce(flat)
    pieces = flat.split_with_sizes([grad.numel() for grad in grads])
    torch._foreach_copy_([grad.view(-1) for grad in grads], list(pieces))


def rank(number: int, preset: str, rows: int, rounds: int, record: bool) -> None:
    """What each of the processes does; all of them time, the first one tells."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist, info = init_distributed(600, 600), synthetic_info(4, 32, 1000)
    tree = {"model": {"preset": preset}, "data": {"index": "none", "streams": 2}}
    train = {"steps": 1, "global_batch_size": 2 * rows, "precision": "fp32"}
    config = config_from_tree({**tree, "train": train}, "benchmark")
    plain = build_model(config, info, dist.device)
    alone = passes(plain, rows)

    def afterwards() -> None:
        alone()
        reduce_afterwards(list(plain.parameters()))

    engine = build_engine(build_model(config, info, dist.device), config, None, dist)
    ways: dict[str, Callable[[], object]] = {"alone": alone, "afterwards": afterwards}
    ways["engine"] = passes(engine.module, rows)
    for size in BUCKETS_MB:
        model = build_model(config, info, dist.device)
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=size)
        ways[f"{size} MB"] = passes(ddp, rows)
    waiting = {name: lambda way=way: (way(), torch_dist.barrier()) for name, way in ways.items()}
    times = interleaved(waiting, rounds, warm=2)  # DDP orders its buckets after its first pass
    if dist.is_main:
        claims = [Claim(f"reduction of {preset}, afterwards / engine", "afterwards", "engine", ">= 1.0")]
        claims += [Claim(f"buckets of {size} MB / engine's", f"{size} MB", "engine") for size in BUCKETS_MB]
        show(times, claims, title=f"{preset}, batch {rows} each, 2 processes", record=record)
        hidden = [
            (late - ours) / (late - none)
            for late, ours, none in zip(times["afterwards"], times["engine"], times["alone"], strict=True)
        ]
        show_results([Result(f"reduction of {preset}, hidden share", statistics.median(hidden))], record=record)
    shut_down()


def main(
    preset: Annotated[str, typer.Option(help="Model size.")] = "SiT-S/2",
    batch_size: Annotated[int, typer.Option(help="Images of each process.")] = 4,
    rate: Annotated[str, typer.Option(help="Of the network, as tc has it, such as 1gbit.")] = "",
    rounds: Rounds = 5,
    record: Record = False,
) -> None:
    """Time a backward pass with no reduction, with one after it, and with DDP's."""
    if rate and "IG_DIST_SLOW_NETWORK" not in os.environ:
        shape = f"ip link set lo up && tc qdisc add dev lo root tbf rate {rate} burst 1mb latency 50ms"
        again = ["unshare", "-n", "sh", "-c", f'{shape} && exec "$@"', "sh", sys.executable, *sys.argv]
        environment = {**os.environ, "IG_DIST_SLOW_NETWORK": rate}
        raise typer.Exit(subprocess.run(again, check=False, env=environment).returncode)
    spawn(rank, (preset, batch_size, rounds, record), nprocs=2)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    run_app(main)
