"""What a rank that hangs can know: how far its device has come, which collective it is in, and who is to blame."""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from torch._C._distributed_c10d import HashStore

from ig_dist.parallel import collectives
from ig_dist.parallel.collectives import (
    Collective,
    Handlers,
    Recorder,
    Standing,
    communication_error,
    set_defaults,
    standing,
)
from ig_dist.training.phases import Marks, Now, Phases
from ig_dist.training.words import Word, judge
from tests.waiting import wait_until

REDUCE = Collective("nccl 0", 9, "all_reduce 9 of group 0 on nccl (Float [8]: 32 bytes)", 61.0)


class Device(threading.Thread):
    """Does what stands in its queue, in order, beside the host; fails where it is told to."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.queue: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.failed = False
        self.start()

    def run(self) -> None:
        while True:
            self.queue.get()()

    def event(self) -> Event:
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self._device = device

    def record(self) -> None:
        self._come = threading.Event()
        self._device.queue.put(self._come.set)

    def synchronize(self) -> None:
        self._come.wait()
        if self._device.failed:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def stop() -> Iterator[threading.Event]:
    """Ends the threads that a test begins."""
    event = threading.Event()
    yield event
    event.set()


def phase_of(marks: Marks) -> str | None:
    return None if marks.behind is None else marks.behind.phase


def test_the_device_is_where_its_queue_is_whatever_its_host_does(stop: threading.Event) -> None:
    device, go = Device(), threading.Event()
    marks, phases = Marks(device.event, 0.01, stop), Phases()
    phases.on_change = marks.put
    for phase in ("data", "forward", "backward"):
        phases.enter(phase, 1)
    wait_until(lambda: marks.behind is None)  # it has done all that the host asked for
    device.queue.put(go.wait)
    for phase in ("optimizer", "data", "forward", "log"):
        phases.enter(phase)
    wait_until(lambda: phase_of(marks) == "backward")
    time.sleep(0.1)
    assert phase_of(marks) == "backward" and phases.now.phase == "log"
    go.set()
    wait_until(lambda: marks.behind is None)


def test_a_step_leaves_four_marks_and_a_sign_of_life_none() -> None:
    left: list[Now] = []
    phases = Phases()
    phases.on_change = left.append
    for phase in ("data", "forward", "forward", "backward", "optimizer"):
        phases.enter(phase, 1)
    phases.beat()
    assert [now.phase for now in left] == ["data", "forward", "backward", "optimizer"]
    assert [now.entered for now in left] == [1, 2, 4, 5]


def test_a_device_that_fails_is_left_to_the_loop(stop: threading.Event) -> None:
    device = Device()
    marks = Marks(device.event, 0.01, stop)
    device.failed = True
    marks.put(Now(1, "forward", 1, 0.0))
    wait_until(lambda: marks.behind is None and device.queue.empty())
    marks.put(Now(2, "backward", 1, 0.0))
    assert marks.behind is None


def words(counts: list[int], **named: Any) -> dict[int, Word]:
    return {rank: Word(count, "backward", 7, 600.0, **named) for rank, count in enumerate(counts)}


@pytest.mark.parametrize(
    "counts,silent,guilty,said",
    [
        ([5, 5, 4, 5], [], [2], "; behind: rank 2 (step 7, backward, for 600 s)"),
        ([5, 5, 4, 4], [], [2, 3], "; behind: rank 2 (step 7, backward, for 600 s), rank 3"),  # of one machine
        ([5, 4, 4, 5], [], [], "no machine is blamed"),  # of two: what they wait for is not one of them
        ([5, 4, 4, 4], [], [], "no machine is blamed"),
        ([5, 5, 5, 5], [], [], "; no rank is behind another; no machine is blamed"),
        ([5, 5, 4, 5], [0], [0], "; behind: rank 0 (step 7, backward, does not answer), rank 2"),
        ([5, 5, 5, 5], [0, 1], [0, 1], "does not answer"),
        ([5, 5, 5, 5], [1, 2], [], "no machine is blamed"),  # a switch
    ],
)
def test_blame_needs_evidence_against_one_machine(
    counts: list[int], silent: list[int], guilty: list[int], said: str
) -> None:
    text, blamed = judge(words(counts), silent, rank=3, machine=2)
    assert blamed == guilty and said in text
    assert ("no machine is blamed" in text) == (not guilty)


def test_who_did_not_come_to_a_collective_is_named_where_all_are_in_one_phase() -> None:
    here = words([5, 5, 5, 5], standing=Standing({"nccl 0": 9}, REDUCE))
    here[2] = Word(5, "backward", 7, 600.0, standing=Standing({"nccl 0": 8}, None))
    waits = "waits for 61 s in all_reduce 9 of group 0 on nccl (Float [8]: 32 bytes), to which rank 2 did not come"
    assert judge(here, [], rank=3, machine=1) == (f"; {waits}", [2])
    assert judge(here, [], rank=2, machine=1) == (f"; rank 0 {waits}", [2])
    assert Word.loads(json.dumps(here[3])) == here[3]
    # one that knows of no such group is not of it
    here[2] = Word(5, "backward", 7, 600.0, standing=Standing({"nccl 1": 3}, None))
    text, guilty = judge(here, [], rank=3, machine=1)
    assert not guilty and "no rank is behind another; waits for 61 s in all_reduce 9" in text


def record(number: int, state: str, *, retired: bool = False, group: str = "0", operation: str = "all_reduce") -> Any:
    """As PyTorch's recorder has it of NCCL."""
    return {
        "collective_seq_id": number,
        "input_dtypes": ["BFloat16"] * 5,
        "input_sizes": [[1152, 4]] * 5,
        "is_p2p": False,
        "process_group": [group, "undefined"],
        "profiling_name": f"nccl:{operation}",
        "retired": retired,
        "state": state,
        "time_created_ns": int((time.time() - 100 + number) * 1e9),
    }


