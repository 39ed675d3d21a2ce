"""Which process of a job this is, and which device is its own: one answer for training, sampling, scores and encoding.

What started it says so in the environment, each launcher in its own words. torchrun's are the explicit ones: they are
also what ``ig-dist launch`` and ``ig-dist slurm`` set, and what reaches a process on the platforms that start torchrun
(Kubernetes, SkyPilot, Ray: their own variables are torchrun's options). Then come mpirun's, whose processes may lie in
a step of srun, and then srun's.
"""

import itertools
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ig_dist.errors import ConfigError, IgDistError, NodeError

if TYPE_CHECKING:
    import torch

BROKEN = ("uncorrectable", "hardware", "busy or unavailable", "no CUDA-capable device")
"""What CUDA says of a device that serves nobody, or not this process."""
_TAKEN = ("busy or unavailable", "in use", "out of memory")
DEVICE_VARIABLE = "IG_DIST_DEVICE"
_NO_CUDA = ": ask SLURM for GPUs (--gpus-per-node), install a PyTorch that is built for them, or say IG_DIST_DEVICE=cpu"
_OR_LAUNCH = ", or use ig-dist launch or torchrun"
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MPI = {
    "mpirun": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH's and Intel's
}

LOCK_WAIT_VARIABLE = "IG_DIST_LOCK_WAIT_S"
"""Seconds to wait for whoever holds a run, set by a launcher that starts it again: a server of files may take a minute
or two to find out that a machine is gone, and its locks with it."""


class Process(NamedTuple):
    """One of the processes that work together."""

    rank: int
    world_size: int
    local_rank: int  # among those of its machine
    local_world_size: int  # how many its machine has; 1 where nobody says it
    slot: int  # what chooses its GPU: the local rank, or the rank where nobody says the former


class _Told(NamedTuple):
    rank: int | None = None
    world_size: int | None = None
    local_rank: int | None = None
    local_world_size: int | None = None


def this_process(
    worker: str | None = None, *, arrays: bool = False, environment: Mapping[str, str] | None = None
) -> Process:
    """Told by ``worker`` ("i/W", as the user types it), else by what started this process; else it is alone.

    With ``arrays`` the tasks of a SLURM array share the work; otherwise each is for itself.

    Raises:
        ConfigError: what is said is no number, or contradicts itself.
    """
    own = os.environ if environment is None else environment
    said, (by, its) = _told(own, _TORCHRUN), _launcher(own)
    if said.rank is None or said.world_size is None:
        for name, one, other in zip(_TORCHRUN, said[:2], its[:2], strict=False):
            if None not in (one, other) and one != other:
                raise ConfigError(f"{name} is {one}, but {by} says {other}: unset {name}, or start as many processes")
    elif said[:2] != its[:2]:  # as of ranks that torchrun started in a step of srun
        its = _Told()
    both = zip(said, its, strict=True)
    rank, world_size, local_rank, local_world_size = (other if one is None else one for one, other in both)
    world_size = 1 if world_size is None else world_size
    if rank is None and world_size > 1:
        raise ConfigError(f"WORLD_SIZE is {world_size}, and RANK is not set: unset it{_OR_LAUNCH}")
    for name, number, of, count in (
        ("RANK", rank, "WORLD_SIZE", world_size),
        ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world_size),
        ("LOCAL_WORLD_SIZE", local_world_size and local_world_size - 1, "WORLD_SIZE", world_size),
    ):
        if number is not None and count is not None and number >= count:
            raise ConfigError(f"{name} does not fit {of} ({count}): unset both{_OR_LAUNCH}")
    if worker is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", worker)
        if not match or not int(match[1]) < int(match[2]):
            raise ConfigError(f"--worker {worker} is not i/W with 0 <= i < W: use e.g. --worker 0/4 to --worker 3/4")
        rank, world_size = int(match[1]), int(match[2])
    elif arrays and said.rank is None:
        rank, world_size = _in_array(own, rank or 0, world_size)
    rank = rank or 0
    slot = rank if local_rank is None else local_rank
    return Process(rank, world_size, local_rank or 0, local_world_size or 1, slot)


def _told(environment: Mapping[str, str], names: tuple[str, ...]) -> _Told:
    for name in names:
        if not environment.get(name, "0").isdecimal():
            raise ConfigError(f"{name} is {environment[name]!r}, no number: unset it{_OR_LAUNCH}")
    return _Told(*(int(environment[name]) if name in environment else None for name in names))


