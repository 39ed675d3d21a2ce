"""Machines of their own on this machine, as far as a network is concerned: namespaces with a cable between them.

Each has a host name, an /etc/hosts where its own name is 127.0.1.1, as Debian and Ubuntu write it, and one address.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

NAMES = ("node1", "node2")
ADDRESSES = ("10.213.7.1", "10.213.7.2")


@contextmanager
def machines(folder: Path) -> Iterator[list[int]]:
    """Two of them; a process id of each, for ``enter``.

    Raises:
        OSError: not on this machine: no root, no ``ip``, or a kernel without them.
    """
    with ExitStack() as stack:
        held = []
        for name in NAMES:
            others = [f"{address} {other}" for other, address in zip(NAMES, ADDRESSES, strict=True) if other != name]
            hosts = folder / f"hosts-{name}"
            hosts.write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {name}", *others]) + "\n")
            inside = (
                f"hostname {name} && mount --bind {hosts} /etc/hosts && ip link set lo up && echo ready && exec cat"
            )
            process = subprocess.Popen(
                ["unshare", "--net", "--uts", "--mount", "bash", "-c", inside],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None and process.stderr is not None
            if process.stdout.readline() != b"ready\n":
                raise OSError(process.stderr.read().decode())
            held.append(process.pid)
        _call("ip", "link", "add", "cable1", "netns", held[0], "type", "veth", "peer", "cable2", "netns", held[1])
        for number, (pid, address) in enumerate(zip(held, ADDRESSES, strict=True), start=1):
            for command in (f"addr add {address}/24 dev cable{number}", f"link set cable{number} up"):
                _call("nsenter", f"--net=/proc/{pid}/ns/net", "ip", *command.split())
        yield held


def enter(machine: int) -> None:
    """Be on that machine from now on. Of a process with one thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("net", "uts", "mnt"):
        place = os.open(f"/proc/{machine}/ns/{kind}", os.O_RDONLY)
        if libc.setns(place, 0):
            raise OSError(ctypes.get_errno(), f"setns {kind}")
        os.close(place)


def _call(*command: object) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command}: {done.stderr}")
