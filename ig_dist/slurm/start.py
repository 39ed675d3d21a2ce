"""A training or an array as the jobs that are submitted for it, and what the user is told."""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ig_dist.config import Config
from ig_dist.config.catalogue import check_metrics
from ig_dist.config.file import config_from_tree
from ig_dist.errors import ConfigError
from ig_dist.launching.jobs import Job, job_folder, parsed, program
from ig_dist.plans.samples import samples_url
from ig_dist.slurm.batch import srun_command
from ig_dist.slurm.commands import gpu_partitions
from ig_dist.slurm.control import follow as follow_job
from ig_dist.slurm.record import ACCUMULATION, Folder, Submission, World
from ig_dist.slurm.request import Request
from ig_dist.slurm.script import batch_script, complete, in_container, key_values
from ig_dist.slurm.submit import Planned, check_training, new_folder, submit_all, worlds
from ig_dist.terminal import console, warn

FEW_IMAGES = 16  # of XL/2 a GPU: below, more is sent than computed (docs/scaling.md)
FOLLOWING = (Job.sample, Job.sweep, Job.evaluate)
LOCK_WAIT_S, LEASE_S = 600.0, 120.0  # at least; until a server of files lets go of the locks of a machine that is gone


def training(asked: Request, config: Config, *, follow: bool, dry_run: bool) -> int:
    """Submit a training and what follows it, or print what would be; the exit code.

    Raises:
        ConfigError: the cluster, the run or the data do not allow it.
    """
    run = Path(config.run.dir).absolute()
    path = new_folder(run)
    request = complete(replace(asked, tasks=0, at_once=None), assume=dry_run)
    command = program(Job.train, [f"{path}/config.yaml", f"train.accumulation={ACCUMULATION}"])
    first = _planned("train", command, path, request, asked)
    found = first.submission.worlds = worlds(config, request)
    first.submission.hold = f"{run}/.lock"
    first.submission.hold_s = max(LOCK_WAIT_S, config.train.timeout_s + LEASE_S)
    jobs = [first]
    links = _following(asked.then, config, path.name)
    each = _of_one_gpu(asked, request, assume=dry_run) if links else request
    for number, (job, arguments) in enumerate(links, 1):
        jobs += _array(each, asked, job, arguments, Path(f"{path}-{number}-{job.value}"), behind=len(jobs))
    if not (request.gpus_per_node or request.on_cpus):
        if request.partition is None and (those := gpu_partitions()):
            raise ConfigError(
                f"the default partition has no GPUs: choose one of {', '.join(those)} (--partition), say"
                " --gpus-per-node N where your site finds the partition, or --gpus-per-node 0 to train on CPUs"
            )
        warn(f"partition {request.partition or 'by default'} has no GPUs: trains on CPUs, as --gpus-per-node 0")
    if request.unknown_gpus:
        warn(
            f"SLURM knows of no GPUs: none are asked for, each node's {request.ranks_per_node} processes take one each"
        )
    if dry_run:
        _print_dry_run(jobs)
        code = 0
        try:
            check_training(config, found)
        except ConfigError as error:
            print(f"would be refused: {error}", file=sys.stderr)
            code = ConfigError.exit_code
        _print_shares(request, config, found)
        return code
    check_training(config, found)
    submit_all(jobs, run, "is in use by", config)
    for nodes, world in found.items():
        if world.nodes < nodes:
            console.print(f"of {nodes} nodes {world.nodes} will be used: more do not divide data.streams")
    return _tell(jobs, f"tensorboard --logdir {run}/tensorboard", follow)


def array(
    asked: Request, job: Job, arguments: Sequence[str], folder: Path | None, *, follow: bool, dry_run: bool
) -> int:
    """Submit an array, or print what would be; the exit code.

    Raises:
        ConfigError: the cluster does not allow it, or the job would refuse its arguments.
    """
    run = job_folder(job, arguments, folder)
    jobs = _array(complete(asked, assume=dry_run), asked, job, arguments, new_folder(run))
    if dry_run:
        _print_dry_run(jobs)
        return 0
    of_weights = job in (Job.sample, Job.sweep)
    submit_all(jobs, run, "changes its weights while it is trained by" if of_weights else "")
    return _tell(jobs, "", follow)


def _following(texts: Sequence[str], config: Config, folder: str) -> list[tuple[Job, list[str]]]:
    """The arrays that follow a training, and the arguments of each; texts are such as ``sample --ig-scale 1.4``.

    Raises:
        ConfigError: one would refuse its arguments.
    """
    found: list[tuple[Job, list[str]]] = []
    for text in texts:
        name, *words = shlex.split(text) or [""]
        job = next((job for job in FOLLOWING if job.value == name), None)
        if job is None:
            known = ", ".join(job.value for job in FOLLOWING)
            raise ConfigError(f"--then {text!r}: begin with one of {known}, e.g. --then 'sample --ig-scale 1.4'")
        subject = config.run.dir
        if job is Job.evaluate:
            before = next((made for made in found[::-1] if made[0] is Job.sample), None)
            if before is None:
                raise ConfigError(f"--then {text!r}: there are no samples yet: put --then sample before it")
            out = parsed(*before)["out"]
            subject = str(out or f"{samples_url(config)}/{folder}-{len(found)}")
            before[1].extend([] if out else ["--out", subject])
        found.append((job, [subject, *words]))
        try:
            given = parsed(*found[-1])
        except ConfigError as error:
            raise ConfigError(str(error).replace("--job", "--then", 1)) from None
        config_from_tree(config.model_dump(mode="json"), f"--then {name}", given.get("overrides") or [])
        check_metrics((given.get("metrics") or "fid").split(","), "--metrics")
    return found


