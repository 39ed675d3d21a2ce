"""Start a job on the processes of this machine.

    ig-dist launch --processes 2 configs/digits.yaml run.dir=runs/two
    ig-dist launch --processes 3 --job sample runs/two --ig-scale 1.4
    ig-dist launch --processes 3 --job evaluate runs/two/samples/PLAN
    ig-dist launch --processes 3 --job reference runs/data --out reference.npz
    ig-dist launch --processes 2 --job encode --source pictures --dest runs/data --tokenizer pixel

One process per GPU, or any number on CPUs (gloo). The first process that fails ends the others; the exit code is
the job's own (README, "Exit codes").
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer

from ig_dist.jobs import Job, program

GRACE_S = 10.0


def run_processes(arguments: Sequence[str], processes: int) -> int:
    """Run ``python ARGUMENTS`` in ``processes`` ranks; the exit code that explains a failure, else 0."""
    with socket.socket() as probe:  # a free port for the rendezvous
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
    children = []
    for rank in range(processes):
        environment = {
            "OMP_NUM_THREADS": threads,  # or every rank would start a thread per core
            "GLOO_SOCKET_IFNAME": "lo",
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        children.append(subprocess.Popen([sys.executable, *arguments], env=environment))

    def forward(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, forward)
    return _wait(children)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; after the first failure the others get a moment, then they are killed."""
    deadline = float("inf")
    # each is asked every time: of a child that is not asked it is not known that it ended
    while None in [child.poll() for child in children] and time.monotonic() < deadline:
        if deadline == float("inf") and any(child.returncode for child in children):
            deadline = time.monotonic() + GRACE_S  # they may be saving, or about to report the same error
        time.sleep(0.05)
    codes = {rank: child.returncode for rank, child in enumerate(children) if child.returncode}
    late = [rank for rank, child in enumerate(children) if child.poll() is None]
    for rank in late:
        children[rank].kill()
        children[rank].wait()
    # What cannot speak for itself: who was killed from outside, and who did not end when another one had.
    said = [f"rank {rank} was killed by signal {-code}{_hint(-code)}" for rank, code in codes.items() if code < 0]
    said += [f"rank {rank} did not end within {GRACE_S:.0f} s of the first failure and was killed" for rank in late]
    if said:
        print(f"error: {'; '.join(said)}", file=sys.stderr, flush=True)
    # A rank that was killed explains the others; a code of our own explains the bare 1 of those who lost their peer.
    code = min(codes.values(), key=lambda code: (code > 0, code == 1), default=0)
    return 128 - code if code < 0 else code


def _hint(number: int) -> str:
    return " (SIGKILL: out of memory?)" if number == signal.SIGKILL else ""


# What follows the first argument belongs to the job, its options included.
CONTEXT = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def launch(
    target: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|RUN|...",
            help="Config file to train, run to sample from, what to evaluate, or the first argument of another job.",
        ),
    ],
    rest: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Arguments and options of the job.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes, one per GPU if there are GPUs.")] = 1,
    job: Annotated[Job, typer.Option(help="What to run.")] = Job.train,
) -> None:
    """Start a job on the processes of this machine."""
    raise typer.Exit(run_processes(program(job, [target, *(rest or [])]), processes))
