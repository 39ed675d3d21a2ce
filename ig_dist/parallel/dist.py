"""Processes: who am I, agreement between ranks, and the few collectives outside the engines."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore  # torch.distributed does not name it as its own

from ig_dist.errors import HangError, IgDistError, first_line
from ig_dist.parallel.collectives import set_defaults
from ig_dist.parallel.joining import allow_open_files, meet_all
from ig_dist.terminal import is_first_process, without_teardown
from ig_dist.this_process import host, meeting_place, this_device, this_process

SAME_SIGNAL_S = 1.0
T = TypeVar("T")


@dataclass(frozen=True)
class Dist:
    """This process among all processes of the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Number of machines."""
        return -(-self.world_size // self.local_world_size)

    @property
    def place(self) -> str:
        """This rank and its machine, as the launcher calls it."""
        return f"rank {self.rank} on {host()}"


def init_distributed(join_s: float, collective_s: float) -> Dist:
    """Join the job that this process is part of, within ``join_s``, or stand alone. Raises as ``meet_all``.

    Collectives go over gloo for CPU tensors and NCCL for GPU tensors, and give up after ``collective_s``.
    """
    process = this_process()
    device = this_device(process, shared=False)
    set_defaults(collective_s)
    local_world_size = process.local_world_size
    if process.world_size > 1:
        place = dict(zip(("MASTER_ADDR", "MASTER_PORT"), meeting_place(process), strict=True))
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # for libraries, and helper processes
        os.environ |= place | {name: str(number) for name, number in zip(names, process[:4], strict=True)}
        allow_open_files(process)
        store, local_world_size = meet_all(process, device, join_s)
        without_teardown()
        try:
            torch_dist.init_process_group(
                _backend(device),
                store=store,
                rank=process.rank,
                world_size=process.world_size,
                timeout=timedelta(seconds=collective_s),
            )
        except RuntimeError as error:
            if "connectFullMesh" not in str(error):
                raise
            raise HangError(
                f"{host()} met the others, but they do not reach each other: set GLOO_SOCKET_IFNAME to the network"
                f" interface between the machines ({first_line(error)})"
            ) from None
    return Dist(process.rank, process.world_size, process.local_rank, local_world_size, device)


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def ensure_process_group(dist: Dist) -> None:
    """A process group also for one process alone, for libraries that know no other way."""
    if not torch_dist.is_initialized():
        torch_dist.init_process_group(_backend(dist.device), store=HashStore(), rank=0, world_size=1)


def align_timeouts(dist: Dist) -> None:
    """Give the groups that engines have made the time-out of all ranks' own, not PyTorch's 10 or 30 minutes.

    A collective that times out ends its process before the watchdog has said whom it waits for.
    """
    if torch_dist.is_initialized() and dist.world_size > 1:
        timeout = patience_of(torch_dist.group.WORLD, dist.device)
        for group in list(torch_dist.distributed_c10d._world.pg_map):
            torch_dist.distributed_c10d._set_pg_timeout(timeout, group)


def patience_of(group: Any, device: torch.device) -> timedelta:
    """When collectives of a group give up."""
    timeout: timedelta = group._get_backend(device).options._timeout
    return timeout


_left: list[Any] = []
"""The group that was left last. DDP's reducer must not be the last to let go of it: it ends the group's threads while
it holds the interpreter, which one of them may wait for, to let go of a
tensor. Python lets go of the interpreter first."""


def shut_down() -> None:
    """Leave the job."""
    if torch_dist.is_initialized():
        _left[:] = [torch_dist.group.WORLD]
        torch_dist.destroy_process_group()


def gather_objects(value: Any, dist: Dist) -> list[Any]:
    """Every rank's value, in rank order. COLLECTIVE: every rank must call."""
    if dist.world_size == 1:
        return [value]
    values = [None] * dist.world_size
    torch_dist.all_gather_object(values, value)
    return values


def gather_rows(rows: Tensor, dist: Dist) -> list[Tensor] | None:
    """Every rank's rows, a CPU tensor of one shape on all of them, in rank order; None on ranks but the first.

    COLLECTIVE: every rank must call.
    """
    if dist.world_size == 1:
        return [rows]
    parts = [torch.empty_like(rows) for _ in range(dist.world_size)] if dist.is_main else None
    torch_dist.gather(rows, parts)
    return parts


def from_main(value: Any, dist: Dist) -> Any:
    """Rank 0's value. COLLECTIVE: every rank must call."""
    if dist.world_size == 1:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(work: Callable[[], T], dist: Dist) -> T:
    """What rank 0's work gives, on every rank; its error ends all of them. COLLECTIVE: every rank must call."""
    found: T | IgDistError | None = None
    if dist.is_main:
        try:
            found = work()
        except IgDistError as error:
            found = error
    found = from_main(found, dist)
    if isinstance(found, IgDistError):
        raise found
    return cast("T", found)


def sum_over_ranks(values: Tensor, dist: Dist) -> Tensor:
    """Elementwise sum, in place, of a tensor of any device. COLLECTIVE: every rank must call."""
    if dist.world_size > 1:
        torch_dist.all_reduce(values)
    return values


def begin_any(flags: Sequence[bool], dist: Dist) -> Callable[[], list[bool]]:
    """Begin to ask whether some rank has each flag set; the call of what is returned waits for the answer. COLLECTIVE.

    The all-reduce runs beside what comes between the two.
    """
    found = torch.tensor(flags, dtype=torch.int32)
    work = torch_dist.all_reduce(found, torch_dist.ReduceOp.MAX, async_op=True) if dist.world_size > 1 else None

    def answer() -> list[bool]:
        if work is not None:
            work.wait()
        return list(map(bool, found.tolist()))

    return answer


class StopFlag:
    """SIGTERM, SIGUSR2 and Ctrl-C ask the run to stop: this process knows of it, and its ranks agree on when.

    The handler only sets a flag. A second SIGTERM or Ctrl-C ends the process at once; one that follows within a moment
    is the first one again: ``timeout``, systemd and scancel signal the launcher and its ranks, as a terminal does, and
    the launcher passes on.
    """

    def __init__(self) -> None:
        self.asked = False  # whether this process was asked to stop
        self._asked_at = 0.0
        self._former: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere there are no signals
            for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
                if signal.getsignal(number) != signal.SIG_IGN:  # as a shell has Ctrl-C for what runs in the background
                    self._former[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Hand the signals back to whoever had them, in a process that lives on."""
        for number, handler in self._former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self._asked_at = time.monotonic()
            if number == signal.SIGINT and is_first_process():  # not by print, which this may have interrupted
                os.write(2, b"\nstopping: saves first; Ctrl-C once more ends at once, without\n")
        elif time.monotonic() - self._asked_at > SAME_SIGNAL_S:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            if number == signal.SIGTERM:
                os._exit(128 + number)
        self.asked = True
