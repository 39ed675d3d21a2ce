"""A rank that hangs ends the run with exit code 5 and a line that names it; a rank that only waits does not."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ig_dist.checkpoints.store import CheckpointStore
from ig_dist.export import ALONE
from ig_dist.parallel.blame import VARIABLE, blamed, noted_failure
from ig_dist.parallel.collectives import RECORDS
from tests import forked
from tests.conftest import write_tiny_config
from tests.runs import GRACE_S, hurry, last_step, local, metrics, start_faulty
from tests.waiting import alive, children, wait_until

TIMEOUT_S = 4
HANG = (1, {"timeout_s": TIMEOUT_S})
# faults whose runs are side by side, since their time passes in waiting: the rank, and the settings of its run
TOGETHER: list[dict[str, tuple[int, dict[str, Any]]]] = [
    {"sleep": HANG, "read": HANG},
    {"mute": HANG, "stall": HANG, "stalls": HANG},
    {"raise": (0, {"timeout_s": 60}), "memory": (1, {"timeout_s": 60}), "late": (1, {"steps": 12, **HANG[1]})},
]
Write = Callable[..., Path]


class Stopped(NamedTuple):
    run: Path
    process: forked.Process
    ranks: list[int]
    errors: str
    seconds: float


def started(config: Path, run: Path, steps: int) -> tuple[forked.Process, list[int]]:
    """Launcher and ranks of a run that has done some steps."""
    process = forked.Process(local(config, 2)[1:], before=hurry)
    wait_until(lambda: last_step(run) >= steps, process)
    return process, children(process)


def hang_lines(errors: str) -> dict[int, str]:
    """What each rank says; nothing else may stand on stderr."""
    lines = {}
    for line in errors.splitlines():
        # torch's store, whose server is stopped; the launcher, of the stopped process
        if re.match(r"(\[rank\d\]:)?\[W", line) or re.fullmatch(
            r"error: rank \d did not end within 3 s of .* was killed", line
        ):
            continue
        found = re.match(r"error: rank (\d): no progress for \d+ s at ", line)
        assert found, errors
        assert int(found[1]) not in lines, errors
        lines[int(found[1])] = line
    return lines


def test_ranks_without_their_launcher_save_and_stop(tiny_config: Write, tmp_path: Path) -> None:
    """torchrun that was killed, or that SIGUSR2 ended, leaves its ranks with the run locked."""
    run = tmp_path / "runs" / "orphans"
    process, ranks = started(tiny_config("orphans", train={"steps": 100000}), run, 5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(alive(rank) for rank in ranks))
    checkpoint = CheckpointStore(str(run / "checkpoints")).find(ALONE)
    assert checkpoint is not None and checkpoint.step == last_step(run) >= 5


@pytest.fixture(scope="module")
def stops(tmp_path_factory: pytest.TempPathFactory, digits_index: Path) -> list[Stopped]:
    """Two runs side by side: most of their time passes in waiting. In one rank 0 was stopped, in the other rank 1."""
    folder, begun = tmp_path_factory.mktemp("stops"), []
    for stopped in (0, 1):
        run, train = folder / "runs" / f"{stopped}", {"steps": 100000, "timeout_s": TIMEOUT_S}
        process, ranks = started(write_tiny_config(folder, digits_index, f"{stopped}", train=train), run, 5)
        os.kill(ranks[stopped], signal.SIGSTOP)
        begun.append((run, process, ranks, time.monotonic()))
    return [
        Stopped(run, process, ranks, process.communicate(timeout=120)[1], time.monotonic() - began)
        for run, process, ranks, began in begun
    ]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named_by_the_other(stops: list[Stopped], stopped: int) -> None:
    run, process, ranks, errors, seconds = stops[stopped]
    assert process.returncode == 5, errors
    assert seconds < TIMEOUT_S + GRACE_S + 10
    other = 1 - stopped
    (line,) = hang_lines(errors).values()
    assert f"error: rank {other}: " in line and re.search(r"at step \d+, (data|backward|agree|log)", line), line
    named = r"behind: rank 1 \((step \d+, )?[\w-]+, does not answer\)" if stopped else "behind: rank 0 or its machine"
    assert re.search(named, line), line
    stacks = (run / "hang" / f"rank_{other:05d}.txt").read_text()
    assert str(run / "hang" / f"rank_{other:05d}.txt") in line
    assert "trainer.py" in stacks and "watchdog.py" in stacks  # of all threads
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


class Ended(NamedTuple):
    code: int
    errors: str
    run: Path
    blame: Path
    seconds: float


class Faults(dict[str, Ended]):
    """Runs in which a rank hangs at step 7, waits for its data, or fails; a group begins when one of it is wanted."""

    def __init__(self, folder: Path, index: Path) -> None:
        super().__init__()
        self._folder, self._index = folder, index

    def __missing__(self, wanted: str) -> Ended:
        processes, began = {}, time.monotonic()
        for fault, (rank, train) in next(group for group in TOGETHER if wanted in group).items():
            config = write_tiny_config(self._folder, self._index, fault, train=train)
            (self._folder / fault).mkdir()
            environment = {VARIABLE: str(self._folder / fault / "blame"), "FAULT_S": str(2 * TIMEOUT_S)}
            processes[fault] = start_faulty(config, fault, rank, "7", **environment)
        for fault, process in processes.items():
            errors, run = process.communicate(120)[1], self._folder / "runs" / fault
            blame = self._folder / fault / "blame"
            self[fault] = Ended(process.wait(), errors, run, blame, time.monotonic() - began)
        return self[wanted]


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory, digits_index: Path) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults"), digits_index)


@pytest.mark.parametrize("fault", ["sleep", "read"])
def test_a_rank_that_hangs_ends_all_and_is_named_by_all(faults: Faults, fault: str) -> None:
    code, errors, run, blame, _ = faults[fault]
    assert code == 5, errors
    lines = hang_lines(errors)
    assert sorted(lines) == [0, 1]
    assert "rank 1: no progress for " in lines[1] and "at step 7, forward; behind: rank 1 (step 7, forward" in lines[1]
    assert blamed(blame) == {1}
    assert re.search(r"at step 7, backward; behind: rank 1 \(step 7, forward, for \d+ s\)", lines[0])
    culprit = (run / "hang" / "rank_00001.txt").read_text()
    assert "training_loss" in culprit and "faulty.py" in culprit


REDUCE = r"all_reduce \d+ of group 0, default_pg, on gloo \(\w+ \[\d+\]: [\d,]+ bytes\)"


def test_a_collective_that_hangs_is_named_with_who_did_not_come(faults: Faults) -> None:
    """Both ranks are in their backward pass: only the records tell them apart."""
    code, errors, run, blame, seconds = faults["mute"]
    assert code == 5 and seconds < TIMEOUT_S + GRACE_S + 30, errors
    lines = hang_lines(errors)
    assert re.search(
        rf"at step 7, backward; waits for \d+ s in {REDUCE}, to which rank 1 did not come\. The stacks", lines[0]
    )
    assert re.search(
        rf"at step 7, backward; rank 0 waits for \d+ s in {REDUCE}, to which rank 1 did not come\. The", lines[1]
    )
    assert blamed(blame) == {1}
    newest = []
    for rank in (0, 1):
        entries = json.loads((run / "hang" / f"rank_{rank:05d}.json").read_text())["gloo"]["entries"]
        assert 10 < len(entries) <= RECORDS
        newest.append((entries[-1]["collective_seq_id"], [entry["retired"] for entry in entries].count(False)))
    assert newest[0][0] > newest[1][0] and newest[0][1] >= 1 and newest[1][1] == 0


def test_a_device_that_stands_still_is_named_though_its_host_ran_on(faults: Faults) -> None:
    code, errors, _, blame, _ = faults["stall"]
    assert code == 5, errors
    lines = hang_lines(errors)
    named = r"behind: rank 1 \(step 7, forward on its device, for \d+ s\)"
    assert re.search(rf"at step 7, log; {named}; waits for \d+ s in all_reduce", lines[0])
    assert re.search(rf"at step 7, forward on its device \(the host is at step 7, log\); {named}; rank 0 w", lines[1])
    assert blamed(blame) == {1}


def test_nobody_is_blamed_where_all_stand_at_the_same_place(faults: Faults) -> None:
    code, errors, _, blame, _ = faults["stalls"]
    assert code == 5, errors
    for line in hang_lines(errors).values():
        assert "at step 7, forward on its device (the host is at step 7, log)" in line
        assert "; no rank is behind another; no machine is blamed. The stacks" in line
    assert not blamed(blame)


@pytest.mark.parametrize("fault,rank", [("raise", 0), ("memory", 1)])
def test_an_error_of_one_rank_is_no_hang(faults: Faults, fault: str, rank: int) -> None:
    """Also where nothing can be closed after it: the groups of NCCL wait for peers, a stream for its storage."""
    code, errors, run, blame, seconds = faults[fault]
    assert json.loads((run / "hang" / f"rank_{rank:05d}.json").read_text())["gloo"]["entries"]
    assert seconds < 50  # a hang of 60 s is none that the watchdog sees
    assert "behind" not in errors and not blamed(blame)
    (line,) = [line for line in errors.splitlines() if line.startswith(f"error: rank {rank}: ")]
    noted = noted_failure(blame)
    if fault == "memory":
        assert code == 7 and "Traceback" not in errors, errors
        assert "out of memory at step 7, forward, with 16 rows" in line and "train.accumulation=2" in line
    else:
        assert code == 1 and errors.count("Traceback") == 1, errors
        assert "failed at step 7, forward: RuntimeError: a planted error" in line and "of two lines" in errors
        assert f"error: rank {1 - rank} ends: {noted}" in errors
    assert line == f"error: {noted}"


def test_a_long_wait_for_a_storage_is_no_hang(faults: Faults) -> None:
    """The storage has a deadline of its own; the ranks that wait for this one see that it is within it."""
    assert faults["late"].code == 0, faults["late"].errors
    line = next(line for line in metrics(faults["late"].run) if line["step"] == 7)
    assert line["data_wait_s"] > 1.9 * TIMEOUT_S  # of the rank that waited, not of the first


def test_a_suspended_job_goes_on(tiny_config: Write, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "suspended"
    config = tiny_config("suspended", train={"steps": 60, "timeout_s": TIMEOUT_S})
    process, ranks = started(config, run, 5)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in ranks:
            os.kill(rank, number)
        time.sleep(1.5 * TIMEOUT_S if number == signal.SIGSTOP else 0)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def test_a_rank_that_never_comes_is_said(tiny_config: Write) -> None:
    alone: dict[str, Any] = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    environment = {**os.environ, **alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    config = tiny_config("alone", train={"timeout_s": 2})
    done = forked.run([*forked.CLI, "train", config], env=environment)
    assert done.returncode == 5, done.stderr
    assert "error: rank 0: not all of the 2 processes came" in done.stderr and "Traceback" not in done.stderr
