"""Arrays that encode and sample on a real SLURM cluster: tasks die, and the output is the same."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ig_dist.slurm.record import folders
from tests.conftest import run_command
from tests.integration.test_slurm import (  # noqa: F401  (fixtures)
    cluster,
    launch,
    rank_on,
    submit,
    uninterrupted,
    wait_until,
)
from tests.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.full
TRAINED = 120


def has_rank(cluster: SlurmCluster, node: str) -> bool:  # noqa: F811
    return any("ig_dist.slurm.rank" in line and "srun" not in line for line in cluster.processes(node).values())


def wait_for_merge(cluster: SlurmCluster, run: Path) -> None:  # noqa: F811
    wait_until(lambda: not cluster.run("squeue", "-h"), "the jobs did not end", run)
    for folder, _ in folders(run):
        for task in folder.tasks():
            assert folder.events(task)[-1]["next"] == "done", folder.events(task)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_encoding_with_killed_tasks(cluster: SlurmCluster, tmp_path: Path) -> None:  # noqa: F811
    encode = ["--source", "digits", "--tokenizer", "pixel", "--samples-per-shard", "100"]
    alone, dest, run = tmp_path / "alone", tmp_path / "dest", tmp_path / "job"
    assert run_command(["python", "data_prep/encode_latents.py", *encode, "--dest", alone]).returncode == 0
    submit("--job", "encode", "--tasks", 3, "--folder", run, *encode, "--dest", dest)
    for node in cluster.nodes:
        wait_until(lambda node=node: has_rank(cluster, node), "no rank", run)  # type: ignore[misc]
        os.kill(rank_on(cluster, node), signal.SIGKILL)
    wait_for_merge(cluster, run)
    assert files(dest) == files(alone)
    ends = [event for folder, _ in folders(run) for task in folder.tasks() for event in folder.events(task)]
    assert [event["next"] for event in ends if event["event"] == "end"].count("again") == 2
    shown = launch("status", run).stdout
    assert "3 COMPLETED" in shown and "Killed (blamed: node" in shown and ") -> again" in shown and "merge job" in shown


def test_a_sampling_with_killed_and_stopped_tasks(
    cluster: SlurmCluster,  # noqa: F811
    uninterrupted: Callable[[int], Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    alone, run = tmp_path / "alone" / "run", tmp_path / "array" / "run"
    for copy in (alone, run):
        shutil.copytree(uninterrupted(TRAINED), copy, ignore=shutil.ignore_patterns("slurm", "samples"))
    options = ["--num", "300", "--steps", "40", "--ig-scale", "1.5"]
    assert run_command(["ig-dist", "sample", alone, *options]).returncode == 0
    job = submit("--job", "sample", "--tasks", 3, run, *options)
    wait_until(lambda: list(run.glob("samples/*/unit_*")), "no units", run)
    os.kill(rank_on(cluster, "node1"), signal.SIGKILL)
    cluster.run("scancel", "--signal=USR2", f"{job}_2", check=False)
    wait_for_merge(cluster, run)
    mine, theirs = (next(iter(folder.glob("samples/*/samples.npz"))) for folder in (run, alone))
    assert mine.parent.name == theirs.parent.name
    with np.load(mine) as a, np.load(theirs) as b:
        assert all(np.array_equal(a[name], b[name]) for name in ("arr_0", "arr_1"))
    assert list((run / "evaluations").glob("*.json"))  # the merge scores too


def test_a_sweep(cluster: SlurmCluster, uninterrupted: Callable[[int], Path], tmp_path: Path) -> None:  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(uninterrupted(TRAINED), run, ignore=shutil.ignore_patterns("slurm", "samples"))
    done = launch("--job", "sweep", "--tasks", 2, run, "--ig-scale", "1.0,1.5")
    assert done.returncode == 0, done.stderr
    wait_for_merge(cluster, run)
    assert (run / "sweep.json").exists() and len(list((run / "samples").glob("*/plan.json"))) == 2
