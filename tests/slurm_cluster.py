"""A real SLURM cluster of a few nodes on this machine, for tests: slurmctld, munged, and a slurmd for each node.

    with SlurmCluster(nodes=2) as cluster:
        subprocess.run(["sbatch", "job.sh"], env={**os.environ, **cluster.environment()})
        cluster.kill_node("node2")

Each node is a slurmd in its own UTS, mount and PID namespace, with its own host name, address (127.0.0.11 and up) and
two devices that count as GPUs. It starts in 1 to 2 s, needs root, and neither systemd nor cgroups.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.object_store import free_port, tail

PACKAGES = "slurmctld slurmd slurm-client munge"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "munged", "unshare", "setpriv")
SEARCH = f"{os.environ.get('PATH', '')}:/usr/bin:/usr/sbin:/sbin"
START_SECONDS = 60.0
CLIENT_SECONDS = 30.0  # clients wait for ever, or for a minute, on a cluster that is gone
KILL_WAIT_S = 5
GPUS_PER_NODE, CPUS_PER_NODE = 2, 8


def available() -> str | None:
    """Why there can be no cluster on this machine, or None."""
    if missing():
        return f"no {', '.join(missing())} on this machine (Debian: apt install {PACKAGES})"
    if os.geteuid() != 0:
        return "a SLURM cluster on this machine needs root, for its nodes' namespaces"
    return None


def missing() -> list[str]:
    """Programs that are not on this machine."""
    return [name for name in PROGRAMS if not shutil.which(name, path=SEARCH)]


class SlurmCluster:
    """One cluster; as a context manager it starts and stops.

    The kernel kills its daemons when the thread that started them ends: start it in a thread that lives as long as it
    is needed, such as the main one. Partitions: ``main``, and ``high``, whose jobs preempt those of main.
    """

    def __init__(self, nodes: int = 2) -> None:
        self.nodes = [f"node{number + 1}" for number in range(nodes)]
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def environment(self) -> dict[str, str]:
        """What makes SLURM's commands find this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SEARCH}

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
            for node in self.nodes:
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
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start_controller(self) -> None:
        """Start slurmctld, again after `kill_controller`."""
        self._daemon("slurmctld", "-D")

    def kill_controller(self) -> None:
        """SIGKILL of slurmctld."""
        self._kill("slurmctld")

    def start_node(self, node: str) -> None:
        """Start a node, again after `kill_node`."""
        inside = (
            'hostname "$2"; mount --bind "$1/hosts" /etc/hosts; trap "kill 0" TERM;'
            ' slurmd -D -f "$1/slurm.conf" -N "$2" & wait $!'
        )
        namespaces = ["--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._daemon("unshare", *namespaces, "bash", "-c", inside, "init", str(self.folder), node, name=node)

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
        return self.run("sinfo", "-h", "-N", "-n", node, "-p", "main", "-o", "%T", check=False).strip("*")

    def wait_for_state(self, node: str, state: str) -> None:
        """Wait until SLURM knows it."""
        self._until(lambda: self.state(node) == state, f"{node} was never {state}")

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
            states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split()
            return states == ["idle"] * len(self.nodes)

        self._until(idle, "the nodes never became idle")

    def cancel_all(self) -> None:
        """End all jobs and wait until they are gone."""
        self.run("scancel", "-u", "root", check=False)
        self.run("scancel", "-u", "root", "--state=PENDING", check=False)
        self._until(lambda: not self.run("squeue", "-h", "-o", "%i", check=False), "jobs did not end")

    def _namespace(self, pid: int, *, child: bool = False) -> int:
        try:
            return Path(f"/proc/{pid}/ns/{'pid_for_children' if child else 'pid'}").stat().st_ino
        except OSError:
            return 0

    def _write_files(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        folder.chmod(0o755)
        for name in ("munge", "state", "log", "dev", *(f"spool-{node}" for node in self.nodes)):
            (folder / name).mkdir()
        (folder / "munge/key").write_bytes(os.urandom(1024))
        (folder / "munge/key").chmod(0o600)
        for number in range(GPUS_PER_NODE):  # devices that do nothing, as /dev/null does
            os.mknod(folder / f"dev/gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        addresses = {node: f"127.0.0.{11 + number}" for number, node in enumerate(self.nodes)}
        hosts = [f"127.0.0.1 localhost {host}", *(f"{address} {node}" for node, address in addresses.items())]
        (folder / "hosts").write_text("\n".join(hosts) + "\n")
        (folder / "gres.conf").write_text(
            f"NodeName={','.join(self.nodes)} Name=gpu File={folder}/dev/gpu[0-{GPUS_PER_NODE - 1}]\n"
        )
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}(127.0.0.1)",
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
            "SelectTypeParameters": "CR_Core",
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
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        lines += [
            f"NodeName={node} NodeHostname={node} NodeAddr={address} Port={free_port()} CPUs={CPUS_PER_NODE}"
            f" RealMemory=64000 Gres=gpu:{GPUS_PER_NODE} Feature=cpuonly State=UNKNOWN"
            for node, address in addresses.items()
        ]
        lines += [
            "PartitionName=main Nodes=ALL Default=YES MaxTime=120 DefaultTime=30 PriorityTier=1 PreemptMode=REQUEUE",
            "PartitionName=high Nodes=ALL MaxTime=120 DefaultTime=30 PriorityTier=10 PreemptMode=OFF",
        ]
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")

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