def _array(
    request: Request, asked: Request, job: Job, arguments: Sequence[str], path: Path, *, behind: int = 0
) -> list[Planned]:
    """The array and the job that merges it, ``behind`` so many others, the last of which must have succeeded."""
    alone = replace(request, gpus_per_node=min(request.gpus_per_node or 0, 1), tasks_per_node=None, tasks=0)
    command = program(job, [*arguments, *(["--evaluate-if-fit"] if job is Job.sample else [])])
    needs = [("afterok", behind - 1)] if behind else []
    return [
        _planned(job.value, command, path, request, asked, after=needs),
        # it waits for all tasks, whatever became of them, and makes what is missing
        _planned("merge", command, Path(f"{path}-merge"), alone, asked, after=[*needs, ("afterany", behind)]),
    ]


def _planned(
    kind: str, command: list[str], path: Path, request: Request, asked: Request, after: Sequence[tuple[str, int]] = ()
) -> Planned:
    run, cwd = path.parent.parent, Path.cwd()
    srun, python = in_container(request, (run, cwd), path / "source")
    submission = Submission(
        kind=kind,
        commands=[command],
        run=str(run),
        cwd=str(cwd),
        tasks_per_node=request.ranks_per_node,
        cpus_per_task=request.cpus_per_gpu,
        worlds={1: World(nodes=1, accumulation=1)},
        array=request.tasks,
        python=python,
        max_failures=request.max_failures,
        exclude_after=request.exclude_after,
        signal_delay_s=request.signal_delay,
        options=asdict(asked),
        srun={**srun, **key_values("--srun", request.srun)},
        notify="" if request.tasks else request.notify,
    )
    return Planned(path, submission, request, after)


def _of_one_gpu(asked: Request, training: Request, *, assume: bool) -> Request:
    """What each task of an array gets that follows a training."""
    one = None if training.gpus_per_node else 0
    sbatch = [re.sub(r"^(-*gres=gpu(?::[a-z]\w*)?)(:\d+)?$", r"\1:1", text) for text in asked.sbatch]
    task = replace(asked, nodes="1", gpus_per_node=one, tasks_per_node=None, tasks=asked.tasks or 8, sbatch=sbatch)
    return complete(task, assume=assume)


def _tell(jobs: Sequence[Planned], watch: str, follow: bool) -> int:
    first = jobs[0].submission
    folder, run = Folder(jobs[0].path), first.run
    ids = folder.id
    for job in jobs[1:]:
        merges, number = job.submission.kind == "merge", Folder(job.path).id
        ids += f" (merged by {number})" if merges else f", then {job.submission.kind} {number}"
    told = {
        "job": ids,
        "log": str(Folder(folder.path, "0" if first.array else "").rank_log("0")),
        "status": f"ig-dist slurm status {run}",
        "stop": f"ig-dist slurm cancel {run}",
    }
    if watch:
        told |= {"watch": watch, "resume": f"ig-dist slurm resume {run}"}
    for name, text in told.items():
        console.print(f"{name + ':':8}{text}")
    return follow_job(folder, first) if follow else 0


def _print_shares(request: Request, config: Config, found: dict[int, World]) -> None:
    """How many images of a batch a process has on all nodes, and what that means where they are few."""
    nodes, batch = max(world.nodes for world in found.values()), config.train.global_batch_size
    share = batch // (nodes * request.ranks_per_node)
    print(f"# of a batch of {batch}, a process has {share} images on {nodes} node{'s' * (nodes > 1)}")
    if request.gpus_per_node and nodes > 1 and share < FEW_IMAGES:
        print("#   so few that a step waits for the network; fewer nodes are hardly slower (docs/scaling.md)")


def _print_dry_run(jobs: Sequence[Planned]) -> None:
    ids = [job.submission.kind.upper() for job in jobs]
    for place, job in enumerate(jobs):
        submission, merges = job.submission, job.submission.kind == "merge"
        if merges:
            print("# once all tasks have ended, whatever became of them, a job of one process:")
        elif place:
            print(f"# once {ids[place - 1]} has succeeded:")
        print(batch_script(job.request, submission, job.path, after=job.dependency(ids)))
        for nodes, world in submission.worlds.items():
            ranks = world.nodes * submission.tasks_per_node
            if not merges:
                task = f"each of {submission.array} tasks " if submission.array else ""
                print(f"# {task}on {nodes} node{'s' * (nodes > 1)}, {ranks} process{'es' * (ranks > 1)}:")
                hosts = ["<node>"] * world.nodes
                text = " ".join(srun_command(Folder(job.path), submission, hosts, "<start>"))
                print("#   " + text.replace(",".join(hosts), f"<the first {world.nodes}>"))
            arguments = " ".join(submission.commands[0]).replace(ACCUMULATION, str(world.accumulation))
            print(f"# {'it alone' if merges else 'each process'}: python {arguments}")
