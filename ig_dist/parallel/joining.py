"""Before the processes of a job form groups: the files they may open, what each is, and by which network they talk.

Each tells the job's store what it is. Rank 0 compares, and all end alike where they do not fit together.
"""

import array
import contextlib
import fcntl
import ipaddress
import json
import os
import resource
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as torch_dist
from torch._C._distributed_c10d import Store, TCPStore  # torch.distributed does not name them as its own
from torch.distributed.rendezvous import rendezvous

from ig_dist import __version__
from ig_dist.errors import ConfigError, HangError, LostPeerError, NodeError, first_line, listed
from ig_dist.parallel.blame import blame
from ig_dist.terminal import warn
from ig_dist.this_process import Process, host

GROUPS = 2
"""Groups of all ranks at most: ours, and DeepSpeed's own; FSDP2 makes none, and with replicas two smaller ones."""
_OTHER_FILES = 512  # shards, their storage, the cache, libraries
_ENOUGH_FILES = 1 << 16
_LISTEN_S = 5.0
_VERDICT, _HEARD = "ig_dist/verdict", "ig_dist/heard"
_INTERFACE = "GLOO_SOCKET_IFNAME"


class _Card(NamedTuple):
    """What a process tells of itself."""

    host: str
    versions: dict[str, str]
    device: str
    gpu: str
    address: str  # by which it reaches the store; empty: nobody asks
    local_world_size: int


class _Verdict(NamedTuple):
    """What rank 0 found."""

    error: str
    guilty: list[int]  # ranks whose machine is at fault; none: it is the user's mistake
    address: str  # one that other machines can reach; empty: all are on one
    local_world_size: int  # the most that a machine has


def open_files(world_size: int, rank: int) -> int:
    """How many files a rank has open at most.

    Counted with gloo: a group has a connection to each of the others, one socket that listens and four more files. The
    store is a connection for the job and one for its watchdog; rank 0 has the other ends too.
    """
    return _OTHER_FILES + GROUPS * (world_size + 4) + (2 * world_size + 8 if rank == 0 else 2)


def allow_open_files(process: Process) -> None:
    """Raise this process's limit as far as it is free to.

    Raises:
        ConfigError: that is not far enough for so many ranks.
    """
    needed = open_files(process.world_size, process.rank)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = _ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH_FILES)
    if allowed < needed:
        raise ConfigError(
            f"{process.world_size} ranks need up to {needed} open files each, and this machine allows {allowed}:"
            " raise the hard limit (ulimit -Hn; LimitNOFILE of slurmd or of the container)"
        )
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def meet_all(process: Process, device: torch.device, join_s: float) -> tuple[Store, int]:
    """Meet the others at MASTER_ADDR; the job's store, and how many processes a machine has at most. COLLECTIVE.

    Chooses gloo's network interface where nobody has. Raises HangError when some do not come, LostPeerError when rank 0
    ends meanwhile, and what ``compare`` finds: a ConfigError, or a NodeError where a machine is at fault.
    """
    deadline, missing, store = timedelta(seconds=join_s), "", None
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    keys = [f"ig_dist/{rank}" for rank in range(process.world_size)]
    try:
        store = _store(process, deadline)
        store.set(keys[process.rank], json.dumps(_card(process, device)))
        if process.rank == 0:
            try:
                store.wait(keys, deadline)
            except torch_dist.DistStoreError:
                missing = f" (without {_named([rank for rank, key in enumerate(keys) if not store.check([key])])})"
                raise
            cards = [_Card(*json.loads(card)) for card in store.multi_get(keys)]
            store.set(_VERDICT, json.dumps(compare(cards)))
        store.wait([_VERDICT], deadline)
        verdict = _Verdict(*json.loads(store.get(_VERDICT)))
    except torch_dist.DistError as error:
        if store is not None and isinstance(error, torch_dist.DistNetworkError):  # rank 0 was there, and is gone
            raise LostPeerError(f"the process at {place}, rank 0, ended; its message says why") from None
        raise HangError(
            f"not all of the {process.world_size} processes came to {place} within {join_s:.0f} s (train.timeout_s)"
            f"{missing}: see what the others say, then start the job again ({first_line(error)})"
        ) from None
    if verdict.error:
        store.add(_HEARD, 1)
        if process.rank == 0:
            blame(verdict.guilty)
            _wait_for_listeners(store, process.world_size)
        raise NodeError(verdict.error) if verdict.guilty else ConfigError(verdict.error)
    if verdict.address and _INTERFACE not in os.environ:
        choose_interface(verdict.address)
    return store, verdict.local_world_size


def _wait_for_listeners(store: Store, world_size: int) -> None:
    """Until all have heard the verdict, for the store may end with this process; not for those that do not listen."""
    deadline = time.monotonic() + _LISTEN_S
    with contextlib.suppress(torch_dist.DistError):
        while store.add(_HEARD, 0) < world_size and time.monotonic() < deadline:
            time.sleep(0.05)


