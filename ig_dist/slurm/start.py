"""Submitting: a training or an array as its record and its batch script, and what the user is told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ig_dist.config import Config
from ig_dist.errors import ConfigError
from ig_dist.jobs import Job, job_folder, program
from ig_dist.slurm import submit as slurm
from ig_dist.slurm.batch import srun_command
from ig_dist.slurm.control import follow as follow_job
from ig_dist.slurm.record import ACCUMULATION, Folder, Submission, World
from ig_dist.slurm.script import Request, batch_script, complete, key_values
from ig_dist.terminal import console, warn

FEW_IMAGES = 16  # of XL/2 a GPU: below, more is sent than computed (docs/scaling.md)
LOCK_WAIT_S, LEASE_S = 600.0, 120.0  # at least; until a server of files lets go of the locks of a machine that is gone


def training(request: Request, config: Config, *, follow: bool, dry_run: bool) -> int:
    """Submit a training, or print what would be; the exit code.

    Raises:
        ConfigError: the cluster, the run or the data do not allow it.
    """
    run = Path(config.run.dir).absolute()
    path = slurm.new_folder(run)
    asked, request = request, complete(request, assume=dry_run)
    worlds = slurm.worlds(config, request)
    submission = Submission(
        kind="train",
        commands=[["-m", "ig_dist.cli", "train", f"{path}/config.yaml", "train.accumulation={accumulation}"]],
        run=str(run),
        cwd=str(Path.cwd()),
        tasks_per_node=request.ranks_per_node,
        cpus_per_task=request.cpus_per_task,
        worlds=worlds,
        max_failures=request.max_failures,
        exclude_after=request.exclude_after,
        signal_delay_s=request.signal_delay,
        options=asked.model_dump(),
        srun=key_values("--srun", request.srun),
        notify=request.notify,
        hold=f"{run}/.lock",
        hold_s=max(LOCK_WAIT_S, config.train.timeout_s + LEASE_S),
    )
    if not (request.gpus_per_node or request.on_cpus):
        warn(f"partition {request.partition or 'by default'} has no GPUs: trains on CPUs, as --gpus-per-node 0")
    if dry_run:
        code = _print_dry_run([request], [submission], path, lambda: slurm.check_training(config, worlds))
        for line in _shares(request, config, worlds):
            print(line)
        return code
    slurm.refuse_active(run, "is in use by")
    slurm.check_training(config, worlds)
    with slurm.submitting(run):
        slurm.refuse_active(run, "is in use by")  # one that was submitted meanwhile
        slurm.submit(path, submission, request, config=config)
    for nodes, world in worlds.items():
        if world.nodes < nodes:
            console.print(f"of {nodes} nodes {world.nodes} will be used: more do not divide data.streams")
    return _tell(path, submission, f"tensorboard --logdir {run}/tensorboard", follow)


def array(
    request: Request, job: Job, arguments: Sequence[str], folder: Path | None, *, follow: bool, dry_run: bool
) -> int:
    """Submit an array, or print what would be; the exit code.

    Raises:
        ConfigError: the cluster does not allow it, or the job would refuse its arguments.
    """
    run = job_folder(job, arguments, folder)
    if job in (Job.sample, Job.sweep) and not dry_run:
        slurm.refuse_active(run, "changes its weights while it is trained by")
    path = slurm.new_folder(run)
    asked, request = request, complete(request, assume=dry_run)
    one_process = {"gpus_per_node": min(request.gpus_per_node or 0, 1), "tasks_per_node": None, "tasks": 0}
    alone = request.model_copy(update=one_process)
    after = Path(f"{path}-merge")
    typed = [*arguments, *(["--evaluate-if-fit"] if job is Job.sample else [])]
    submissions = [
        Submission(
            kind=kind,
            commands=[program(job, typed)],
            run=str(run.absolute()),
            cwd=str(Path.cwd()),
            tasks_per_node=one.ranks_per_node,
            cpus_per_task=one.cpus_per_task,
            worlds={1: World(nodes=1, accumulation=1)},
            array=one.tasks,
            max_failures=request.max_failures,
            exclude_after=request.exclude_after,
            signal_delay_s=request.signal_delay,
            options=asked.model_dump(),
            srun=key_values("--srun", request.srun),
            notify=request.notify if kind == "merge" else "",
        )
        for kind, place, one in ((job.value, path, request), ("merge", after, alone))
    ]
    if dry_run:
        return _print_dry_run([request, alone], submissions, path, lambda: None)
    with slurm.submitting(run):
        number = slurm.submit(path, submissions[0], request)
        # it waits for all tasks, whatever became of them, and makes what is missing
        try:
            slurm.submit(after, submissions[1], alone, after=number)
        except ConfigError:
            slurm.withdraw(path)
            raise
    return _tell(path, submissions[0], "", follow)


def _shares(request: Request, config: Config, worlds: dict[int, World]) -> list[str]:
    """How many images of a batch a process has on all nodes, and what that means where they are few."""
    nodes, batch = max(world.nodes for world in worlds.values()), config.train.global_batch_size
    share = batch // (nodes * request.ranks_per_node)
    told = [f"# of a batch of {batch}, a process has {share} images on {nodes} node{'s' * (nodes > 1)}"]
    if request.gpus_per_node and nodes > 1 and share < FEW_IMAGES:
        told.append("#   so few that a step waits for the network; fewer nodes are hardly slower (docs/scaling.md)")
    return told


def _tell(path: Path, submission: Submission, watch: str, follow: bool) -> int:
    folder, run = Folder(path), submission.run
    first = "task_0_rank_0.log" if submission.array else "rank_0.log"
    merged = f", merged by {Folder(Path(f'{path}-merge')).id}" if submission.array else ""
    told = {
        "job": f"{folder.id}{merged}",
        "log": f"{folder.log}/{first}",
        "status": f"ig-dist slurm status {run}",
        "stop": f"ig-dist slurm cancel {run}",
    }
    if watch:
        told |= {"watch": watch, "resume": f"ig-dist slurm resume {run}"}
    for name, text in told.items():
        console.print(f"{name + ':':8}{text}", markup=False)
    return follow_job(folder, submission) if follow else 0


def _print_dry_run(
    requests: Sequence[Request], submissions: Sequence[Submission], path: Path, check: Callable[[], object]
) -> int:
    submission, request = submissions[0], requests[0]
    name = f"{submission.kind}-{Path(submission.run).name}"
    print(batch_script(request, submission, path, name=name))
    for nodes, world in submission.worlds.items():
        hosts = ["<node>"] * world.nodes
        ranks = world.nodes * submission.tasks_per_node
        task = f"each of {submission.array} tasks " if submission.array else ""
        print(f"# {task}on {nodes} node{'s' * (nodes > 1)}, {ranks} process{'es' * (ranks > 1)}:")
        text = " ".join(srun_command(path, submission, hosts, "<start>"))
        print("#   " + text.replace(",".join(hosts), f"<the first {world.nodes}>"))
        for command in submission.commands:
            arguments = " ".join(command).replace(ACCUMULATION, str(world.accumulation))
            print(f"# each process: python {arguments}")
    for merge, alone in zip(submissions[1:], requests[1:], strict=True):
        print("# once all tasks have ended, whatever became of them, a job of one process:")
        print(batch_script(alone, merge, Path(f"{path}-merge"), name=f"merge-{Path(merge.run).name}", after="ARRAY"))
        for command in merge.commands:
            print(f"# it alone: python {' '.join(command)}")
    try:
        check()
    except ConfigError as error:
        print(f"would be refused: {error}", file=sys.stderr)
        return ConfigError.exit_code
    return 0
