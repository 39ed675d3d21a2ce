"""What the watchdog sees of a real device and of NCCL. Skips without a GPU: CI has none."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
import torch.distributed as torch_dist
from torch._C._distributed_c10d import HashStore

from ig_dist.parallel.collectives import Recorder, communication_error, set_defaults
from ig_dist.training.phases import Phases, device_marks
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

BUSY = 3_000_000_000  # cycles: more than a second
MOST_S = 10e-6  # of the host's time for a mark


def test_a_device_that_is_behind_its_host_is_seen_for_some_microseconds() -> None:
    stop = threading.Event()
    marks, phases = device_marks(torch.device("cuda", 0), 0.05, stop), Phases()
    assert marks is not None
    phases.on_change = marks.put
    phases.enter("forward", 1)
    wait_until(lambda: marks.behind is None)
    torch.cuda._sleep(BUSY)
    began = time.perf_counter()
    phases.enter("backward")
    wait_until(lambda: marks.behind is not None and marks.behind.phase == "forward")
    assert time.perf_counter() - began < 0.5  # nothing waited for the device
    wait_until(lambda: marks.behind is None)
    stop.set()
    began = time.perf_counter()
    for number in range(500):
        phases.enter(("forward", "backward")[number % 2])
    assert (time.perf_counter() - began) / 500 < 2 * MOST_S  # a new event each; those that are used again cost less


def test_nccl_tells_a_collective_that_its_device_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("TORCH_NCCL_", "TORCH_FR_")):
            monkeypatch.delenv(name)
    set_defaults(600.0)
    device = torch.device("cuda", 0)
    torch_dist.init_process_group("cpu:gloo,cuda:nccl", store=HashStore(), rank=0, world_size=1)
    try:
        values, recorder = torch.ones(1000, device=device), Recorder()
        torch_dist.all_reduce(values)
        torch.cuda.synchronize()
        came = recorder.read(10.0).came["nccl 0"]
        torch.cuda._sleep(BUSY)
        torch_dist.all_reduce(values)
        assert recorder.read(10.0) == (recorder.standing.came, None) and recorder.standing.came["nccl 0"] == came
        torch.cuda.synchronize()
        assert recorder.read(10.0).came["nccl 0"] == came + 1
        assert "all_reduce" in recorder.records["nccl"]["entries"][-1]["profiling_name"]
        assert communication_error(device) == ""
    finally:
        torch_dist.destroy_process_group()
