"""What sites have that a developer's machine has not: users who are not root, nodes with and without GPUs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ig_dist.slurm import watch
from ig_dist.slurm.record import folders
from tests import slurm_accounting
from tests.conftest import ROOT, run_command
from tests.runs import last_step
from tests.slurm_cluster import USER_ID, SlurmCluster
from tests.slurm_runs import TWO, newest, rank_on, same_run, starts, submit, wait_for_end, wait_until, write_config

TRAIN = [sys.executable, ROOT / "launchers/slurm.py", "--nodes", 2, "--follow", "--config"]


def test_an_ordinary_user_trains_on_nodes_whose_gpus_pytorch_does_not_see(
    cluster: SlurmCluster, digits_index: Path
) -> None:
    """It ends at once, with one line; on CPUs where they were asked for."""
    home = cluster.home
    shutil.copytree(digits_index, home / "digits")
    config = write_config(home, home / "digits", steps=4)
    subprocess.run(["chown", "-R", str(USER_ID), home], check=True)
    refused = cluster.as_user("env", "-u", "IG_DIST_DEVICE", *TRAIN, config)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    (start,) = starts(home / "run")
    told = watch.describe(home / "run")["jobs"][0]["said"]
    assert start.next == "stop" and "CUDA_VISIBLE_DEVICES=0,1: 0 of these 2 GPUs are there" in (told or "")
    assert "Traceback" not in refused.stdout and "IG_DIST_DEVICE=cpu" in (told or "")
    notify = f"echo $CODE $REASON > {home}/told"
    more = ["--notify", notify, "--sbatch", "comment=mine", "--srun", "wait=60", *apptainer(home)]
    done = cluster.as_user(*TRAIN, config, *more)
    said = (home / "apptainer.log").read_text().splitlines()
    assert len(said) == 4 and f"--bind {sys.prefix}:{sys.prefix},{home}/run:{home}/run" in said[0], said
    assert done.returncode == 0 and "saved step 4" in done.stdout, done.stdout + done.stderr
    assert (home / "run/config.yaml").stat().st_uid == USER_ID and (home / "told").read_text() == "0 done\n"
    again = cluster.as_user(*TRAIN[:2], "resume", home / "run", "--nodes", 1)
    assert again.returncode == 0 and "is finished: 4 steps" in again.stdout and len(list(folders(home / "run"))) == 2


def apptainer(home: Path) -> list[object]:
    """Options with which ranks start in a container; the program says what it gets, and runs it where it is."""
    (home / "image.sif").touch()
    (home / "bin").mkdir()
    program = home / "bin/apptainer"
    program.write_text(
        f'#!/bin/bash\n[ $1 = exec ] && echo "$@" >> {home}/apptainer.log\n'
        f'while [ "$1" != {home}/image.sif ]; do shift; done; shift; exec "$@"\n'
    )
    program.chmod(0o755)
    path = f"export OMP_NUM_THREADS=1 PATH={home}/bin:$PATH"
    return ["--container", home / "image.sif", "--container-mounts", sys.prefix, "--setup", path]


def test_the_status_of_a_job_that_is_held_and_of_one_whose_controller_is_away(
    cluster: SlurmCluster, tmp_path: Path, digits_index: Path
) -> None:
    run = tmp_path / "run"
    before = cluster.run("sbatch", "--parsable", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 100")
    job = submit("--nodes", 2, "--config", write_config(tmp_path, digits_index, steps=4))

    def told() -> str:
        return run_command(["ig-dist", "slurm", "status", run]).stdout

    wait_until(lambda: "PENDING (Resources, expected to start 2" in told(), "no expected start", run)
    cluster.run("scontrol", "hold", job)
    assert "PENDING (JobHeld" in told() and "held by an administrator" in told(), told()
    mine = run_command(["ig-dist", "slurm", "status"]).stdout
    assert mine.startswith(f"{run}: train job {job}, PENDING"), mine
    cluster.run("scancel", before)
    wait_until(lambda: cluster.run("squeue", "-h", "-o", "%i") == job, "the other job did not end", run)
    cluster.kill_controller()
    newest(run).add_event("start", nodes=["node1"], log=0)
    began = time.monotonic()
    away = run_command(["ig-dist", "slurm", "status", run])
    assert away.returncode == 0 and "SLURM does not answer" in away.stdout and "node1: runs" in away.stdout, away
    assert time.monotonic() - began < 50
    cluster.restart_controller()
    assert cluster.run("squeue", "-h", "-o", "%i") == job


@pytest.mark.full
def test_a_user_with_an_account_and_limits(digits_index: Path) -> None:
    """What the accounting database refuses is told with its option, what it holds back with its reason."""
    if missing := slurm_accounting.available():
        pytest.skip(missing)
    with slurm_accounting.AccountedCluster(nodes=1) as cluster:
        home = cluster.home
        shutil.copytree(digits_index, home / "digits")
        config = write_config(home, home / "digits", steps=4)
        subprocess.run(["chown", "-R", str(USER_ID), home], check=True)
        train = [*TRAIN[:2], "--nodes", 1, "--gpus-per-node", 2, "--config", config]
        for option in ("--account", "--qos"):
            refused = cluster.as_user(*train, option, "shrot")
            assert refused.returncode == 2 and "SLURM refuses" in refused.stderr and option in refused.stderr, refused
        assert not (home / "run").exists()
        train += ["--account", "vision", "--qos", "short"]
        assert cluster.as_user(*train, "--time", "60").returncode == 0
        before = cluster.as_user("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "sleep 100").stdout.strip()

        def told() -> str:
            return cluster.as_user(*TRAIN[:2], "status", home / "run").stdout

        wait_until(lambda: "with a smaller --time" in told(), "no advice", home / "run")
        assert cluster.as_user(*TRAIN[:2], "cancel", home / "run").returncode == 0
        assert cluster.as_user(*train, "--time", "20").returncode == 0
        wait_until(lambda: "PENDING (AssocMaxJobsLimit" in told(), "no reason", home / "run")
        cluster.run("scancel", before)
        wait_until(lambda: not cluster.run("squeue", "-h"), "the jobs did not end", home / "run")
        states = cluster.as_user("sacct", "-nXP", "-o", "state", "--name=train-run").stdout
        assert sorted(line.split()[0] for line in states.splitlines()) == ["CANCELLED", "COMPLETED"], states


@pytest.mark.full
def test_a_first_node_that_is_cut_off_lets_go_of_the_run(
    cluster: SlurmCluster, uninterrupted: Callable[[int], Path], tmp_path: Path, digits_index: Path
) -> None:
    """Long before its ranks have given up on their peers, for whom they wait as long as the config says."""
    whole, run = uninterrupted(120), tmp_path / "run"
    submit("--nodes", "1-2", "--config", write_config(tmp_path, digits_index))
    wait_until(lambda: last_step(run) >= 30, "no steps", run)
    began = time.monotonic()
    cluster.network.cut("node1")
    try:
        wait_for_end(run)
    finally:
        cluster.network.mend("node1")
    print(f"the first node cut off: {time.monotonic() - began:.1f} s until the end on the other")
    ends = starts(run)
    assert [start.nodes for start in ends] == [["node1", "node2"], ["node2"], ["node2"]]
    assert "waited" in ends[1].reason and ends[-1].next == "done"
    assert "cut off from the others" in newest(run).batch_log().read_text()
    same_run(run, whole, bitwise=False)


@pytest.mark.full
def test_all_of_it_in_one_run(
    cluster: SlurmCluster, uninterrupted: Callable[[int], Path], tmp_path: Path, digits_index: Path
) -> None:
    """A rank is killed, a node loses its power without a word, the controller is away, the job is held."""
    steps, run = 1500, tmp_path / "run"
    whole = uninterrupted(steps)
    job = submit(*TWO, "--config", write_config(tmp_path, digits_index, steps))

    def wait_for_steps(more: int) -> None:
        wait_until(lambda: last_step(run) >= before + more, "no steps", run)

    before = 0
    wait_for_steps(100)
    os.kill(rank_on(cluster, "node2"), signal.SIGKILL)
    wait_until(lambda: len(starts(run)) == 2, "not started again", run)
    before = last_step(run)
    wait_for_steps(100)
    cluster.kill_node("node2", noticed=False)
    cluster.wait_for_state("node2", "down")
    cluster.restore_node("node2")
    known = len(starts(run))
    wait_until(lambda: len(starts(run)) > known, "not started again", run)
    before = last_step(run)
    wait_for_steps(100)
    cluster.kill_controller()
    time.sleep(2)
    cluster.restart_controller()
    before = last_step(run)
    wait_for_steps(50)
    wait_until(lambda: "RUNNING" in cluster.run("squeue", "-h", "-o", "%T", check=False), "no controller", run)
    cluster.run("scontrol", "requeuehold", job)
    wait_until(lambda: "PENDING" in cluster.run("squeue", "-h", "-o", "%T", check=False), "not held", run)
    told = run_command(["ig-dist", "slurm", "status", run]).stdout
    assert f"held: scontrol release {job}" in told, told
    cluster.run("scontrol", "release", job)
    wait_for_end(run)
    assert starts(run)[-1].next == "done", starts(run)
    same_run(run, whole, steps)