def test_a_collective_that_the_device_has_not_begun_is_one_it_did_not_come_to(monkeypatch: pytest.MonkeyPatch) -> None:
    done = [record(1, "completed", retired=True), record(2, "completed")]
    monkeypatch.setenv("TORCH_NCCL_ENABLE_TIMING", "1")
    waiting = standing({"nccl": {"entries": [*done, record(3, "started"), record(4, "scheduled")]}})
    assert waiting.came == {"nccl 0": 3} and waiting.waits is not None
    assert waiting.waits.text == (
        "all_reduce 3 of group 0 on nccl (BFloat16 [1152, 4], BFloat16 [1152, 4], BFloat16 [1152, 4], 2 more:"
        " 46,080 bytes)"
    )
    assert waiting.waits.waited_s == pytest.approx(97, abs=5)
    # its host has enqueued as many, but a kernel before them hangs
    entries = [*done, record(3, "scheduled"), record(4, "scheduled"), record(1, "scheduled", group="1")]
    assert standing({"nccl": {"entries": entries}}) == ({"nccl 0": 2, "nccl 1": 0}, None)
    monkeypatch.setenv("TORCH_NCCL_ENABLE_TIMING", "0")  # then nobody can tell
    assert standing({"nccl": {"entries": entries}}).came == {"nccl 0": 4, "nccl 1": 1}


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    torch_dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch_dist.destroy_process_group()


def test_the_recorder_reads_what_ran(alone: None) -> None:
    torch_dist.all_reduce(torch.ones(3, 5))
    recorder = Recorder()
    number = recorder.read(10.0).came["gloo 0"]
    torch_dist.broadcast(torch.ones(7, dtype=torch.int64), src=0)
    wait_until(lambda: recorder.read(10.0).came["gloo 0"] == number + 1)  # it is written down a moment later
    entry = recorder.records["gloo"]["entries"][-1]
    assert collectives._describe(entry) == (
        f"broadcast {number + 1} of group 0, default_pg, on gloo (Long [7]: 56 bytes)"
    )
    # the way to NCCL's records
    assert Handlers().ask("fr_trace_json")["entries"][-1] == entry
    assert communication_error(torch.device("cpu")) == ""


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("TORCH_NCCL_", "TORCH_FR_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")
    monkeypatch.setenv("TORCH_NCCL_ENABLE_TIMING", "0")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    set_defaults(1900.5)
    ours = {name: value for name, value in os.environ.items() if name.startswith(("TORCH_NCCL_", "TORCH_FR_"))}
    assert ours == {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "7",
        "TORCH_NCCL_ENABLE_TIMING": "0",
        "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "3801",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    }
