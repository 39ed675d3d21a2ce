"""``launchers/local.py --processes 2`` in which one rank goes wrong at one place.

    FAULT=nan FAULT_RANK=1 FAULT_STEPS=5,6 python -m tests.distributed.faulty CONFIG [a.b=c ...]

| fault | the rank's forward pass |
|---|---|
| ``nan`` | gives a loss that is not a number, for its first sample |
| ``sleep`` | does not return, in Python |
| ``read`` | does not return, in a system call without end |
| ``die`` | kills the process, while the other's threads do not end when they are told to |
| ``raise`` | raises an error, no group of processes can be destroyed any more, and the other rank waits for ever |
| ``memory`` | asks for too much memory, and no group of processes can be destroyed any more |
| ``late`` | waits ``FAULT_S`` seconds for its data before |
| ``slow`` | takes ``FAULT_S`` seconds longer |

and of the trials before the first step ``miscounts``, ``drags`` (by ``FAULT_S`` a product), ``unreadable`` (the shards)
and ``unmounted`` (the index too).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch

from ig_dist import cli
from ig_dist.commands.launch import run_processes
from ig_dist.data.index import ShardIndex
from ig_dist.data.reader import ShardReader
from ig_dist.data.stream import BatchStream
from ig_dist.errors import DataError
from ig_dist.training import trainer

KIND = os.environ["FAULT"]
MINE = os.environ["FAULT_RANK"] == os.environ.get("RANK", "0")
STEPS = [int(step) for step in os.environ["FAULT_STEPS"].split(",")]

whole = trainer.training_loss
get = BatchStream.get
product = torch.mm
step, handed, late_since = 0, 0, 0.0


def training_loss(*arguments: Any, **named: Any) -> torch.Tensor:
    global step
    step += 1
    losses = whole(*arguments, **named)
    if KIND == "raise" and step in STEPS and not MINE:
        time.sleep(3600)
    if not MINE or step not in STEPS:
        return losses
    if KIND == "nan":
        losses = losses * torch.tensor([float("nan"), *[1.0] * (losses.shape[1] - 1)])
    elif KIND == "sleep":
        time.sleep(3600)
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


def unreadable(self: ShardReader, *arguments: Any, **named: Any) -> Any:
    raise DataError(f"{self._path}/shard-00000.tar cannot be read (Input/output error)")


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
        sys.exit(run_processes(["-m", "tests.distributed.faulty", "train", *sys.argv[1:]], 2))
    trainer.training_loss = training_loss
    BatchStream.get = slow_get  # type: ignore[method-assign]
    if KIND in ("raise", "memory"):  # as NCCL, which waits for the peers
        trainer.shut_down = lambda: time.sleep(3600)
        BatchStream.close = lambda self: time.sleep(3600)  # type: ignore[method-assign]
    if KIND == "die":
        BatchStream.close = lambda self: time.sleep(3600)  # type: ignore[method-assign]
    if MINE and KIND in ("miscounts", "drags"):
        torch.mm = faulty_product  # type: ignore[assignment]
    if MINE and KIND == "unmounted":
        trainer.read_index = unmounted
    if MINE and KIND == "unreadable":
        ShardReader.read = unreadable  # type: ignore[method-assign]
    cli.main()
