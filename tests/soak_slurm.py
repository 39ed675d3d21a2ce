"""A round of a campaign of faults on a real SLURM cluster: the job of a training, through what befalls jobs there."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.slurm_cluster import SlurmCluster
from tests.slurm_runs import launch, newest, preempt, rank_on, same_run, starts, submit, write_config
from tests.soak_campaign import Broken, Campaign

STEPS = 240


class Job(NamedTuple):
    """A job that can be hurt."""

    cluster: SlurmCluster
    run: Path
    draw: random.Random

    @property
    def number(self) -> str:
        return newest(self.run).id

    @property
    def ended(self) -> bool:
        found = starts(self.run)
        return bool(found) and found[-1].next in ("done", "stop")

    def rank(self) -> int:
        return rank_on(self.cluster, self.draw.choice(self.cluster.nodes))


def rank_killed(job: Job) -> None:
    os.kill(job.rank(), signal.SIGKILL)


def rank_stands_still(job: Job) -> None:
    os.kill(rank := job.rank(), signal.SIGSTOP)
    time.sleep(job.draw.uniform(0.2, 2.0))
    os.kill(rank, signal.SIGCONT)


def node_lost(job: Job, *, noticed: bool) -> None:
    node = job.draw.choice(job.cluster.nodes)
    job.cluster.kill_node(node, noticed=noticed)
    if not noticed:
        job.cluster.wait_for_state(node, "down")
    job.cluster.restore_node(node)


def controller_killed(job: Job) -> None:
    job.cluster.kill_controller()
    time.sleep(job.draw.uniform(0.2, 4.0))
    job.cluster.restart_controller()


def requeued(job: Job) -> None:
    job.cluster.run("scontrol", "requeue", job.number)


def preempted(job: Job, *, grace_s: int) -> None:
    job.cluster.run("scontrol", "update", "partitionname=main", f"gracetime={grace_s}")
    preempt(job.cluster)


def asked_to_stop(job: Job) -> None:
    job.cluster.run("scancel", "--signal=USR2", job.number)


def cancelled_and_resumed(job: Job) -> None:
    for verb in ("cancel", "resume"):
        done = launch(verb, job.run)
        if "Traceback" in done.stdout + done.stderr or (done.returncode and not job.ended):
            raise Broken(f"{verb}: exit code {done.returncode}: {done.stderr[-800:]}")


EVENTS: dict[str, Callable[[Job], None]] = {
    "a rank killed": rank_killed,
    "a rank stands still": rank_stands_still,
    "a node lost": partial(node_lost, noticed=False),
    "a node lost, and SLURM told": partial(node_lost, noticed=True),
    "the controller killed": controller_killed,
    "scontrol requeue": requeued,
    "preemption": partial(preempted, grace_s=0),
    "preemption after a grace time": partial(preempted, grace_s=20),
    "scancel --signal": asked_to_stop,
    "cancel and resume": cancelled_and_resumed,
}


def slurm(campaign: Campaign, folder: Path, start_cluster: Callable[[], SlurmCluster]) -> list[str]:
    """The job ends with the weights of one that nothing happened to, on the same batches, each step once."""
    cluster, suffered = start_cluster(), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**cluster.environment(), "IG_DIST_CLUSTER": ""}.items():
            patch.setenv(name, value)
        try:
            if "slurm" not in campaign.whole:
                began = time.monotonic()
                suffer(campaign, Job(cluster, write(campaign, campaign.folder / "whole slurm"), campaign.draw), 0, [])
                campaign.seconds["slurm"] = time.monotonic() - began
                campaign.whole["slurm"] = campaign.folder / "whole slurm" / "run"
            job = Job(cluster, write(campaign, folder), campaign.draw)
            suffer(campaign, job, campaign.draw.randrange(3, 6), suffered)
            same_run(job.run, campaign.whole["slurm"], STEPS)
        except AssertionError as broken:
            raise Broken(f"after {suffered}: {broken}") from None
        finally:
            cluster.run("scontrol", "update", "partitionname=main", "gracetime=0")
            cluster.cancel_all()
            for node in cluster.nodes:
                cluster.restore_node(node)
            cluster.wait_for_nodes()
    return suffered


def write(campaign: Campaign, folder: Path) -> Path:
    """Submit a training; its run directory."""
    folder.mkdir(exist_ok=True)
    submit("--nodes", 2, "--config", write_config(folder, campaign.index, STEPS))
    return folder / "run"


def suffer(campaign: Campaign, job: Job, events: int, suffered: list[str]) -> None:
    """Let so many events happen to a job at moments that are drawn, and wait for its end."""
    for _ in range(events):
        kind = campaign.draw.choice(list(EVENTS))
        wait(job, time.monotonic() + campaign.draw.uniform(0.5, 15.0))
        while not job.ended and not happened(EVENTS[kind], job):
            time.sleep(0.2)
        if job.ended:
            break
        suffered.append(campaign.count(f"SLURM: {kind}"))
    wait(job, deadline := time.monotonic() + 5 * campaign.ends_s)
    said = "\n".join(log.read_text(errors="replace") for log in sorted((job.run / "slurm").glob("*/log/*.log")))
    if time.monotonic() > deadline or starts(job.run)[-1].next != "done":
        raise Broken(f"does not end well after {suffered}: {starts(job.run)}: {said[-1500:]}")
    if "Traceback" in said:
        raise Broken(f"traceback after {suffered}: {said[said.index('Traceback') :][:1500]}")


def happened(event: Callable[[Job], None], job: Job) -> bool:
    """Whether there was something that it could happen to."""
    try:
        event(job)
    except (StopIteration, ProcessLookupError, RuntimeError):  # no rank yet, or SLURM refuses what is over
        return False
    return True


def wait(job: Job, until: float) -> None:
    while time.monotonic() < until and not job.ended:
        time.sleep(0.05)
