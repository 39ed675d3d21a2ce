"""Arrays that encode, sample, sweep and score on a real SLURM cluster: tasks die, and the output is the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ig_dist.slurm.record import folders
from tests.conftest import succeed
from tests.runs import last_step
from tests.slurm_cluster import SlurmCluster
from tests.slurm_runs import TWO, launch, rank_on, same_run, starts, submit, wait_until, write_config

pytestmark = pytest.mark.full
TRAINED = 120


def has_rank(cluster: SlurmCluster, node: str) -> bool:
    return any("ig_dist.slurm.rank" in line and "srun" not in line for line in cluster.processes(node).values())


def wait_for_merge(cluster: SlurmCluster, run: Path) -> None:
    wait_until(lambda: not cluster.run("squeue", "-h"), "the jobs did not end", run)
    for folder, _ in folders(run):
        for task in folder.tasks():
            assert task.events()[-1]["next"] == "done", task.events()


def task_logs(run: Path) -> list[str]:
    """What the tasks of a run's newest array have said."""
    return [log.read_text() for log in list(folders(run))[-2][0].log.glob("task_*_rank_0.log")]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_encoding_with_killed_tasks(cluster: SlurmCluster, tmp_path: Path) -> None:
    encode = ["--source", "digits", "--tokenizer", "pixel", "--samples-per-shard", "100"]
    alone, dest, run = tmp_path / "alone", tmp_path / "dest", tmp_path / "job"
    succeed(["python", "data_prep/encode_latents.py", *encode, "--dest", alone])
    submit("--job", "encode", "--tasks", 3, "--folder", run, *encode, "--dest", dest)
    for node in cluster.nodes:
        wait_until(lambda node=node: has_rank(cluster, node), "no rank", run)  # type: ignore[misc]
        os.kill(rank_on(cluster, node), signal.SIGKILL)
    wait_for_merge(cluster, run)
    assert files(dest) == files(alone)
    ends = [event for folder, _ in folders(run) for task in folder.tasks() for event in task.events()]
    assert [event["next"] for event in ends if event["event"] == "end"].count("again") == 2
    shown = launch("status", run).stdout
    assert "3 COMPLETED" in shown and "Killed (blamed: node" in shown and ") -> again" in shown and "merge job" in shown


def test_a_sampling_with_killed_and_stopped_tasks(
    cluster: SlurmCluster, uninterrupted: Callable[[int], Path], tmp_path: Path
) -> None:
    alone, run = tmp_path / "alone" / "run", tmp_path / "array" / "run"
    for copy in (alone, run):
        shutil.copytree(uninterrupted(TRAINED), copy, ignore=shutil.ignore_patterns("slurm", "samples"))
    options = ["--num", "300", "--steps", "40", "--ig-scale", "1.5"]
    succeed(["ig-dist", "sample", alone, *options])
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
    assert len(list(mine.parent.glob("unit_*.pixel.safetensors"))) == len(list(mine.parent.glob("unit_*"))) / 2
    assert not any("samples.npz" in text for text in task_logs(run))  # it alone


def kept_scores(run: Path) -> dict[str, Any]:
    (file,) = (run / "evaluations").glob("*.json")
    return dict(json.loads(file.read_text())["scores"])


def test_an_evaluation_with_a_killed_task(
    cluster: SlurmCluster, uninterrupted: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IG_DIST_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    shutil.copytree(uninterrupted(TRAINED), run, ignore=shutil.ignore_patterns("slurm", "samples"))
    succeed(["ig-dist", "sample", run, "--num", "100", "sample.unit_size=10", "--evaluate"])
    (plan,) = (file.parent for file in run.glob("samples/*/plan.json"))
    expected, whole = kept_scores(run), files(plan)
    shutil.rmtree(run / "evaluations")
    for file in plan.glob("unit_*.pixel.safetensors"):
        file.unlink()
    submit("--job", "evaluate", "--tasks", 3, "--max-failures", 0, plan)
    wait_until(lambda: has_rank(cluster, "node1"), "no rank", run)
    os.kill(rank_on(cluster, "node1"), signal.SIGKILL)
    wait_until(lambda: not cluster.run("squeue", "-h"), "the jobs did not end", run)
    array, merge = (folder for folder, _ in folders(run))
    assert sorted(task.events()[-1]["next"] for task in array.tasks()) == ["done", "done", "stop"]
    assert merge.events()[-1]["next"] == "done"
    assert files(plan) == whole and kept_scores(run) == expected
    assert "fd_pixel" in (merge.log / "rank_0.log").read_text()  # it alone scores
    assert not any("fd_pixel" in text for text in task_logs(run))


def test_a_reference_of_which_only_the_merge_is_left(cluster: SlurmCluster, digits_index: Path, tmp_path: Path) -> None:
    alone, out, folder = tmp_path / "alone.npz", tmp_path / "array.npz", tmp_path / "job"
    made = ["reference", digits_index, "--extractors", "pixel", "--out"]
    succeed(["ig-dist", *made, alone])
    job = submit("--job", "reference", "--tasks", 2, "--folder", folder, *made[1:], out)
    cluster.run("scancel", job)
    wait_until(lambda: not cluster.run("squeue", "-h"), "the jobs did not end", folder)
    assert list(folders(folder))[1][0].events()[-1]["next"] == "done"
    assert out.read_bytes() == alone.read_bytes() and not Path(f"{out}.parts").exists()


def test_a_training_is_sampled_and_scored_when_it_is_done(
    cluster: SlurmCluster, uninterrupted: Callable[[int], Path], tmp_path: Path, digits_index: Path
) -> None:
    """Not when it is requeued."""
    whole, run = uninterrupted(TRAINED), tmp_path / "run"
    then = ["--then", "sample --num 100", "--then", "evaluate --metrics fd_pixel,label_agreement", "--tasks", 2]
    job = submit(*TWO, "--config", write_config(tmp_path, digits_index), *then)
    wait_until(lambda: last_step(run) >= 30, "no steps", run)
    assert "sample job" in (shown := launch("status", run).stdout) and "PENDING (Dependency)" in shown, shown
    cluster.run("scancel", "--signal=USR2", job)
    wait_for_merge(cluster, run)
    assert [start.next for start in starts(run)] == ["requeue", "done"]
    same_run(run, whole, TRAINED)
    (plan,) = (file.parent for file in run.glob("samples/*/plan.json"))
    scored = [set(json.loads(file.read_text())["scores"]) for file in (run / "evaluations").glob("*.json")]
    assert (plan / "samples.npz").exists() and {"fd_pixel", "label_agreement"} in scored, scored


@pytest.mark.parametrize("halving", [[], ["--halving", "sample.num=64"]], ids=["grid", "halving"])
def test_a_sweep(
    cluster: SlurmCluster, uninterrupted: Callable[[int], Path], tmp_path: Path, halving: list[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted(TRAINED), run, ignore=shutil.ignore_patterns("slurm", "samples"))
    done = launch("--job", "sweep", "--tasks", 2, run, "--ig-scale", "1.0,1.5", *halving)
    assert done.returncode == 0, done.stderr
    wait_for_merge(cluster, run)
    assert len(list((run / "samples").glob("*/plan.json"))) == 2
    (file,) = run.glob("sweeps/*/sweep.json")
    rows = json.loads(file.read_text())["rows"]
    assert sorted(row["num"] for row in rows) == ([32, 64] if halving else [40, 40])
    assert not any("sweep.json" in text for text in task_logs(run))
