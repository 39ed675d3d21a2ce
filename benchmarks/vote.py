"""What the ranks' vote of each step costs: an all-reduce of three integers by gloo, beside the step.

    python benchmarks/vote.py                                   # 2 to 64 processes of this machine
    python benchmarks/vote.py --processes 128 --hop-us 50

The processes are forked from one and do nothing else. gloo passes so few numbers twice around the ring of all W ranks:
a vote is 2 (W - 1) hops, one after the other. A line shows the time of a vote that is waited for at once, the same for
one hop, and how long a step of --step-ms waits for the vote that ran beside it. The last lines are what 64 and 512
ranks take at hops of --hop-us each.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as torch_dist
import typer

from ig_dist.parallel.dist import Dist, begin_any
from ig_dist.terminal import console, run_app

VOTES = 20


def vote(rank: int, processes: int, meeting: Path, step_s: float, told: Connection) -> None:
    """Be one rank; tell the median seconds of a vote alone, and of the wait for one after a step."""
    torch.set_num_threads(1)
    store = torch_dist.FileStore(str(meeting), processes)  # type: ignore[attr-defined]
    torch_dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    dist = Dist(rank, processes, rank, processes, torch.device("cpu"))
    alone, beside = [], []
    for _ in range(VOTES):
        torch_dist.barrier()
        began = time.perf_counter()
        begin_any((False, False, False), dist)()
        alone.append(time.perf_counter() - began)
    answer = begin_any((False, False, False), dist)
    for _ in range(VOTES):
        time.sleep(step_s)  # the device computes
        began = time.perf_counter()
        answer()
        beside.append(time.perf_counter() - began)
        answer = begin_any((False, False, False), dist)
    answer()
    told.send((statistics.median(alone), statistics.median(beside), max(beside)))
    torch_dist.barrier()


def main(
    processes: Annotated[list[int] | None, typer.Option(min=2, help="How many; may be given again.")] = None,
    step_ms: Annotated[float, typer.Option(min=0, help="Of a step.")] = 100.0,
    hop_us: Annotated[float, typer.Option(min=0, help="From one rank to the next, over the network.")] = 30.0,
) -> None:
    """Time votes among processes of this machine, and say what follows for more of them."""
    context = multiprocessing.get_context("fork")
    for count in processes or [2, 4, 8, 16, 64]:
        with tempfile.TemporaryDirectory() as folder:
            mine, theirs = context.Pipe(duplex=False)
            arguments = (count, Path(folder) / "store", step_ms / 1e3, theirs)
            ranks = [context.Process(target=vote, args=(rank, *arguments), daemon=True) for rank in range(count)]
            for rank in ranks:
                rank.start()
            found = [mine.recv() for _ in ranks]
            for rank in ranks:
                rank.join()
        alone, beside = (statistics.median(one[i] for one in found) for i in (0, 1))
        console.print(
            f"{count} processes: a vote {1e3 * alone:.2f} ms ({1e6 * alone / (2 * count - 2):.0f} us a hop); a step of"
            f" {step_ms:.0f} ms waits {1e3 * beside:.2f} ms (at most {1e3 * max(one[2] for one in found):.2f})"
        )
    for count in (64, 512):
        console.print(f"{count} ranks with hops of {hop_us:.0f} us: a vote {2e-3 * (count - 1) * hop_us:.1f} ms")


if __name__ == "__main__":
    run_app(main)
