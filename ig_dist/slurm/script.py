"""What is asked of SLURM, and the batch script that says it."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ig_dist.errors import ConfigError, IgDistError
from ig_dist.slurm.commands import Partition, gpu_partitions, minutes, partition
from ig_dist.slurm.containers import check_lines
from ig_dist.slurm.record import Folder, Submission

DAY = 24 * 60
OWN = ("account", "constraint", "exclude", "gpus-per-node", "mem", "nodes", "partition", "qos", "time")
ASSUMED = Partition("", gpus=8, cpus=96, minutes=None)  # a node of H100s, where SLURM cannot be asked


class Request(BaseModel):
    """What the user asked for; None: whatever is right for the cluster."""

    model_config = ConfigDict(extra="forbid")

    nodes: str = "1"
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    cpus_per_gpu: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    mem: str | None = None
    signal_delay: int = 120
    setup: list[str] = []
    sbatch: list[str] = []
    srun: list[str] = []
    container: str = ""
    container_mounts: str = ""
    notify: str = ""
    then: list[str] = []
    """Arrays that follow a training."""
    max_failures: int = 8
    exclude_after: int = 2
    tasks: int = 0
    at_once: int | None = None
    """Tasks that run at a time; None: as many as SLURM gives."""
    exclusive: bool = False
    """Whole nodes; set by `complete` where all of their GPUs are asked for."""
    on_cpus: bool = False
    """No GPUs are wanted; set by `complete`."""
    unknown_gpus: bool = False
    """Nodes have GPUs of which SLURM knows nothing; set by `complete`."""

    @property
    def node_range(self) -> tuple[int, int]:
        """The fewest and the most nodes.

        Raises:
            ConfigError: not N or A-B.
        """
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", self.nodes)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high:
            raise ConfigError(f"--nodes {self.nodes!r}: give a number of nodes, or the fewest and the most, e.g. 4-8")
        return low, high

    @property
    def ranks_per_node(self) -> int:
        """One for each GPU, or as many as asked for where there are none."""
        return self.gpus_per_node or self.tasks_per_node or 1


def complete(request: Request, *, assume: bool = False) -> Request:
    """Fill in what was not said, from what the partition's nodes have; ``assume`` H100s where SLURM cannot be asked.

    Raises:
        ConfigError: more time than the partition gives, or GPUs and --tasks-per-node.
    """
    if request.gpus_per_node and request.tasks_per_node not in (None, request.gpus_per_node):
        raise ConfigError("--tasks-per-node is for nodes without GPUs: with GPUs there is one task for each")
    try:
        low, _ = request.node_range
        one_thread = bool({"hint=nomultithread", "threads-per-core=1"} & {text.lstrip("-") for text in request.sbatch})
        found = partition(
            request.partition,
            nodes=low,
            constraint=request.constraint,
            exclude=request.exclude,
            one_thread=one_thread,
        )
    except IgDistError as error:
        if not assume or "--partition" in str(error):
            raise
        found = ASSUMED
    own, gpus = found.gpus if found else 0, request.gpus_per_node
    if gpus is None:
        gpus = 0 if request.tasks_per_node else min(own, 1) if request.tasks else own  # a task of an array has one
    filled: dict[str, Any] = {
        "gpus_per_node": gpus,
        "on_cpus": request.gpus_per_node == 0 or bool(request.tasks_per_node and not request.gpus_per_node),
        # of any partition: the nodes are given whole, with what they have
        "unknown_gpus": bool(found and request.gpus_per_node and not own) and not gpu_partitions(),
        "exclusive": bool(own and gpus == own and not request.tasks),
    }
    if request.cpus_per_gpu is None and found:
        filled["cpus_per_gpu"] = max(1, found.cpus // max(gpus or request.tasks_per_node or 1, own))
    if request.mem is None and filled["exclusive"]:
        filled["mem"] = "0"  # of an exclusive node, SLURM gives all CPUs and GPUs, but not all memory
    limit, longest = (found.minutes, found.longest) if found else (None, None)
    if request.time is None:
        filled["time"] = _duration(min(limit or DAY, DAY))
    elif longest is not None and (minutes(request.time) or 2**31) > longest:
        raise ConfigError(
            f"--time {request.time} is more than partition {found.name if found else ''} gives, {_duration(longest)}:"
            " ask for less, the run goes on by itself in a new job"
        )
    whole = request.model_copy(update=filled)
    given = minutes(whole.time or "")
    if given is not None and whole.signal_delay >= given * 60:
        raise ConfigError(
            f"--signal-delay {whole.signal_delay} s is no less than --time {whole.time}: nothing would be left to train"
        )
    return whole


def batch_script(request: Request, submission: Submission, folder: Path, *, after: str = "") -> str:
    """The text of the batch script of a completed request; ``after`` is as sbatch's --dependency takes it.

    Raises:
        ConfigError: an option of --sbatch that is ours, or that the script must have as it is.
    """
    low, high = request.node_range
    # SLURM would keep the number of tasks of a job's first start, and with it that start's number of nodes
    fixed, cpus = low == high, request.cpus_per_gpu
    throttle = f"%{request.at_once}" if request.at_once else ""
    needed: dict[str, Any] = {
        "nodes": low if fixed else f"{low}-{high}",
        "mincpus": request.ranks_per_node * cpus if cpus and not fixed else None,
        "time": request.time,
        # so long before the time limit, to the first process of the job, which passes it on
        "signal": f"B:USR2@{request.signal_delay}",
        "requeue": True,
        "chdir": submission.cwd,
        "output": Folder(folder, "%a" if submission.array else "").batch_log(),
        "array": f"0-{submission.array - 1}{throttle}" if submission.array else None,
        "kill-on-invalid-dep": "yes" if "afterok" in after else None,  # or it would wait for ever
    }
    more = key_values("--sbatch", request.sbatch)
    for key in more:
        if key in OWN or needed.get(key) is not None:
            here = f"--{key}" if key in OWN else "nothing: the job needs it as it is"
            raise ConfigError(f"--sbatch {key}: use {here}")
    typed = str(more.get("gres", "")).startswith("gpu")  # gpu:h100:8, where a site asks for the type
    asked = {
        **needed,
        "job-name": f"{submission.kind}-{Path(submission.run).name}",
        "partition": request.partition,
        "ntasks-per-node": request.ranks_per_node if fixed else None,
        "cpus-per-task": cpus if fixed else None,
        "gpus-per-node": None if typed or request.unknown_gpus else request.gpus_per_node or None,
        "mem": None if {"mem-per-gpu", "mem-per-cpu"} & more.keys() else request.mem,  # SLURM takes one way of asking
        "account": request.account,
        "qos": request.qos,
        "constraint": request.constraint,
        "exclude": request.exclude,
        "exclusive": request.exclusive or None,
        "open-mode": "append",
        **more,
        # what the user has it wait for, the first job has waited for
        "dependency": after or more.get("dependency"),
    }
    options = [
        f"#SBATCH --{key}" + ("" if value is True else f"={shlex.quote(str(value))}")
        for key, value in sorted(asked.items())
        if value is not None
    ]
    command = shlex.join([sys.executable, "-u", "-m", "ig_dist.slurm.batch", str(folder)])
    return "\n".join(["#!/bin/bash", *options, "", *_setup(request, submission, folder), "", f"exec {command}", ""])


def key_values(option: str, given: Sequence[str]) -> dict[str, str | bool]:
    """``KEY=VALUE``, or KEY alone, as the program's option ``--KEY``.

    Raises:
        ConfigError: it does not begin with the name of an option.
    """
    found: dict[str, str | bool] = {}
    for text in given:
        key, separator, value = text.removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9-]+", key):
            raise ConfigError(f"{option} {text!r}: write KEY=VALUE, with an option of that program as the key")
        found[key] = value if separator else True
    return found


def _setup(request: Request, submission: Submission, folder: Path) -> list[str]:
    cpus, gpus = request.cpus_per_gpu or 1, request.gpus_per_node or 0
    visible = f"${{CUDA_VISIBLE_DEVICES:-{','.join(map(str, range(gpus or 1)))}}}"
    return [
        "# a fixed number, not that of the shell: sums depend on it, and reader threads need CPUs too",
        f"export OMP_NUM_THREADS={max(1, min(8, cpus // 2)) if gpus else cpus}",
        *checked(request.setup),
        "# the code as it was when this was submitted, whatever is edited since",
        f"export PYTHONPATH={shlex.quote(str(folder / 'source'))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1  # or the working directory would come before it",
        *(["export IG_DIST_DEVICE=cpu  # not on GPUs that a node may have"] if request.on_cpus else []),
        *([f"export CUDA_VISIBLE_DEVICES={visible}  # not SLURM's, but there"] if request.unknown_gpus else []),
        "# a link or a GPU that fails is named in the rank's log",
        "export NCCL_DEBUG=${NCCL_DEBUG:-WARN}",
        *check_lines(submission.python),
    ]


def checked(setup: Sequence[str]) -> list[str]:
    """The user's lines, each of which must succeed."""
    failed = 'echo "error: $SLURMD_NODENAME: "{} >&2; exit 2'
    return [
        part
        for line in setup
        for part in (line, f"[ $? = 0 ] || {{ {failed.format(shlex.quote(f'--setup {line!r} failed'))}; }}")
    ]


def _duration(limit: int) -> str:
    days, rest = divmod(limit, DAY)
    return f"{days}-{rest // 60:02d}:{rest % 60:02d}:00"
