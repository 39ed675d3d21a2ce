"""``launchers/local.py --processes 2`` in which one rank goes wrong at one place.

    FAULT=nan FAULT_RANK=1 FAULT_STEPS=5,6 python -m tests.distributed.faulty CONFIG [a.b=c ...]

| fault | the rank's forward pass |
|---|---|
| ``nan`` | gives a loss that is not a number, for its first sample |
| ``sleep`` | does not return, in Python |
| ``read`` | does not return, in a system call without end |
| ``die`` | kills the process, while the other's threads do not end when they are told to |
| ``late`` | waits ``FAULT_S`` seconds for its data before |
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from ig_dist import cli, trainer
from ig_dist.data.stream import BatchStream
from launchers import local

KIND = os.environ["FAULT"]
MINE = os.environ["FAULT_RANK"] == os.environ.get("RANK", "0")
STEPS = [int(step) for step in os.environ["FAULT_STEPS"].split(",")]

whole = trainer.training_loss
batches = BatchStream.__iter__
step = 0


def training_loss(*arguments: Any) -> torch.Tensor:
    global step
    step += 1
    losses = whole(*arguments)
    if not MINE or step not in STEPS:
        return losses
    if KIND == "nan":
        losses = losses * torch.tensor([float("nan"), *[1.0] * (losses.shape[1] - 1)])
    elif KIND == "sleep":
        time.sleep(3600)
    elif KIND == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif KIND == "read":
        os.read(os.pipe()[0], 1)
    return losses


def slow_batches(self: BatchStream) -> Iterator[Any]:
    for number, batch in enumerate(batches(self), 1):
        if KIND == "late" and MINE and number in STEPS:
            time.sleep(float(os.environ["FAULT_S"]))
        yield batch


def launch() -> int:
    start = local.subprocess.Popen

    def faulty(command: list[str], **options: Any) -> Any:
        return start([word.replace("ig_dist.cli", "tests.distributed.faulty") for word in command], **options)

    local.subprocess.Popen = faulty  # type: ignore[assignment, misc]
    return local.launch(["train", *sys.argv[1:]], 2)


if __name__ == "__main__":
    if "RANK" not in os.environ:
        sys.exit(launch())
    trainer.training_loss = training_loss
    BatchStream.__iter__ = slow_batches  # type: ignore[method-assign]
    if KIND == "die":
        BatchStream.close = lambda self: time.sleep(3600)  # type: ignore[method-assign]
    cli.main()
