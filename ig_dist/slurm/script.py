"""What is asked of SLURM where not all was said, and the batch script that says it.

Ranks may run in a container: of pyxis, whose options srun has, or of Apptainer, which stands before Python.
"""

import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ig_dist.errors import ConfigError, IgDistError
from ig_dist.slurm.commands import Partition, gpu_partitions, minutes, partition, slurm
from ig_dist.slurm.record import Folder, Submission
from ig_dist.slurm.request import Request

DAY = 24 * 60
OWN = ("account", "constraint", "exclude", "gpus-per-node", "mem", "nodes", "partition", "qos", "time")
ASSUMED = Partition("", gpus=8, cpus=96, minutes=None)  # a node of H100s, where SLURM cannot be asked


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
    own, gpus, processes = found.gpus if found else 0, request.gpus_per_node, request.tasks_per_node
    if gpus is None:
        gpus = 0 if processes else min(own, 1) if request.tasks else own  # a task of an array has one
    whole = replace(request, gpus_per_node=gpus, exclusive=bool(own and gpus == own and not request.tasks))
    whole.on_cpus = request.gpus_per_node == 0 or bool(processes and not request.gpus_per_node)
    # of any partition: the nodes are given whole, with what they have
    whole.unknown_gpus = bool(found and request.gpus_per_node and not own) and not gpu_partitions()
    if request.cpus_per_gpu is None and found:
        whole.cpus_per_gpu = max(1, found.cpus // max(gpus or processes or 1, own))
    if request.mem is None and whole.exclusive:
        whole.mem = "0"  # of an exclusive node, SLURM gives all CPUs and GPUs, but not all memory
    limit, longest = (found.minutes, found.longest) if found else (None, None)
    if request.time is None:
        whole.time = _duration(min(limit or DAY, DAY))
    elif longest is not None and (minutes(request.time) or 2**31) > longest:
        raise ConfigError(
            f"--time {request.time} is more than partition {found.name if found else ''} gives, {_duration(longest)}:"
            " ask for less, the run goes on by itself in a new job"
        )
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
        *_check_program(submission.python),
    ]


def _check_program(python: Sequence[str]) -> list[str]:
    """A shell line that ends a start on a node that has not what starts the container."""
    if python[:1] in ([], ["env"]):
        return []
    said = f"error: $SLURMD_NODENAME: no {python[0]} on PATH (--container): load its module, see --setup"
    return [f'command -v {python[0]} > /dev/null || {{ echo "{said}" >&2; exit 2; }}']


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


def in_container(request: Request, needed: Sequence[Path], source: Path) -> tuple[dict[str, str | bool], list[str]]:
    """How ranks are started in an image: more options of srun; Python and what stands before it, none: as here.

    The folders that are ``needed`` are there too, at their own place; ``source`` is the copy of the code.

    Raises:
        ConfigError: the image is not there, or is for pyxis, which srun does not know.
    """
    image, mounts = request.container, request.container_mounts
    if not image:
        if mounts:
            raise ConfigError(f"--container-mounts {mounts}: name the image too, --container IMAGE")
        return {}, []
    file = Path(image)
    if image.endswith((".sif", ".sqsh")) and not file.exists():
        raise ConfigError(f"--container {image} does not exist: give a file, or a name in a registry")
    # a folder of the node, and its place in the container
    pairs = [part.split(":") if ":" in part else [part, part] for part in mounts.split(",") if part]

    def inside(path: Path) -> bool:
        return any(path.is_relative_to(pair[1]) for pair in pairs)

    # without the code that is installed there: what was submitted is run, and an image may set variables of its own
    python = sys.executable if inside(Path(sys.prefix)) else "python3"
    own = ["env", f"PYTHONPATH={source}", "PYTHONSAFEPATH=1", python]
    pairs += [[str(path)] * 2 for path in dict.fromkeys(needed) if not inside(path)]
    bound, image = ",".join(":".join(pair) for pair in pairs), str(file.absolute()) if file.exists() else image
    pyxis = False if image.endswith(".sif") or file.is_dir() else _srun_knows_pyxis()
    if pyxis:
        return {"container-image": image, "container-mounts": bound}, own
    if not (image.endswith(".sif") or file.is_dir() or "://" in image):
        raise ConfigError(
            f"--container {image}: srun knows no --container-image here (no pyxis): give what Apptainer reads,"
            " FILE.sif, a folder or docker://NAME"
        )
    program = "singularity" if shutil.which("singularity") and not shutil.which("apptainer") else "apptainer"
    return {}, [program, "exec", *(["--nv"] if request.gpus_per_node else []), "--bind", bound, image, *own]


def _srun_knows_pyxis() -> bool:
    try:
        return "--container-image" in slurm("srun", "--help")
    except IgDistError:  # a dry run without SLURM
        return True
