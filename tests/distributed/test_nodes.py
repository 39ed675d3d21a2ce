"""Several machines, each with its launcher: here as two on loopback."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ig_dist.launching.together import free_port
from tests import forked
from tests.conftest import succeed
from tests.runs import final_tensors, last_step, local, metrics
from tests.waiting import children, wait_until

Write = Callable[..., Path]


def begin(config: Path, port: int, rank: int, *options: str) -> forked.Process:
    where = ["--nodes", "2", "--node-rank", str(rank), "--master", f"127.0.0.1:{port}", "--processes", "1"]
    return forked.Process([*forked.CLI, "launch", *where, *options, config])


def test_a_killed_rank_starts_all_nodes_again_and_leaves_no_trace(tiny_config: Write, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train": {"steps": 30}, "checkpoint": {"every_steps": 7}}
    whole, killed = (tiny_config(name, **settings) for name in ("whole", "killed"))
    run, port = tmp_path / "runs" / "killed", free_port()
    launchers = [begin(killed, port, rank, "--restarts", "2") for rank in (0, 1)]
    wait_until(lambda: last_step(run) >= 10, *launchers)
    (victim,) = children(launchers[1])
    os.kill(victim, signal.SIGKILL)
    succeed(local(whole, 2))
    for launcher in launchers:
        _, errors = launcher.communicate(120)
        assert launcher.returncode == 0 and "exit code 137: started again, 1 of 2\n" in errors, errors
        assert ("error: rank 1 was killed by signal 9" in errors) == (launcher is launchers[1])
    expected, found = final_tensors(tmp_path / "runs" / "whole", 30), final_tensors(run, 30)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert [line["step"] for line in metrics(run)] == list(range(1, 31))


def test_a_signal_to_one_node_saves_and_stops_all(tiny_config: Write, tmp_path: Path) -> None:
    run, port = tmp_path / "runs" / "stopped", free_port()
    config = tiny_config("stopped", train={"steps": 100000}, checkpoint={"every_steps": 100000})
    launchers = [begin(config, port, rank, "--restarts", "2") for rank in (0, 1)]
    wait_until(lambda: last_step(run) >= 5, *launchers)
    launchers[1].send_signal(signal.SIGTERM)
    assert [launcher.wait(60) for launcher in launchers] == [75, 75]
    assert len(list((run / "checkpoints").glob("*/manifest.json"))) == 1
