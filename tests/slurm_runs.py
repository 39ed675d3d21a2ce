"""Jobs that tests submit to a SLURM cluster, and what became of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from ig_dist.slurm.record import Folder, folders
from ig_dist.slurm.watch import history
from tests import forked, waiting
from tests.conftest import ROOT, run_command, write_tiny_config
from tests.runs import final_tensors, last_step, metrics
from tests.slurm_cluster import SlurmCluster

STEPS = 120
TWO = ("--nodes", 2, "--gpus-per-node", 1)  # a rank each: most of a start is the import of torch
PATIENCE_S = 240.0


class Start(NamedTuple):
    nodes: list[str]
    reason: str
    next: str


def write_config(folder: Path, index: Path, steps: int = STEPS) -> Path:
    return write_tiny_config(folder, index, run={"dir": str(folder / "run")}, train={"steps": steps})


def launch(
    *arguments: object, root: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [root / "launchers/slurm.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root), **(env or {})}
    if root == ROOT:
        return forked.run(command, env=environment)
    return run_command(["python", *command], cwd=root, env=environment)


def submit(*arguments: object, root: Path = ROOT) -> str:
    """Submit; the job's id."""
    done = launch(*arguments, root=root)
    assert done.returncode == 0, done.stderr
    return next(line.split()[1].rstrip(",") for line in done.stdout.splitlines() if line.startswith("job:"))


def copied_checkout(folder: Path) -> Path:
    for part in ("ig_dist", "launchers", "data_prep"):
        shutil.copytree(ROOT / part, folder / "checkout" / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "checkout"


def wait_until(true: Callable[[], object], what: str, run: Path) -> None:
    def told() -> str:
        return "\n".join([what, *(log.read_text()[-1500:] for log in (run / "slurm").glob("*/log/*.log"))])

    waiting.wait_until(true, what=told, timeout_s=PATIENCE_S, every_s=0.05)


def newest(run: Path) -> Folder:
    """Of its trainings."""
    return [folder for folder, submission in folders(run) if submission.kind == "train"][-1]


def starts(run: Path, task: str = "") -> list[Start]:
    """The starts of a run's newest job, with their ends."""
    found = history(Folder(newest(run).path, task), active=True)
    return [Start(s["nodes"], (s["end"] or {}).get("reason", ""), (s["end"] or {}).get("next", "")) for s in found]


def wait_for_end(run: Path) -> None:
    wait_until(lambda: starts(run) and starts(run)[-1].next in ("done", "stop"), "the job did not end", run)


def rank_on(cluster: SlurmCluster, node: str) -> int:
    """The process of one rank of a node."""
    return next(
        pid for pid, line in cluster.processes(node).items() if "ig_dist.slurm.rank" in line and "srun" not in line
    )


def same_run(run: Path, whole: Path, steps: int = STEPS, *, bitwise: bool = True) -> None:
    """The configured steps, each once, on the batches of an undisturbed run; the same weights, averages and moments."""
    mine, theirs = metrics(run), metrics(whole)
    assert [line["step"] for line in mine] == list(range(1, steps + 1))
    assert [line["batch_fingerprint"] for line in mine] == [line["batch_fingerprint"] for line in theirs]
    found, expected = final_tensors(run, steps), final_tensors(whole, steps)
    if bitwise:
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    for a, b in zip(mine, theirs, strict=True):
        assert a["loss"] == b["loss"] if bitwise else a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    for folder in (run / "checkpoints").iterdir():
        assert (folder / "manifest.json").exists()  # none is torn


def goes_on(run: Path, event: Callable[[], object], name: str, *, at: int = 30) -> None:
    """Let an event happen once the run has logged a step, and wait for its end; print the seconds lost."""
    wait_until(lambda: last_step(run) >= at, "no steps", run)
    began, before = time.monotonic(), len(starts(run))
    event()
    top = last_step(run)

    def restarted() -> bool:
        nonlocal top
        if len(starts(run)) == before:
            top = max(top, last_step(run))
            return False
        return last_step(run) > top

    wait_until(restarted, f"{name}: no step after it", run)
    print(f"{name}: {time.monotonic() - began:.1f} s lost")
    wait_for_end(run)
    assert starts(run)[-1].next == "done", starts(run)


def preempt(cluster: SlurmCluster) -> None:
    cluster.run("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
