"""A rank that hangs ends the run with exit code 5 and a line that names it; a rank that only waits does not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ig_dist.parallel.blame import VARIABLE, blamed, noted_failure
from tests.conftest import ROOT
from tests.distributed.test_training import faulty, last_step, local, metrics

TIMEOUT_S = 4
Write = Callable[..., Path]


def started(config: Path, run: Path, steps: int) -> tuple[subprocess.Popen[str], list[int]]:
    """Launcher and ranks of a run that has done some steps."""
    process = subprocess.Popen(
        [sys.executable, *local(config, 2)[1:]], cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while last_step(run) < steps:
        assert process.poll() is None
        time.sleep(0.01)
    return process, [*map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())]


def hang_lines(errors: str) -> dict[int, str]:
    """What each rank says; nothing else may stand on stderr."""
    lines = {}
    for line in errors.splitlines():
        # torch's store, whose server is stopped; the launcher, of the stopped process
        if line.startswith("[W") or re.fullmatch(r"error: rank \d did not end within 10 s of .* was killed", line):
            continue
        found = re.match(r"error: rank (\d): no progress for \d+ s at ", line)
        assert found, errors
        assert int(found[1]) not in lines, errors
        lines[int(found[1])] = line
    return lines


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named_by_the_other(tiny_config: Write, tmp_path: Path, stopped: int) -> None:
    run = tmp_path / "runs" / "stopped"
    config = tiny_config("stopped", train={"steps": 100000, "timeout_s": TIMEOUT_S})
    process, ranks = started(config, run, 5)
    os.kill(ranks[stopped], signal.SIGSTOP)
    began = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 5, errors
    assert time.monotonic() - began < TIMEOUT_S + 20  # the launcher gives a stopped process 10 s
    other = 1 - stopped
    (line,) = hang_lines(errors).values()
    assert f"error: rank {other}: " in line and re.search(r"at step \d+, (data|backward|agree|log)", line), line
    named = r"behind: rank 1 \((step \d+, )?[\w-]+, does not answer\)" if stopped else "behind: rank 0 or its machine"
    assert re.search(named, line), line
    stacks = (run / "hang" / f"rank_{other:05d}.txt").read_text()
    assert str(run / "hang" / f"rank_{other:05d}.txt") in line
    assert "trainer.py" in stacks and "watchdog.py" in stacks  # of all threads
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


@pytest.mark.parametrize("fault", ["sleep", "read"])
def test_a_rank_that_hangs_ends_all_and_is_named_by_all(tiny_config: Write, tmp_path: Path, fault: str) -> None:
    config = tiny_config(fault, train={"timeout_s": TIMEOUT_S})
    file = tmp_path / "blame"
    done = faulty(config, fault, rank=1, steps="7", **{VARIABLE: str(file)})
    assert done.returncode == 5, done.stderr
    lines = hang_lines(done.stderr)
    assert sorted(lines) == [0, 1]
    assert "rank 1: no progress for " in lines[1] and "at step 7, forward; behind: rank 1 (step 7, forward" in lines[1]
    assert blamed(file) == {1}
    assert re.search(r"at step 7, backward; behind: rank 1 \(step 7, forward, for \d+ s\)", lines[0])
    culprit = (tmp_path / "runs" / fault / "hang" / "rank_00001.txt").read_text()
    assert "training_loss" in culprit and "faulty.py" in culprit


@pytest.mark.parametrize("fault,rank", [("raise", 0), ("memory", 1)])
def test_an_error_of_one_rank_is_no_hang(tiny_config: Write, tmp_path: Path, fault: str, rank: int) -> None:
    """Also where nothing can be closed after it: the groups of NCCL wait for peers, a stream for its storage."""
    config = tiny_config(fault, train={"timeout_s": 60})
    file = tmp_path / "blame"
    began = time.monotonic()
    done = faulty(config, fault, rank=rank, steps="7", **{VARIABLE: str(file)})
    assert time.monotonic() - began < 50  # a hang of 60 s is none that the watchdog sees
    assert "behind" not in done.stderr and not blamed(file)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith(f"error: rank {rank}: ")]
    noted = noted_failure(file)
    if fault == "memory":
        assert done.returncode == 7 and "Traceback" not in done.stderr, done.stderr
        assert "out of memory at step 7, forward, with 16 rows" in line and "train.accumulation=2" in line
    else:
        assert done.returncode == 1 and done.stderr.count("Traceback") == 1, done.stderr
        assert "failed at step 7, forward: RuntimeError: a planted error" in line and "of two lines" in done.stderr
        assert f"error: rank {1 - rank} ends: {noted}" in done.stderr
    assert line == f"error: {noted}"


def test_a_long_wait_for_a_storage_is_no_hang(tiny_config: Write, tmp_path: Path) -> None:
    """The storage has a deadline of its own; the ranks that wait for this one see that it is within it."""
    config = tiny_config("late", train={"steps": 12, "timeout_s": TIMEOUT_S})
    done = faulty(config, "late", rank=1, steps="7", FAULT_S=str(2 * TIMEOUT_S))
    assert done.returncode == 0, done.stderr
    line = next(line for line in metrics(tmp_path / "runs" / "late") if line["step"] == 7)
    assert line["data_wait_s"] > 1.9 * TIMEOUT_S  # of the rank that waited, not of the first


def test_a_suspended_job_goes_on(tiny_config: Write, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "suspended"
    config = tiny_config("suspended", train={"steps": 400, "timeout_s": TIMEOUT_S})
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
    done = subprocess.run(
        [sys.executable, "-m", "ig_dist.cli", "train", str(config)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert "error: rank 0: not all of the 2 processes came" in done.stderr and "Traceback" not in done.stderr
