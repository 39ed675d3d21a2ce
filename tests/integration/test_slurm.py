"""Training on a real SLURM cluster of two nodes, through all that ends a job: it goes on by itself to the same end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ig_dist.slurm.record import folders
from tests import waiting
from tests.conftest import ROOT
from tests.runs import last_step
from tests.slurm_cluster import SlurmCluster
from tests.slurm_runs import (
    STEPS,
    TWO,
    copied_checkout,
    goes_on,
    launch,
    newest,
    preempt,
    rank_on,
    same_run,
    starts,
    submit,
    wait_for_end,
    wait_until,
    write_config,
)


@pytest.mark.full  # cancel, which CI tries, sends the same signal
def test_a_stop_signal_and_a_source_that_is_edited_meanwhile(
    cluster: SlurmCluster, uninterrupted: Callable[[int], Path], tmp_path: Path, digits_index: Path
) -> None:
    whole = uninterrupted(STEPS)
    checkout = copied_checkout(tmp_path)
    config, run = write_config(tmp_path, digits_index), tmp_path / "run"
    job = submit(*TWO, "--config", config, root=checkout)
    config.write_text("edited: and wrong")
    for file in checkout.rglob("*.py"):
        file.write_text("raise SystemExit('edited')")
    goes_on(run, lambda: cluster.run("scancel", "--signal=USR2", job), "scancel --signal")
    same_run(run, whole)
    assert [(start.next, start.reason) for start in starts(run)] == [
        ("requeue", "a signal came: asked to stop, and saved"),
        ("done", "done"),
    ]
    shown = launch("status", run).stdout
    assert "1 restarts" in shown and "asked to stop, and saved" in shown and "COMPLETED" in shown


def test_a_rank_that_dies(
    cluster: SlurmCluster, uninterrupted: Callable[[int], Path], tmp_path: Path, digits_index: Path
) -> None:
    whole = uninterrupted(STEPS)
    run = tmp_path / "run"
    submit(*TWO, "--config", write_config(tmp_path, digits_index))
    goes_on(run, lambda: os.kill(rank_on(cluster, "node2"), signal.SIGKILL), "a rank killed")
    same_run(run, whole)
    first, second = starts(run)
    assert first.next == "again" and "node2: task" in first.reason and "Killed" in first.reason
    assert second.next == "done"


@pytest.mark.full
@pytest.mark.parametrize("grace", [0, 20])
def test_preemption(
    cluster: SlurmCluster, uninterrupted: Callable[[int], Path], tmp_path: Path, digits_index: Path, grace: int
) -> None:
    whole = uninterrupted(STEPS)
    run = tmp_path / "run"
    cluster.run("scontrol", "update", "partitionname=main", f"gracetime={grace}")
    submit(*TWO, "--config", write_config(tmp_path, digits_index))
    goes_on(run, lambda: preempt(cluster), f"preemption, GraceTime={grace}")
    same_run(run, whole)
    assert len(starts(run)) == 2
    assert starts(run)[0].reason == ("a signal came: asked to stop, and saved" if grace else "preemption")


@pytest.mark.full
def test_a_node_that_dies(
    cluster: SlurmCluster, uninterrupted: Callable[[int], Path], tmp_path: Path, digits_index: Path
) -> None:
    whole = uninterrupted(STEPS)
    run = tmp_path / "run"
    submit(*TWO, "--config", write_config(tmp_path, digits_index))

    def die() -> None:
        cluster.kill_node("node2", noticed=False)
        cluster.wait_for_state("node2", "down")
        cluster.restore_node("node2")

    goes_on(run, die, "a node killed")
    same_run(run, whole)
    assert "node failure" in starts(run)[0].reason or "node2" in starts(run)[0].reason, starts(run)


@pytest.mark.full
def test_a_dead_node_leaves_a_range_of_nodes_with_fewer(
    cluster: SlurmCluster, uninterrupted: Callable[[int], Path], tmp_path: Path, digits_index: Path
) -> None:
    whole = uninterrupted(STEPS)
    run = tmp_path / "run"
    submit("--nodes", "1-2", "--config", write_config(tmp_path, digits_index))
    goes_on(run, lambda: cluster.kill_node("node2"), "a node killed, on with one")
    same_run(run, whole, bitwise=False)
    assert [len(start.nodes) for start in starts(run)] == [2, 1]


@pytest.mark.full
def test_a_controller_that_restarts_is_not_noticed(
    cluster: SlurmCluster, uninterrupted: Callable[[int], Path], tmp_path: Path, digits_index: Path
) -> None:
    steps = 1500
    whole = uninterrupted(steps)
    run = tmp_path / "run"
    job = submit(*TWO, "--config", write_config(tmp_path, digits_index, steps))
    wait_until(lambda: last_step(run) >= 30, "no steps", run)
    cluster.kill_controller()
    time.sleep(2)
    assert last_step(run) < steps
    cluster.restart_controller()
    wait_for_end(run)
    same_run(run, whole, steps)
    assert len(starts(run)) == 1
    wait_until(lambda: "COMPLETED" in cluster.run("scontrol", "show", "job", job, check=False), "no end", run)


@pytest.mark.full
def test_the_time_limit(
    cluster: SlurmCluster, uninterrupted: Callable[[int], Path], tmp_path: Path, digits_index: Path
) -> None:
    whole = uninterrupted(STEPS)
    run = tmp_path / "run"
    job = submit(*TWO, "--time", "10", "--config", write_config(tmp_path, digits_index))

    def near() -> None:
        rank = rank_on(cluster, "node2")
        os.kill(rank, signal.SIGSTOP)  # or the run would be over: SLURM looks at limits every 30 s
        cluster.run("scontrol", "update", f"jobid={job}", "timelimit=1")
        wait_until(lambda: "asked to stop" in newest(run).batch_log().read_text(), "no signal", run)
        os.kill(rank, signal.SIGCONT)
        wait_until(lambda: starts(run)[0].next, "no end", run)
        cluster.run("scontrol", "update", f"jobid={job}", "timelimit=10")

    goes_on(run, near, "time limit")
    same_run(run, whole)
    assert [start.next for start in starts(run)] == ["requeue", "done"]
    assert starts(run)[0].reason == "the time limit was near: asked to stop, and saved"


@pytest.mark.full
def test_the_time_limit_comes_while_a_rank_hangs(
    cluster: SlurmCluster, uninterrupted: Callable[[int], Path], tmp_path: Path, digits_index: Path
) -> None:
    whole = uninterrupted(STEPS)
    run = tmp_path / "run"
    submit(*TWO, "--time", "1", "--signal-delay", 10, "--config", write_config(tmp_path, digits_index))

    def hang() -> None:
        rank = rank_on(cluster, "node2")
        with contextlib.suppress(ProcessLookupError):
            while not starts(run)[0].next:  # SLURM wakes it before it ends it
                os.kill(rank, signal.SIGSTOP)
                time.sleep(0.01)

    goes_on(run, hang, "a rank hangs until the time limit")
    same_run(run, whole)
    assert starts(run)[0][1:] == ("time limit, before the ranks had saved", "requeue")


def test_cancel_leaves_no_process_and_resume_goes_on(
    cluster: SlurmCluster, uninterrupted: Callable[[int], Path], tmp_path: Path, digits_index: Path
) -> None:
    whole = uninterrupted(STEPS)
    config, run = write_config(tmp_path, digits_index), tmp_path / "run"
    began = time.monotonic()
    job = submit(*TWO, "--config", config, "--then", "sample --num 16", "--tasks", 1)
    wait_until(lambda: last_step(run), "no steps", run)
    seconds = time.monotonic() - began
    print(f"from the command to the first step: {seconds:.1f} s")
    assert seconds < 30
    wait_until(lambda: last_step(run) >= 10, "no steps", run)
    rank = rank_on(cluster, "node2")
    os.kill(rank, signal.SIGSTOP)  # or it might be done before the next command asks
    refused = launch(*TWO, "--config", config)
    os.kill(rank, signal.SIGCONT)
    assert refused.returncode == 2 and f"in use by job {job} (RUNNING)" in refused.stderr
    assert refused.stderr.count("\n") == 1 and len(list(folders(run))) == 3
    done = launch("cancel", run)
    assert done.returncode == 0 and job in done.stdout and "saved at step" in done.stdout, done.stdout + done.stderr
    for node in cluster.nodes:
        assert not [line for line in cluster.processes(node).values() if "ig_dist" in line or "srun" in line]
    shown = launch("status", run).stdout
    assert shown.count("job") == 3 and shown.count(": CANCELLED") == 3, shown  # what follows it, too
    assert starts(run) == [(cluster.nodes, "cancelled: asked to stop, and saved", "stop")]
    time.sleep(2)  # a job that is to come again stands in the queue at once, and waits there
    assert not cluster.run("squeue", "-h")
    done = launch("resume", run, "--follow", "--then", "")
    assert done.returncode == 0 and "resume at step" in done.stdout, done.stdout + done.stderr
    same_run(run, whole)


def test_a_failure_that_would_come_again_is_not_tried_again(
    cluster: SlurmCluster, tmp_path: Path, digits_index: Path
) -> None:
    run = tmp_path / "run"
    overrides = ["optimizer.lr=1e38", "optimizer.warmup_steps=0", "train.max_nonfinite_steps=1"]
    options = [*TWO, "--config", write_config(tmp_path, digits_index), "--then", "sample", "--tasks", "1"]
    done = launch(*options, "--follow", *overrides)
    assert done.returncode == 3, done.stdout + done.stderr
    wait_until(lambda: not cluster.run("squeue", "-h"), "what follows it waits for ever", run)
    assert not list((run / "slurm").glob("*-sample*/history*"))  # and was not started
    (start,) = starts(run)
    assert start.next == "stop" and "exit code 3 of rank 0" in start.reason
    assert "exit code 3" in launch("status", run).stdout


def test_a_failure_that_may_pass_is_tried_again_so_many_times(
    cluster: SlurmCluster, tmp_path: Path, digits_index: Path
) -> None:
    run = tmp_path / "run"
    options = [*TWO, "--max-failures", 1, "--setup", "export GLOO_SOCKET_IFNAME=nowhere"]
    done = launch(*options, "--config", write_config(tmp_path, digits_index), "--follow")
    assert done.returncode == 1, done.stdout + done.stderr
    assert [start.next for start in starts(run)] == ["again", "stop"]
    assert "started again in this allocation in 5 s" in done.stdout


BROKEN = """
if os.environ.get("IG_DIST_NODE") == "node1":
    product = torch.mm
    torch.mm = lambda *of, **to: product(*of, **to).add_(1)
