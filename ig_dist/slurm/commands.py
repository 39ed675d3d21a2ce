"""SLURM's own commands. Each call gets a limit: they wait for ever, or for a minute, on a controller that is away."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

from ig_dist.errors import ConfigError, IgDistError

CLIENT_SECONDS = 60.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


class SlurmError(IgDistError):
    """SLURM answered no, or nothing."""


def slurm(*command: str) -> str:
    """The output of a client command.

    Raises:
        ConfigError: it is not on PATH, or knows of no cluster.
        SlurmError: it failed; the text is SLURM's.
    """
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"no {command[0]} on PATH: run this on a login node of a SLURM cluster, or use ig-dist launch here"
        )
    # sbatch typed inside an interactive job would hand that job's shape on to the new one
    drop = command[0] == "sbatch"
    environment = {k: v for k, v in os.environ.items() if not (drop and k.startswith("SLURM_") and k != "SLURM_CONF")}
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=CLIENT_SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer in {CLIENT_SECONDS:.0f} s") from None
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

    @property
    def active(self) -> bool:
        """It runs, or will."""
        return self.state not in ENDED


def queued(ids: Sequence[str]) -> list[QueuedJob]:
    """Those of the jobs that SLURM still knows; an array's tasks one by one."""
    if not ids:
        return []
    try:
        out = slurm("squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(ids)}", "-o", "%i|%T|%r|%N")
    except SlurmError as error:
        if "Invalid job id" not in str(error):  # all are forgotten
            raise
        if len(ids) == 1:
            return []
        return [job for one in ids for job in queued([one])]
    return [QueuedJob(*line.split("|", 3)) for line in out.splitlines()]


def host_names(nodes: str) -> list[str]:
    """``node[1-2]`` as a list."""
    return slurm("scontrol", "show", "hostnames", nodes).split()


class Partition(NamedTuple):
    """What the nodes of a partition have."""

    name: str
    gpus: int
    cpus: int
    minutes: int | None
    """Time limit; None: none."""


def partition(name: str | None) -> Partition | None:
    """A partition, or the default one, by its nodes with the most GPUs; None: SLURM names none."""
    found = []
    for line in slurm("sinfo", "--noheader", "-o", "%P|%G|%c|%l").splitlines():
        label, gres, cpus, limit = line.split("|", 3)
        if label == name or label == f"{name}*" or (name is None and label.endswith("*")):
            gpus = sum(int(number) for number in re.findall(r"gpu:(?:[^:,(]+:)?(\d+)", gres))
            found.append(Partition(label.rstrip("*"), gpus, int(cpus.rstrip("+")), minutes(limit)))
    return max(found, key=lambda p: (p.gpus, p.cpus), default=None)


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