def _store(process: Process, deadline: timedelta) -> Store:
    """The job's: torchrun's, or rank 0's, which does not wait by itself, for it cannot say for whom."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store: Store = next(rendezvous("env://", timeout=deadline))[0]
        return store
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        process.world_size,
        is_master=process.rank == 0,
        timeout=deadline,
        wait_for_workers=False,
        multi_tenant=True,
    )


def _card(process: Process, device: torch.device) -> _Card:
    versions = {"ig_dist": __version__, "PyTorch": torch.__version__, "CUDA": str(torch.version.cuda)}
    gpu = ""
    if device.type == "cuda":
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        gpu = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    several = process.local_world_size < process.world_size and _INTERFACE not in os.environ
    address = address_towards(os.environ["MASTER_ADDR"]) if several else ""
    return _Card(host(), versions, device.type, gpu, address, process.local_world_size)


def compare(cards: Sequence[_Card]) -> _Verdict:
    """Whether the processes, in the order of their ranks, fit together. Pure."""
    error, guilty = "", []
    for name in ("ig_dist", "PyTorch", "CUDA", "NCCL"):
        found = _ranks_by([card.versions.get(name, "") for card in cards if card.device == "cuda" or name != "NCCL"])
        if len(found) > 1 and not error:
            said = ", ".join(f"{value} on {_named(ranks, cards)}" for value, ranks in found.items())
            error = f"the ranks have different versions of {name}: {said}. Install the same on every machine"
    devices = _ranks_by([card.device for card in cards])
    if len(devices) > 1 and not error:
        without = devices["cpu"]
        error = f"{_named(without, cards)} found no GPU, the others did: mend that machine, or start without it"
        guilty = without if 2 * len(without) <= len(cards) else []
    for gpu, ranks in _ranks_by([card.gpu for card in cards]).items():
        if gpu and len(ranks) > 1 and not error:
            error = (
                f"{_named(ranks, cards)} have one GPU between them ({gpu}): start one process for each GPU, or give"
                " each its own (srun --gpus-per-task=1)"
            )
    outside = [card.address for card in cards if card.address and not ipaddress.ip_address(card.address).is_loopback]
    return _Verdict(error, guilty, next(iter(outside), ""), max(card.local_world_size for card in cards))


def _ranks_by(values: Sequence[str]) -> dict[str, list[int]]:
    """The ranks of each value, the most frequent first."""
    found: dict[str, list[int]] = defaultdict(list)
    for rank, value in enumerate(values):
        found[value].append(rank)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _named(ranks: Sequence[int], cards: Sequence[_Card] = ()) -> str:
    """``ranks 0-5, 7 (gpu01, gpu02)``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    said = [f"{first}-{last}" if last > first else f"{first}" for first, last in spans]
    hosts = list(dict.fromkeys(cards[rank].host for rank in ranks)) if cards else []
    where = f" ({listed(hosts)})" if hosts else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(said)}{where}"


def choose_interface(peer: str) -> None:
    """Tell gloo by which interface the others can reach this machine.

    It would take the one of this machine's own name, which Debian and Ubuntu give to 127.0.1.1. NCCL does not look at
    names, and spreads its sockets over all networks that it finds: it is left alone. ``peer`` is the address of another
    machine, for the machine of MASTER_ADDR, which may reach that by the loopback.
    """
    address = address_towards(os.environ["MASTER_ADDR"])
    if not address or ipaddress.ip_address(address).is_loopback:
        address = address_towards(peer)
    interface = interfaces().get(address)
    if interface is None:
        warn(f"no network interface has the address {address!r}; if ranks cannot connect, set {_INTERFACE}")
    else:
        os.environ[_INTERFACE] = interface


def address_towards(name: str) -> str:
    """This machine's address on the way to another one; empty: there is no way. Sends nothing."""
    try:
        family, _, _, _, place = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as way:
            way.connect(place)
            return str(way.getsockname()[0]).partition("%")[0]
    except OSError:
        return ""


def interfaces() -> dict[str, str]:
    """The network interface of each of this machine's addresses."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        # SIOCGIFCONF: entries of 40 bytes, a name of 16 and an address
        entries = array.array("B", bytes(40 * 1024))
        told = fcntl.ioctl(asked, 0x8912, struct.pack("iL", len(entries), entries.buffer_info()[0]))
    for start in range(0, struct.unpack("iL", told)[0], 40):
        entry = entries[start : start + 40].tobytes()
        found[socket.inet_ntoa(entry[20:24])] = entry[:16].split(b"\0")[0].decode().partition(":")[0]
    with contextlib.suppress(OSError):  # a kernel without IPv6
        for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
            digits, *_, name = line.split()
            found[str(ipaddress.IPv6Address(int(digits, 16)))] = name
    return found
