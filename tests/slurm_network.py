"""A network for machines that are namespaces: a switch, a cable to this machine, and one to each of them.

The switch is a bridge in a network namespace of its own. That ends with its process, and with it all cables.
"""

from __future__ import annotations

import json
import random
import subprocess

PROGRAMS = ("ip", "unshare", "nsenter", "setpriv")
# joins the machine in whose network namespace it runs: switch's process, port, hardware address, address
PLUG_IN = (
    'ip link set lo up; ip link add eth0 address "$3" type veth peer name "$2" netns "$1" &&'
    ' ip address add "$4/24" dev eth0 && ip link set eth0 up &&'
    ' nsenter -t "$1" -n ip link set "$2" master switch up'
)


def available() -> str | None:
    """Why there can be no such network on this machine, or None."""
    tried = subprocess.run(
        [
            "unshare",
            "--net",
            "bash",
            "-c",
            "ip link add switch type bridge && ip link add name one type veth peer name two",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no network of its own for each node: {tried.stderr.strip()}" if tried.returncode else None


class Network:
    """The switch, and the cables to it. This machine's address ends in 1."""

    def __init__(self) -> None:
        said = json.loads(subprocess.run(["ip", "-json", "address"], capture_output=True, check=True).stdout)
        taken = {address.get("local", "") for link in said for address in link["addr_info"]}
        free = [net for net in range(256) if f"198.18.{net}.1" not in taken]  # a range for such trials alone
        self._net = random.SystemRandom().choice(free)
        self._ports: dict[str, str] = {}
        self._plugged = 0
        make = "ip link add switch type bridge && ip link set switch up && echo && exec sleep infinity"
        self._switch = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "bash", "-c", make],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._switch.stdout is not None
        self._switch.stdout.readline()
        cable, switch = f"slurm{self._net}", str(self._switch.pid)
        self._ip("link", "add", cable, "type", "veth", "peer", "name", "host", "netns", switch)
        self._ip("address", "add", f"{self.address(1)}/24", "dev", cable)
        self._ip("link", "set", cable, "up")
        self._at_switch("host", "master", "switch", "up")

    def address(self, number: int) -> str:
        """Of the machine with this number; this one is 1."""
        return f"198.18.{self._net}.{number}"

    def plugging_in(self, name: str, number: int) -> list[str]:
        """Arguments of ``PLUG_IN`` for a machine; the cable ends with its network namespace."""
        self._plugged += 1  # the port of its last life may still be there
        self._ports[name] = f"port{self._plugged}"
        return [str(self._switch.pid), self._ports[name], f"02:00:00:00:00:{number:02x}", self.address(number)]

    def cut(self, name: str) -> None:
        """Nothing reaches that machine any more, nor leaves it."""
        self._at_switch(self._ports[name], "down")

    def mend(self, name: str) -> None:
        """As before the cut."""
        self._at_switch(self._ports[name], "up")

    def stop(self) -> None:
        """The end of switch and cables."""
        self._switch.kill()
        self._switch.communicate()

    def _at_switch(self, *change: str) -> None:
        self._ip("link", "set", *change, before=["nsenter", "-t", str(self._switch.pid), "-n"])

    def _ip(self, *what: str, before: list[str] | None = None) -> None:
        subprocess.run([*(before or []), "ip", *what], check=True, capture_output=True)
