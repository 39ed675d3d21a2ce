"""SLURM's own commands. Each call gets a limit: they wait for ever, or for a minute, on a controller that is away."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

from ig_dist.errors import ConfigError, IgDistError
from ig_dist.terminal.usage import unknown

CLIENT_SECONDS = 60.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


class SlurmError(IgDistError):
    """SLURM answered no, or nothing."""


def slurm(*command: str, patience_s: float = CLIENT_SECONDS) -> str:
    """The output of a client command, which may take so long.

    Raises:
        ConfigError: it is not on PATH, or knows of no cluster.
        SlurmError: it failed; the text is SLURM's.
    """
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"no {command[0]} on PATH: run this on a login node of a SLURM cluster, or use ig-dist launch here"
        )
    # the shape of an interactive job in which sbatch is typed, and variables that come before what the script says
    drop = ("SLURM_", "SBATCH_") if command[0] == "sbatch" else ()
    environment = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or not k.startswith(drop)}
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=patience_s,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer in {patience_s:.0f} s") from None
    if "configuration source" in done.stderr:
        raise ConfigError(
            f"{command[0]} is here, but knows of no cluster (no slurm.conf): run this on a login node, set SLURM_CONF,"
            " or use ig-dist launch here"
        )
    if done.returncode:
        raise SlurmError(f"{command[0]}: {_words(done.stderr) or f'exit code {done.returncode}'}")
    return done.stdout.strip()


class QueuedJob(NamedTuple):
    """A job that SLURM still knows."""

    id: str
    state: str
    reason: str
    nodes: str
    begins: str = "N/A"  # when it began, or SLURM expects that it will; N/A: it does not know

    @property
    def active(self) -> bool:
        """It runs, or will."""
        return self.state not in ENDED


def queued(ids: Sequence[str], *, patience_s: float = CLIENT_SECONDS) -> list[QueuedJob]:
    """Those of the jobs that SLURM still knows; an array's tasks one by one. A job that has no id yet is not known."""
    if not (ids := [one for one in ids if one]):
        return []
    try:
        which = ("--noheader", "--array", "--states=all", f"--jobs={','.join(ids)}")
        out = slurm("squeue", *which, "-o", "%i|%T|%r|%N|%S", patience_s=patience_s)
    except SlurmError as error:
        if "Invalid job id" not in str(error):  # all are forgotten
            raise
        if len(ids) == 1:
            return []
        return [job for one in ids for job in queued([one])]
    return [QueuedJob(*line.split("|", 4)) for line in out.splitlines()]


def my_folders() -> list[str]:
    """The logs of all jobs of this user that wait or run."""
    return slurm("squeue", "--noheader", "--me", "-O", "StdOut:").splitlines()


def host_names(nodes: str) -> list[str]:
    """``node[1-2]`` as a list."""
    return slurm("scontrol", "show", "hostnames", nodes).split()


class Partition(NamedTuple):
    """What the nodes have on which a job may run."""

    name: str  # several: with commas
    gpus: int
    cpus: int  # that jobs may have
    minutes: int | None  # time limit, the shortest of several; None: none
    longest: int | None = None  # the longest


class Node(NamedTuple):
    """What a node has."""

    name: str
    partitions: list[str]
    features: list[str]
    gpus: int
    cpus: int
    threads: int  # of a core


def gpu_partitions() -> list[str]:
    """Those that have GPUs of which SLURM knows."""
    return sorted({name for node in _nodes() if node.gpus for name in node.partitions})


def partition(
    names: str | None,
    *,
    nodes: int = 1,
    constraint: str | None = None,
    exclude: str | None = None,
    one_thread: bool = False,
) -> Partition | None:
    """What a job can get: the most GPUs of which there are enough nodes; None: no default partition.

    ``names`` are partitions, with commas, as sbatch takes them; None: the default one. With ``one_thread`` of each core
    SLURM gives so many CPUs fewer.

    Raises:
        ConfigError: there is no such partition.
    """
    limits, asked = {}, (names or "").split(",")
    for line in slurm("sinfo", "--noheader", "--all", "-o", "%P|%l").splitlines():
        label, limit = line.split("|")
        limits[label.rstrip("*")] = minutes(limit)
        if names is None and label.endswith("*"):
            asked = [label.rstrip("*")]
    if asked == [""]:
        return None
    for name in asked:
        if name not in limits:
            raise ConfigError(f"--partition {names}: {unknown('partition', name, limits)}")
    unwanted = host_names(exclude) if exclude else []
    known = [node._replace(cpus=node.cpus // node.threads) if one_thread else node for node in _nodes()]
    fit = [node for node in known if _fits(constraint, node.features) and node.name not in unwanted]
    there = fit or known  # SLURM refuses
    best = {name: _best([node for node in there if name in node.partitions], nodes) for name in asked}
    most = max(gpus for gpus, _ in best.values())
    chosen = [name for name in asked if best[name][0] == most]
    given = sorted((limits[name] for name in chosen), key=lambda limit: 2**31 if limit is None else limit)
    return Partition(",".join(chosen), most, min(best[name][1] for name in chosen), given[0], given[-1])


def _best(there: Sequence[Node], needed: int) -> tuple[int, int]:
    """The most GPUs that so many of the nodes have, and the CPUs that all of these have."""
    gpus = sorted((node.gpus for node in there), reverse=True)
    if not gpus:
        return 0, 1
    most = gpus[needed - 1 if needed <= len(gpus) else 0]  # where there are too few, SLURM says so
    return most, min(node.cpus for node in there if node.gpus >= most)


def _fits(constraint: str | None, features: Sequence[str]) -> bool:
    """Whether a node has what is asked for; what is more than names with & and | is left to SLURM."""
    if constraint is None or re.search(r"[^\w.&|-]", constraint):
        return True
    return any(all(name in features for name in names.split("&")) for names in constraint.split("|"))


def _nodes() -> list[Node]:
    found = []
    for line in slurm("scontrol", "--all", "--oneliner", "show", "node").splitlines():
        told = {name: value for name, value in reversed(re.findall(r"(?:^| )(\w+)=(\S*)", line))}
        gpus = sum(int(number) for number in re.findall(r"gpu:(?:[^:,(]+:)?(\d+)", told.get("Gres", "")))
        # without those that the node keeps for its own (CoreSpecCount)
        cpus = int(told.get("CPUEfctv", told.get("CPUTot", "1")))
        names, features = (told.get(key, "").split(",") for key in ("Partitions", "ActiveFeatures"))
        threads = max(1, int(told.get("ThreadsPerCore", "1")))
        found.append(Node(told.get("NodeName", ""), names, features, gpus, cpus, threads))
    return found


def minutes(text: str) -> int | None:
    """SLURM's time: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S; None: no limit.

    Raises:
        ConfigError: none of these.
    """
    if text.lower() in ("infinite", "unlimited", "n/a"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise ConfigError(f"--time {text!r} is not a time: write D-HH:MM:SS, HH:MM:SS or minutes")
    days, first, second = (int(part or 0) for part in match.groups()[:3])
    if match[1] is not None:
        return days * 1440 + first * 60 + second
    if match[4] is not None:
        return first * 60 + second
    return first  # minutes, or minutes and seconds


def _words(text: str) -> str:
    """What SLURM said, in one line."""
    lines = [re.sub(r"^\w+: (error: |fatal: )?", "", line).strip() for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line))
