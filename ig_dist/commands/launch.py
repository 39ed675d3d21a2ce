"""Start a job on the processes of this machine.

    ig-dist launch --processes 2 digits run.dir=runs/two
    ig-dist launch --processes 3 --job sample runs/two --ig-scale 1.4
    ig-dist launch --processes 3 --job evaluate runs/two/samples/PLAN
    ig-dist launch --processes 3 --job reference runs/data --out reference.npz
    ig-dist launch --processes 2 --job encode --source pictures --dest runs/data --tokenizer pixel

One process per GPU, or any number on CPUs (gloo). The first process that fails ends the others; the exit code is
the job's own (docs/running.md, "Exit codes").
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from ig_dist.commands.options import complete_config, complete_keys
from ig_dist.jobs import JOBS, Job, own_options_first, program, refuse_verb

GRACE_S = 10.0


def run_processes(arguments: Sequence[str], processes: int) -> int:
    """Run ``python ARGUMENTS`` in ``processes`` ranks; the exit code that explains a failure, else 0."""
    with socket.socket() as probe:  # a free port for the rendezvous
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
    # `python -m` would put the working directory first, and a random.py there before the real one
    safe_path = {} if {"", str(Path.cwd())} & set(sys.path) else {"PYTHONSAFEPATH": "1"}
    children = []
    for rank in range(processes):
        environment = {
            "OMP_NUM_THREADS": threads,  # or every rank would start a thread per core
            "GLOO_SOCKET_IFNAME": "lo",
            **safe_path,
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


class Launch(typer.core.TyperCommand):
    """Takes its own options wherever they stand among those of the job."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's, with the launcher's options first."""
        return super().parse_args(ctx, own_options_first(self, args))


CONTEXT = {"ignore_unknown_options": True, "allow_interspersed_args": False}  # all others belong to the job


def launch(
    target: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|RUN|...",
            help="What to train (see `ig-dist train`), to sample from, or the first argument of another job.",
            autocompletion=complete_config,
        ),
    ],
    rest: Annotated[
        list[str] | None,
        typer.Argument(metavar="a.b=c|...", help="Arguments and options of the job.", autocompletion=complete_keys),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, metavar="N", help="One per GPU if there are GPUs.")] = 1,
    job: Annotated[Job, typer.Option(metavar="JOB", help=f"What to run: {', '.join(JOBS)}.")] = Job.train,
) -> None:
    """Start a job on the processes of this machine, a training if not said otherwise.

    The first process that fails ends the others; the exit code is the job's own.
    """
    refuse_verb(target, job)
    raise typer.Exit(run_processes(program(job, [target, *(rest or [])]), processes))
