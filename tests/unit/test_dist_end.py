"""The end of a process group."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ig_dist.parallel import dist
from tests.forked import run


def threads() -> int:
    """Gloo's threads that work on collectives."""
    names = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
    return sum(name.startswith("pt_gloo_runloop") for name in names)


def end_twice() -> None:
    """In a process of its own: PyTorch's flight recorder keeps what was sent."""
    alone = dist.Dist(0, 1, 0, 1, torch.device("cpu"))
    for _ in range(2):  # in the first round modules are imported whose defaults hold the group for ever
        before = threads()
        dist.ensure_process_group(alone)
        model = DistributedDataParallel(nn.Linear(2, 2))
        dist.shut_down()
        del model
        gc.collect()
        assert threads() > before
        dist._left.clear()
        gc.collect()
    assert threads() == before


def test_a_reducer_is_not_the_last_to_let_go_of_its_group() -> None:
    """It would wait for gloo's threads with the interpreter in its hand, which they may need first: a deadlock."""
    done = run(["-m", "tests.unit.test_dist_end"])
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    end_twice()
