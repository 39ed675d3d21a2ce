"""A real SLURM cluster of a few nodes on this machine, for tests: slurmctld, munged, and a slurmd for each node.

    with SlurmCluster(nodes=2) as cluster:
        subprocess.run(["sbatch", "job.sh"], env={**os.environ, **cluster.environment()})
        cluster.kill_node("node2")

Each node is a slurmd in namespaces of its own: host name, processes, network, and a hosts file in which its own name
stands for 127.0.1.1, as on Debian. ``node1``, ... have two devices each that count as GPUs, ``cpu1`` has none, but two
threads for each core. All starts in 1 to 2 s, needs root, and neither systemd nor cgroups. Jobs are root's, or an
ordinary user's (`as_user`).
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests import slurm_network
from tests.object_store import free_port, tail
from tests.slurm_network import PLUG_IN, Network

PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "munged", *slurm_network.PROGRAMS)
SEARCH = f"{os.environ.get('PATH', '')}:/usr/bin:/usr/sbin:/sbin"
START_SECONDS = 60.0
CLIENT_SECONDS = 30.0  # clients wait for ever, or for a minute, on a cluster that is gone
SAVE_SECONDS = 6.0  # the controller saves its state every 5 s
KILL_WAIT_S = 5
GPUS_PER_NODE, CPUS_PER_NODE = 2, 8
ROOT = Path(__file__).resolve().parents[1]
USER, USER_ID = "ada", 20016


def available() -> str | None:
    """Why there can be no cluster on this machine, or None."""
    if missing():
        return f"no {', '.join(missing())} on this machine (Debian: apt install {PACKAGES})"
    if os.geteuid() != 0:
        return "a SLURM cluster on this machine needs root, for its nodes' namespaces"
    return slurm_network.available()


def missing() -> list[str]:
    """Programs that are not on this machine."""
    return [name for name in PROGRAMS if not shutil.which(name, path=SEARCH)]


class SlurmCluster:
    """One cluster; as a context manager it starts and stops.

    The kernel kills its daemons when the thread that started them ends: start it in a thread that lives as long as it
    is needed, such as the main one. Partitions: ``main``; ``high``, whose jobs preempt those of main; and ``cpu``, the
    node without GPUs.
    """

    def __init__(self, nodes: int = 2) -> None:
        self.nodes = [f"node{number + 1}" for number in range(nodes)]
        """Those with GPUs."""
        self._numbers = {name: 11 + place for place, name in enumerate([*self.nodes, "cpu1"])}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def environment(self) -> dict[str, str]:
        """What makes SLURM's commands find this cluster."""
        ranks = {"IG_DIST_DEVICE": "cpu", "IG_DIST_SLURM_SETUP": "export OMP_NUM_THREADS=1"}  # the cores are few
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SEARCH, **ranks}

    def run(self, *command: object, check: bool = True) -> str:
        """The output of a client command, which gets ``CLIENT_SECONDS``."""
        done = subprocess.run(
            [str(part) for part in command],
            env={**os.environ, **self.environment()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CLIENT_SECONDS,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
        return done.stdout.strip()

    def start(self) -> Self:
        """Start everything; returns when all nodes are idle."""
        # a socket's path must be shorter than those of test folders are
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.home = self.folder / "home"
        """Of the ordinary user."""
        self.network = Network()
        try:
            self._write_files()
            munge = self.folder / "munge"
            self._daemon(
                "munged",
                "--foreground",
                f"--key-file={munge / 'key'}",
                f"--socket={munge / 'socket'}",
                f"--pid-file={munge / 'pid'}",
                f"--log-file={munge / 'log'}",
                f"--seed-file={munge / 'seed'}",
            )
            self._until(lambda: (munge / "socket").exists(), "munged made no socket")
            self.start_controller()
            for node in self._numbers:
                self.start_node(node)
            self.wait_for_nodes()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Kill everything, jobs included, and remove the folder."""
        for process in self._running.values():
            process.kill()  # an unshare that dies takes its whole namespace with it
        for process in self._running.values():
            process.wait()
        self._running.clear()
        self.network.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start_controller(self) -> None:
        """Start slurmctld."""
        inside = '. "$0/mounts"; exec slurmctld -D'
        self._daemon("unshare", "--mount", "bash", "-c", inside, str(self.folder), name="slurmctld")

    def restart_controller(self) -> None:
        """Start slurmctld again, after `kill_controller`; returns when it answers."""
        self.start_controller()
        self._until(lambda: "UP" in self.run("scontrol", "ping", check=False), "the controller did not come back")

    def configure(self, **settings: object) -> None:
        """Write settings into slurm.conf; daemons that run read them after ``scontrol reconfigure``."""
        file = self.folder / "slurm.conf"
        lines = [line for line in file.read_text().splitlines() if line.partition("=")[0] not in settings]
        file.write_text("\n".join([*(f"{name}={value}" for name, value in settings.items()), *lines]) + "\n")

    def kill_controller(self) -> None:
        """SIGKILL of slurmctld, once it has written down what it knows: it forgets jobs of its last 5 s."""
        time.sleep(SAVE_SECONDS)
        self._kill("slurmctld")

    def start_node(self, node: str) -> None:
        """Start a node, again after `kill_node`."""
        inside = (
            'hostname "$2"; mount --bind "$1/hosts-$2" /etc/hosts; . "$1/mounts"; trap "kill 0" TERM;'
            ' slurmd -D -f "$1/slurm.conf" -N "$2" & wait $!'
        )
        namespaces = "--uts --mount --pid --fork --kill-child --mount-proc"
        plug_in = f'{PLUG_IN} && shift 4 && exec unshare {namespaces} bash -c "$1" init "$2" "$3"'
        network = self.network.plugging_in(node, self._numbers[node])
        self._daemon(
            *("unshare", "--net", "bash", "-c", plug_in, "plug", *network), inside, str(self.folder), node, name=node
        )

    def as_user(self, *command: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command as an ordinary user does on a login node, in a home of his own."""
        become = f"setpriv --reuid={USER_ID} --regid={USER_ID} --clear-groups --bounding-set=-all --inh-caps=-all"
        return subprocess.run(
            ["unshare", "--mount", "bash", "-c", f'. "$0/mounts"; exec {become} "$@"', self.folder, *map(str, command)],
            env={
                "LC_ALL": "C.UTF-8",
                "HOME": str(self.home),
                "USER": USER,
                "OMP_NUM_THREADS": "1",
                **self.environment(),
            },
            **{"cwd": self.home, "capture_output": True, "text": True, "timeout": 300, "check": False, **options},
        )

    def kill_node(self, node: str, *, noticed: bool = True) -> None:
        """SIGKILL of everything on a node, as when its power fails.

        Args:
            node: its name.
            noticed: tell SLURM, which would find out in 25 to 30 s by itself.
        """
        self._kill(node)
        if noticed:
            self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=power")

    def restore_node(self, node: str) -> None:
        """Have a node again that was killed, if it was."""
        if node not in self._running:
            self.start_node(node)
        if self.state(node) not in ("idle", "allocated", "mixed", "completing"):
            self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)

    def state(self, node: str) -> str:
        """As sinfo says it."""
        return self.run("sinfo", "-h", "-N", "-n", node, "-o", "%T", check=False).split("\n")[0].strip("*")

    def wait_for_state(self, node: str, state: str) -> None:
        """Wait until SLURM knows it."""
        self._until(lambda: self.state(node) == state, f"{node} was never {state}")

    def process(self, node: str) -> int:
        """One in a node's network."""
        return self._running[node].pid

    def processes(self, node: str) -> dict[int, str]:
        """The processes of a node: their ids on this machine and their command lines."""
        namespace = self._namespace(self._running[node].pid, child=True)
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and self._namespace(int(entry.name)) == namespace:
                try:
                    text = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                except OSError:
                    continue
                if text:
                    found[int(entry.name)] = text
        return found

    def wait_for_nodes(self) -> None:
        """Wait until every node is idle."""

        def idle() -> bool:
            states = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).splitlines()
            return set(states) == {f"{node} idle" for node in self._numbers}

        self._until(idle, "the nodes never became idle")

    def cancel_all(self) -> None:
        """End all jobs and wait until they are gone."""
        for which in itertools.product(("root", str(USER_ID)), ((), ("--state=PENDING",))):
            self.run("scancel", "-u", which[0], *which[1], check=False)
        self._until(lambda: not self.run("squeue", "-h", "-o", "%i", check=False), "jobs did not end")

    def _namespace(self, pid: int, *, child: bool = False) -> int:
        try:
            return Path(f"/proc/{pid}/ns/{'pid_for_children' if child else 'pid'}").stat().st_ino
        except OSError:
            return 0

    def _write_files(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        folder.chmod(0o755)
        for name in ("munge", "state", "log", "dev", "home", "open", *(f"spool-{node}" for node in self._numbers)):
            (folder / name).mkdir()
        (folder / "munge/key").write_bytes(os.urandom(1024))
        (folder / "munge/key").chmod(0o600)
        for number in range(GPUS_PER_NODE):  # devices that do nothing, as /dev/null does
            os.mknod(folder / f"dev/gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        shutil.chown(self.home, USER_ID, USER_ID)
        account = f"{USER}:x:{USER_ID}:{USER_ID}::{self.home}:/bin/bash\n"
        (folder / "passwd").write_text(Path("/etc/passwd").read_text() + account)
        (folder / "mounts").write_text("\n".join([f"mount --bind {folder}/passwd /etc/passwd", *self._opened()]) + "\n")
        addresses = {host: self.network.address(1)}
        addresses |= {node: self.network.address(number) for node, number in self._numbers.items()}
        for node in self._numbers:
            lines = ["127.0.0.1 localhost", f"127.0.1.1 {node}"]
            lines += [f"{address} {name}" for name, address in addresses.items() if name != node]
            (folder / f"hosts-{node}").write_text("\n".join(lines) + "\n")
        (folder / "gres.conf").write_text(
            f"NodeName={','.join(self.nodes)} Name=gpu File={folder}/dev/gpu[0-{GPUS_PER_NODE - 1}]\n"
        )
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}({addresses[host]})",
            "SlurmctldPort": free_port(),
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={folder}/munge/socket,cred_expire=5",  # it sets the delay of a requeue: this plus 1 s
            "CredType": "cred/munge",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool-%n",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "slurmd-%n.pid",
            "SlurmctldLogFile": folder / "log/slurmctld.log",
            "SlurmdLogFile": folder / "log/slurmd-%n.log",
            "MailProg": "/bin/true",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SwitchType": "switch/none",
            "MpiDefault": "none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "JobCompType": "jobcomp/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core_Memory",
            "SlurmdParameters": "config_overrides",
            "SchedulerParameters": "batch_sched_delay=0,sched_min_interval=0,bf_interval=1,sched_interval=2",
            "FirstJobId": random.SystemRandom().randrange(1000, 9_000_000),  # ports are made from it
            "JobRequeue": 1,
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "ReturnToService": 2,
            "SlurmdTimeout": 6,
            "SlurmctldTimeout": 30,
            "KillWait": KILL_WAIT_S,
            "MinJobAge": 600,
            "InactiveLimit": 0,
            "GresTypes": "gpu",
            "DefMemPerCPU": 4000,
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        for node, number in self._numbers.items():
            has = f"CPUs={CPUS_PER_NODE} RealMemory=64000 Gres=gpu:{GPUS_PER_NODE} Feature=cpuonly"
            cores = f"CPUs={CPUS_PER_NODE // 2} Sockets=1 CoresPerSocket={CPUS_PER_NODE // 4} ThreadsPerCore=2"
            has = has if node in self.nodes else f"{cores} RealMemory=32000"
            address = f"NodeHostname={node} NodeAddr={self.network.address(number)} Port={free_port()}"
            lines.append(f"NodeName={node} {address} {has} State=UNKNOWN")
        nodes = ",".join(self.nodes)
        lines += [
            f"PartitionName=main Nodes={nodes} Default=YES MaxTime=120 PriorityTier=1 PreemptMode=REQUEUE",
            f"PartitionName=high Nodes={nodes} MaxTime=120 PriorityTier=10 PreemptMode=OFF",
            "PartitionName=cpu Nodes=cpu1 MaxTime=240 PriorityTier=1 PreemptMode=REQUEUE",
        ]
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")

    def _opened(self) -> list[str]:
        """How the user reads this Python and this checkout where they lie in root's home: that is put in its place."""
        mounts, closed = [], None
        for path in dict.fromkeys(map(Path, (sys.base_prefix, sys.prefix, ROOT))):
            way = [path, *path.parents]
            closed = next((part for part in reversed(way) if not part.stat().st_mode & stat.S_IXOTH), closed)
            if closed in way:
                there = self.folder / "open" / path.relative_to(closed)
                there.mkdir(parents=True, exist_ok=True)
                mounts.append(f"mount --bind {path} {there}")
        return [*mounts, f"mount --rbind {self.folder / 'open'} {closed}"] if closed else []

    def _daemon(self, program: str, *arguments: str, name: str = "") -> None:
        name = name or program
        with (self.folder / f"{name}.out").open("ab") as out:
            self._running[name] = subprocess.Popen(
                # whatever ends this process, the daemons end with it
                ["setpriv", "--pdeathsig", "KILL", program, *arguments],
                env={"LC_ALL": "C.UTF-8", **self.environment()},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _kill(self, name: str) -> None:
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def _until(self, true: Callable[[], bool], problem: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not true():
            dead = [name for name, process in self._running.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = [*(self.folder / f"{name}.out" for name in dead), *sorted((self.folder / "log").glob("*.log"))]
                told = " | ".join(f"{log.name}: {tail(log)}" for log in logs if log.exists())
                raise RuntimeError(f"{' '.join(dead)} ended: {told}" if dead else f"{problem}: {told}")
            time.sleep(0.05)
