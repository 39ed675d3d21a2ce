"""``launchers/local.py --processes 2`` in which one rank goes wrong at one place.

    FAULT=nan FAULT_RANK=1 FAULT_STEPS=5,6 python -m tests.distributed.faulty CONFIG [a.b=c ...]

| fault | the rank's forward pass |
|---|---|
| ``nan`` | gives a loss that is not a number, for its first sample |
| ``sleep`` | does not return, in Python |
| ``read`` | does not return, in a system call without end |
| ``mute`` | returns, but its backward pass does not come to its first collective |
| ``stall`` | returns, but a device stands still from here on; the host waits for it before the next metrics |
| ``stalls`` | the same on all ranks |
| ``die`` | kills the process, while the other's threads do not end when they are told to |
| ``raise`` | raises an error, no group of processes can be destroyed any more, and the other rank waits for ever |
| ``memory`` | asks for too much memory, and no group of processes can be destroyed any more |
| ``late`` | waits ``FAULT_S`` seconds for its data before |
| ``slow`` | takes ``FAULT_S`` seconds longer |

and of the trials before the first step ``miscounts``, ``drags`` (by ``FAULT_S`` a product), ``unreadable`` (the
shards), ``unmounted`` (the index too) and ``replaced`` (the index, by another one). ``early`` kills it once the group
of processes is there.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import signal
import sys
import threading
import time
from typing import Any

import torch

from ig_dist import cli
from ig_dist.data.index import ShardIndex, read_index
from ig_dist.data.reader import ShardReader
from ig_dist.data.stream import BatchStream
from ig_dist.errors import DataError
from ig_dist.launching.node import Node
from ig_dist.launching.ranks import signals_passed_on
from ig_dist.launching.supervisor import supervise
from ig_dist.training import learner, trainer, watchdog
from ig_dist.training.meter import Meter
from ig_dist.training.phases import Marks

KIND = os.environ["FAULT"]
MINE = os.environ["FAULT_RANK"] == os.environ.get("RANK", "0")
STEPS = [int(step) for step in os.environ["FAULT_STEPS"].split(",")]

whole = learner.training_loss
get = BatchStream.get
product = torch.mm
read = Meter.read
step, handed, late_since = 0, 0, 0.0


class Device(threading.Thread):
    """Does what stands in its queue, in order, beside the host."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.queue: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(self) -> None:
        while True:
            self.queue.get()()


class Event:
    """A place in the queue, as of ``torch.cuda``."""

    def record(self) -> None:
        self._come = threading.Event()
        device.queue.put(self._come.set)

    def synchronize(self) -> None:
        self._come.wait()


device = Device()


def training_loss(*arguments: Any, **named: Any) -> torch.Tensor:
    global step
    step += 1
    losses = whole(*arguments, **named)
    if KIND == "raise" and step in STEPS and not MINE:
        time.sleep(3600)
    if KIND == "stalls" and step in STEPS:
        device.queue.put(lambda: time.sleep(3600))
    if not MINE or step not in STEPS:
        return losses
    if KIND == "nan":
        losses = losses * torch.tensor([float("nan"), *[1.0] * (losses.shape[1] - 1)])
    elif KIND == "sleep":
        time.sleep(3600)
    elif KIND == "mute":
        losses.register_hook(lambda gradient: time.sleep(3600))
    elif KIND == "stall":
        device.queue.put(lambda: time.sleep(3600))
    elif KIND == "raise":
        raise RuntimeError("a planted error\nof two lines")
    elif KIND == "memory":
        torch.empty(1 << 60)
    elif KIND == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif KIND == "slow":
        time.sleep(float(os.environ["FAULT_S"]))
    elif KIND == "read":
        os.read(os.pipe()[0], 1)
    return losses


def faulty_product(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    if out is None:  # of others than the trials
        return product(a, b)
    product(a, b, out=out)
    if KIND == "drags":
        time.sleep(float(os.environ["FAULT_S"]))
    return out.add_(out == out.max()) if KIND == "miscounts" else out


def unmounted(url: str) -> ShardIndex:
    raise DataError(f"{url}/index.json cannot be read")


def replaced(url: str) -> ShardIndex:
    return dataclasses.replace(read_index(url), sha256="of another")


def unreadable(self: ShardReader, *arguments: Any, **named: Any) -> Any:
    raise DataError(f"{self._path}/shard-00000.tar cannot be read (Input/output error)")


def read_after_device(self: Meter, *arguments: Any) -> Any:
    event = Event()
    event.record()
    event.synchronize()
    return read(self, *arguments)


def slow_get(self: BatchStream, timeout_s: float | None = None) -> Any:
    global late_since, handed
    if KIND == "late" and MINE and handed + 1 in STEPS:
        late_since = late_since or time.monotonic()
        if time.monotonic() - late_since < float(os.environ["FAULT_S"]):
            time.sleep(timeout_s or 0.0)
            return None
    batch = get(self, timeout_s)
    handed += batch is not None
    return batch


if __name__ == "__main__":
    if "RANK" not in os.environ:
        with signals_passed_on() as asked:
            sys.exit(supervise(["-m", "tests.distributed.faulty", "train", *sys.argv[1:]], Node(processes=2), asked))
    learner.training_loss = training_loss
    BatchStream.get = slow_get  # type: ignore[method-assign]
    if KIND in ("stall", "stalls"):
        device.start()
        watchdog.device_marks = lambda device, every_s, stop: Marks(Event, every_s, stop)
        Meter.read = read_after_device  # type: ignore[method-assign]
    if KIND in ("raise", "memory"):  # as NCCL, which waits for the peers
        trainer.shut_down = lambda: time.sleep(3600)
        BatchStream.close = lambda self: time.sleep(3600)  # type: ignore[method-assign]
    if KIND == "die":
        BatchStream.close = lambda self: time.sleep(3600)  # type: ignore[method-assign]
    if MINE and KIND in ("miscounts", "drags"):
        torch.mm = faulty_product  # type: ignore[assignment]
    if MINE and KIND == "early":
        trainer.watched = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    if MINE and KIND == "unmounted":
        trainer.read_index = unmounted
    if MINE and KIND == "replaced":
        trainer.read_index = replaced
    if MINE and KIND == "unreadable":
        ShardReader.read_ids = unreadable  # type: ignore[method-assign]
    cli.main()
