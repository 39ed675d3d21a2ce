"""Which machine of a job is this? From the command line, or from what its platform says in the environment."""

import contextlib
import re
import socket
import subprocess
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from ig_dist.errors import ConfigError

PORT = 29500  # torchrun's

# What platforms say: Kubeflow (in torchrun's words), SkyPilot, dstack, and Jobs and JobSets of Kubernetes.
NODES = ("PET_NNODES", "SKYPILOT_NUM_NODES", "DSTACK_NODES_NUM")
RANKS = ("PET_NODE_RANK", "SKYPILOT_NODE_RANK", "DSTACK_NODE_RANK", "JOB_COMPLETION_INDEX")
PROCESSES = ("PET_NPROC_PER_NODE", "SKYPILOT_NUM_GPUS_PER_NODE", "DSTACK_GPUS_PER_NODE")
MASTERS = ("PET_MASTER_ADDR", "SKYPILOT_NODE_IPS", "DSTACK_MASTER_NODE_IP")
PYTORCHJOB = {"WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"}  # of a PyTorchJob's pods, without LOCAL_RANK
Value = TypeVar("Value", int, str)


class Node(NamedTuple):
    """A machine among those of a job."""

    nodes: int = 1
    rank: int = 0
    processes: int = 1  # on this machine, and on each other one
    host: str = "127.0.0.1"  # the first machine
    port: int = PORT  # where the launchers meet


def this_node(
    environment: Mapping[str, str],
    *,
    nodes: int | None = None,
    rank: int | None = None,
    processes: int | None = None,
    master: str | None = None,
) -> Node:
    """This machine; what is not given is taken from the environment; processes are else as many as GPUs, or 1.

    Raises:
        ConfigError: what is given and what platforms say does not fit together, or is not enough.
    """
    said = dict(environment)
    if said.keys() >= PYTORCHJOB and not {"LOCAL_RANK", NODES[0], RANKS[0]} & said.keys():
        said[NODES[0]], said[RANKS[0]] = said["WORLD_SIZE"], said["RANK"]
        said.setdefault(MASTERS[0], said["MASTER_ADDR"])
        said.setdefault("PET_MASTER_PORT", said["MASTER_PORT"])
    every = nodes if nodes is not None else _agreed(said, NODES, "--nodes", _count)
    number = rank if rank is not None else None if every == 1 else _agreed(said, RANKS, "--node-rank", _whole)
    if processes is None:
        processes = _agreed(said, PROCESSES, "--processes", _count) or visible_gpus(environment) or 1
    if every is None and number:
        where = "--node-rank" if rank is not None else next(name for name in RANKS if name in said)
        raise ConfigError(f"{where} says that this is machine {number} of several, not of how many: give --nodes N")
    if every is None or every == 1:
        if number:
            raise ConfigError(f"--node-rank {number} with --nodes 1: the only node has rank 0")
        return Node(processes=processes)
    if number is None:
        raise ConfigError(f"--nodes {every}: give --node-rank, 0 to {every - 1}; nothing in the environment says it")
    if number >= every:
        raise ConfigError(f"node rank {number} of {every} nodes: ranks are 0 to {every - 1}")
    host, port = _host_and_port(master) if master is not None else _master(said, number)
    return Node(every, number, processes, host, port)


def visible_gpus(environment: Mapping[str, str]) -> int:
    """GPUs that a process here would see; asked without torch, whose import takes seconds."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        named = [part.strip() for part in chosen.split(",")]
        return next((place for place, name in enumerate(named) if name in ("", "-1", "NoDevFiles")), len(named))
    try:
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return len(re.findall(r"^GPU \d+:", told, re.MULTILINE))


def _agreed(
    said: Mapping[str, str], names: tuple[str, ...], option: str, read: Callable[[str, str], Value | None]
) -> Value | None:
    """What the variables of all platforms say together."""
    found = {name: value for name in names if (value := read(name, said.get(name, ""))) is not None}
    if len(set(found.values())) > 1:
        told = ", ".join(f"{name}={value}" for name, value in found.items())
        raise ConfigError(f"{told} contradict each other: give {option}")
    return next(iter(found.values()), None)


def _whole(name: str, text: str) -> int | None:
    if text and not text.isdecimal():
        raise ConfigError(f"{name}={text} is no number")
    return int(text) if text else None


def _count(name: str, text: str) -> int | None:
    """None also of 0, as a machine without GPUs says, and of torchrun's `auto`, `gpu` and `cpu`."""
    low, _, high = text.partition(":")
    if high and low != high:
        raise ConfigError(f"{name}={text}: ig-dist launch runs on a fixed number of nodes, give --nodes N")
    return None if text in ("auto", "gpu", "cpu") else _whole(name, low) or None


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":") if re.search(r"[^:\]]:\d*$|\]:\d*$", text) else (text, "", str(PORT))
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--master {text}: give HOST:PORT of the first node, e.g. 10.0.0.1:{PORT}")
    return host.strip("[]"), int(port)


def _master(said: Mapping[str, str], rank: int) -> tuple[str, int]:
    port = _whole("PET_MASTER_PORT", said.get("PET_MASTER_PORT", "")) or PORT
    if host := _agreed(said, MASTERS, "--master HOST:PORT", lambda _, text: next(iter(text.split()), None)):
        return host, port
    # a pod of an indexed Job or a JobSet is called NAME-INDEX.SERVICE, and /etc/hosts says so
    with contextlib.suppress(OSError):
        name, dot, service = socket.getfqdn().partition(".")
        if "JOB_COMPLETION_INDEX" in said and dot and name.endswith(f"-{rank}"):
            return f"{name.removesuffix(f'-{rank}')}-0.{service}", port
    raise ConfigError("several nodes: give --master HOST:PORT, the first of them; nothing in the environment says it")