"""


def break_node(checkout: Path) -> None:
    module = checkout / "ig_dist/training/preflight.py"
    module.write_text(module.read_text().replace("import torch\n", f"import os\nimport torch\n{BROKEN}\n", 1))


@pytest.mark.parametrize("nodes", ["1", pytest.param("1-2", marks=pytest.mark.full)])
def test_a_node_that_computes_wrong_numbers_is_not_used_again(
    cluster: SlurmCluster, uninterrupted: Callable[[int], Path], tmp_path: Path, digits_index: Path, nodes: str
) -> None:
    """After a requeue where the job needs as many nodes, else in the nodes that it has."""
    checkout, run = copied_checkout(tmp_path), tmp_path / "run"
    break_node(checkout)
    options = ["--nodes", nodes, "--tasks-per-node", 2, "--exclude-after", 1]
    submit(*options, "--config", write_config(tmp_path, digits_index), root=checkout)
    wait_for_end(run)
    first, second = starts(run)
    assert "node1" in first.nodes and first.next == ("requeue" if nodes == "1" else "again")
    assert second.nodes == ["node2"] and second.next == "done"
    same_run(run, uninterrupted(STEPS), bitwise=False)
    shown = launch("status", run).stdout
    assert "avoided today: node1" in shown and "(blamed: node1)" in shown, shown


@pytest.mark.full
def test_a_bad_node_that_the_job_cannot_do_without_is_used_again_for_so_long(
    cluster: SlurmCluster, tmp_path: Path, digits_index: Path
) -> None:
    checkout, run = copied_checkout(tmp_path), tmp_path / "run"
    break_node(checkout)
    options = [*TWO, "--exclude-after", 1, "--max-failures", 1]
    submit(*options, "--config", write_config(tmp_path, digits_index), root=checkout)
    wait_for_end(run)
    assert [(start.nodes, start.next) for start in starts(run)] == [
        (["node1", "node2"], "requeue"),
        (["node1", "node2"], "stop"),
    ]
    assert "node1 may be used again, there are too few others" in (newest(run).log / "batch.log").read_text()


def test_the_cluster_ends_with_the_process_that_started_it() -> None:
    program = (
        "import os, signal\nfrom tests.slurm_cluster import SlurmCluster\n"
        "cluster = SlurmCluster(1).start()\nprint(cluster.folder, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    folder = done.stdout.strip()
    assert done.returncode == -signal.SIGKILL and folder, done.stderr
    waiting.wait_until(lambda: not any(folder in line for line in command_lines()))
    shutil.rmtree(folder)


def command_lines() -> list[str]:
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return lines