def _launcher(environment: Mapping[str, str]) -> tuple[str, _Told]:
    """Which launcher other than torchrun started this process as one of several, and what it says."""
    for by, names in _MPI.items():
        if (told := _told(environment, names)).world_size is not None and None not in told and told.world_size > 1:
            return by, told
    # Not SLURM_NTASKS, which a batch script and the shell of an allocation have too: they are alone.
    told = _told(environment, ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID"))
    if None in told or told.world_size == 1 or (environment is os.environ and os.isatty(0)):  # srun --pty's shell too
        return "", _Told()
    counts = [
        int(match[1])
        for match in re.finditer(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        for _ in range(int(match[2] or 1))
    ]
    node = told.local_world_size or 0
    return "srun", told._replace(local_world_size=counts[node] if node < len(counts) else None)


def _in_array(environment: Mapping[str, str], rank: int, world_size: int) -> tuple[int, int]:
    """Number of this process and of all in a SLURM array; its ids may have gaps."""
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")
    task, first, last, tasks = _told(environment, names)
    if task is None:
        return rank, world_size
    first = first or 0
    spread = (task if last is None else last) - first + 1
    tasks = tasks or spread
    return (task - first) * tasks // spread * world_size + rank, tasks * world_size


def meeting_place(process: Process, environment: Mapping[str, str] | None = None) -> tuple[str, str]:
    """MASTER_ADDR and MASTER_PORT: where rank 0 has the job's store.

    Raises:
        ConfigError: nobody says it, and it follows from nothing.
    """
    own = os.environ if environment is None else environment
    place, port = own.get("MASTER_ADDR"), own.get("MASTER_PORT")
    by, _ = _launcher(own) if not (place and port) else ("", None)
    one_machine = process.local_world_size == process.world_size
    if by == "srun":
        from ig_dist.slurm.commands import host_names

        place = place or ("127.0.0.1" if one_machine else host_names(own["SLURM_STEP_NODELIST"])[0])
        step = int(own["SLURM_JOB_ID"]) + 1009 * int(own["SLURM_STEP_ID"])  # steps of the next jobs may share the node
        port = port or str(20_000 + step % 10_000)
    elif by:
        place, port = place or ("127.0.0.1" if one_machine else None), port or "29500"
    if not place or port is None or not port.isdecimal():
        raise ConfigError(
            "MASTER_ADDR or MASTER_PORT is not set, or no number: say the machine of rank 0 and a free port of it"
            " (mpirun -x MASTER_ADDR=NAME -x MASTER_PORT=29500), or use ig-dist launch, ig-dist slurm or torchrun"
        )
    return place, port


def choose_gpu(process: Process, gpus: int, environment: Mapping[str, str], *, shared: bool) -> int:
    """This process's GPU, by its number among the ``gpus`` (1 or more) that it sees.

    Several processes may use a ``shared`` one, as workers that do not wait for each other do.

    Raises:
        ConfigError: there are fewer GPUs than processes.
    """
    if shared:
        return process.slot % gpus
    if process.local_world_size <= gpus and process.slot < gpus:
        return process.slot
    # one for each, as srun --gpus-per-task=1 binds them or a pod has; that they differ is seen once all have met
    if gpus == 1 and (process.local_world_size == 1 or "CUDA_VISIBLE_DEVICES" in environment):
        return 0
    raise ConfigError(
        f"{max(process.local_world_size, process.slot + 1)} processes on this machine, and this one sees {gpus} GPUs:"
        f" start at most {gpus}, or give each its own (srun --gpus-per-task=1)"
    )


def missing_gpus(gpus: int, environment: Mapping[str, str]) -> str:
    """What to say where a process sees fewer GPUs than it was given; else empty."""
    named = environment.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in named.split(",")] if named.strip() not in ("", "NoDevFiles") else []
    count = len(list(itertools.takewhile(lambda name: not name.startswith("-"), names)))  # as CUDA reads it
    return f"CUDA_VISIBLE_DEVICES={named}: {gpus} of these {count} GPUs are there (nvidia-smi -L)" * (count > gpus)


def this_device(process: Process | None = None, *, shared: bool = True) -> "torch.device":
    """This process's GPU, tried and made the current one; the CPU where there is none, or IG_DIST_DEVICE says so.

    Raises:
        ConfigError: there is no GPU for this process, or another one holds it; a job of SLURM that has GPUs, or whose
            node has, sees none.
        NodeError: the GPU is broken; also where another process holds it and a launcher can start this one elsewhere.
    """
    import torch

    process = process or this_process()
    if asked := os.environ.get(DEVICE_VARIABLE):
        if asked != "cpu":
            raise ConfigError(f"{DEVICE_VARIABLE}={asked}: say cpu, or unset it for the GPU of this process")
        return torch.device("cpu")
    gpus, in_job = torch.cuda.device_count(), "SLURM_JOB_ID" in os.environ
    if (torch.version.cuda or in_job) and (missing := missing_gpus(gpus, os.environ)):
        raise unusable(process, missing + _NO_CUDA * (not gpus), "absent" if torch.version.cuda else "unfit")
    unsaid = os.environ.get("CUDA_VISIBLE_DEVICES", "NoDevFiles") == "NoDevFiles"  # SLURM's, of a job without GPUs
    if in_job and not gpus and unsaid and Path("/dev/nvidia0").exists():
        raise unusable(process, f"this node has GPUs, and PyTorch finds none{_NO_CUDA}", "unfit")
    if not gpus:
        return torch.device("cpu")
    device = torch.device("cuda", choose_gpu(process, gpus, os.environ, shared=shared))
    try:
        torch.cuda.set_device(device)
        torch.ones(1, device=device).item()
    except RuntimeError as error:  # before anything of ours has run
        raise unusable(process, *explained(device, str(error))) from None
    return device


def explained(device: "torch.device", error: str) -> tuple[str, str]:
    """What CUDA said of a device in a user's words, and what it is: taken, unfit or broken."""
    said = f"{device} cannot be used ({error.splitlines()[0]})"
    if any(sign in error for sign in _TAKEN):
        return f"{said}: another process holds it (nvidia-smi); end that, or choose another GPU", "taken"
    if "no kernel image" in error:
        return f"{said}: install a PyTorch that is built for it", "unfit"
    return f"{said}: mend that machine, or start without it", "broken"


def unusable(process: Process, said: str, why: str) -> IgDistError:
    """The error of a process whose device is of no use to it; a launcher that can avoid the machine is told."""
    from ig_dist.parallel.blame import VARIABLE, blame

    error: IgDistError = ConfigError(said)
    if why == "broken" or (VARIABLE in os.environ and why != "unfit"):
        blame([process.rank])
        error = NodeError(f"{host()}: {said}")
    error.everywhere = False
    return error


def host() -> str:
    """This machine, as the launcher calls it."""
    return os.environ.get("IG_DIST_NODE") or socket.gethostname()
