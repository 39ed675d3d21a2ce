"""Trainings that tests start, with and without a fault in them, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ig_dist.launching import ranks
from tests import forked

GRACE_S = 3.0  # instead of 10 s, of launchers in whose runs a rank does not end


def local(config: Path, processes: int, *overrides: str) -> list[str]:
    return ["python", "launchers/local.py", "--processes", str(processes), str(config), *overrides]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last_step(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def final_tensors(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Weights, EMAs and moments of a checkpoint, else of the last one, whoever wrote them."""
    folder = max((run / "checkpoints").glob("step_*")) if step is None else run / "checkpoints" / f"step_{step:010d}"
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("rank_*.safetensors")):
        tensors.update(safetensors.torch.load_file(file))
    return tensors


def faulty(config: Path, fault: str, rank: int, steps: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The run, with a fault in it, to its end; its exit code is the launcher's."""
    process = start_faulty(config, fault, rank, steps, **environment)
    out, err = process.communicate(300)
    return subprocess.CompletedProcess(["faulty", config], process.wait(), out, err)


def start_faulty(config: Path, fault: str, rank: int, steps: str, **environment: str) -> forked.Process:
    """The run, with a fault in it, begun."""
    fault_at = {"FAULT": fault, "FAULT_RANK": str(rank), "FAULT_STEPS": steps}
    command = ["-m", "tests.distributed.faulty", config]
    return forked.Process(
        command, env={**os.environ, **fault_at, **environment}, before=hurry if fault == "die" else None
    )


def hurry() -> None:
    ranks.GRACE_S = GRACE_S
