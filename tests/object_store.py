"""A real S3 server on loopback for tests and benchmarks: Ceph's RADOS gateway before one monitor and one disk daemon.

    with ObjectStore(folder) as store:
        store.create_bucket("data")
        subprocess.run(command, env={**os.environ, **store.environment()})

``memstore`` keeps everything in memory and starts in about 1 s; ``bluestore`` keeps it in a sparse file, starts in
about 2 s, and survives `restart`, which kills all daemons.
"""

from __future__ import annotations

import http.client
import os
import random
import shutil
import socket
import subprocess
import time
import uuid
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

PACKAGES = "radosgw ceph-mon ceph-osd ceph-common"
PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "monmaptool", "setpriv")
ACCESS_KEY, SECRET_KEY, REGION = "test-access", "test-secret", "us-east-1"
# An environment of their own: CEPH_ARGS, CEPH_CONF and the like would speak of another cluster.
ENVIRONMENT = {"PATH": f"{os.environ.get('PATH', '')}:/usr/bin:/usr/sbin", "LC_ALL": "C.UTF-8"}
START_SECONDS = 60.0


def available() -> str | None:
    """Why there can be no store on this machine, or None."""
    return f"no {', '.join(missing())} on this machine (Debian: apt install {PACKAGES})" if missing() else None


def missing() -> list[str]:
    """Programs that are not on this machine."""
    return [name for name in PROGRAMS if not shutil.which(name, path=ENVIRONMENT["PATH"])]


def free_port() -> int:
    """A port below those that the kernel gives to clients, so that it is still free when a server starts again."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


class ObjectStore:
    """One store; as a context manager it starts and stops.

    The daemons run in the foreground as children, and the kernel kills them when the thread that started them ends:
    start a store in a thread that lives as long as it is needed, such as the main one.
    """

    def __init__(self, folder: Path, store: Literal["memstore", "bluestore"] = "memstore") -> None:
        self.folder = folder.absolute()
        self.store = store
        self.port, self._monitor_port = free_port(), free_port()
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pids(self) -> dict[str, int]:
        """The daemons that run: their names and process ids."""
        return {name: process.pid for name, process in self._running.items() if process.poll() is None}

    def environment(self) -> dict[str, str]:
        """What makes any S3 client find this store, and nothing of the developer's own account or proxy."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    @cached_property
    def client(self) -> Any:
        """A botocore S3 client, for what s3fs does not offer; made once, for it takes 0.3 s."""
        import botocore.config
        import botocore.session

        session = botocore.session.Session()
        session.set_config_variable("profile", None)
        session.set_config_variable("config_file", os.devnull)
        return session.create_client(
            "s3",
            region_name=REGION,
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=botocore.config.Config(proxies={}),
        )

    def create_bucket(self, name: str) -> None:
        self.client.create_bucket(Bucket=name)

    def start(self) -> Self:
        """Make the store and start it; returns when it answers."""
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        for name in ("mon", "osd"):
            (self.folder / name).mkdir(parents=True)
        self._write_config(fsid)
        try:
            monmap = self.folder / "monmap"
            address = f"[v2:127.0.0.1:{self._monitor_port}/0]"
            self._command("monmaptool", "--create", "--addv", "a", address, "--fsid", fsid, monmap, config=False)
            self._command("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
            self._daemon("ceph-mon", "-i", "a")
            self._command("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd, "--no-mon-config")
            self._command("ceph", "osd", "new", osd)
            self._daemon("ceph-osd", "-i", "0")
            user = ("--uid=test", "--display-name=test", f"--access-key={ACCESS_KEY}", f"--secret={SECRET_KEY}")
            self._command("radosgw-admin", "user", "create", *user)
            self.restart_gateway()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Kill all daemons; a bluestore starts again with `restart`."""
        for process in self._running.values():
            process.kill()
        for process in self._running.values():
            process.wait()
        self._running.clear()

    def kill_gateway(self) -> None:
        """SIGKILL of the gateway alone."""
        gateway = self._running.pop("radosgw")
        gateway.kill()
        gateway.wait()

    def restart_gateway(self) -> None:
        """Start the gateway on its old port; returns when it answers."""
        if "radosgw" in self._running:
            self.kill_gateway()
        self._daemon("radosgw", "-n", "client.rgw")
        self._wait_until_it_answers()

    def restart(self) -> None:
        """SIGKILL of all daemons, and a start on what they had written."""
        if self.store == "memstore":
            raise ValueError("a memstore forgets everything: use store='bluestore'")
        self.stop()
        self._daemon("ceph-mon", "-i", "a")
        self._daemon("ceph-osd", "-i", "0")
        self.restart_gateway()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        for name in ("mon", "osd"):  # the logs stay
            shutil.rmtree(self.folder / name)

    def _write_config(self, fsid: str) -> None:
        folder = self.folder
        sections: dict[str, dict[str, object]] = {
            "global": {
                "fsid": fsid,
                "mon host": f"[v2:127.0.0.1:{self._monitor_port}/0]",
                "public addr": "127.0.0.1",
                "cluster addr": "127.0.0.1",
                "ms bind msgr1": "false",
                # users of the cluster itself need no key; without `crc` the gateway then waits for ever
                **{f"auth {part} required": "none" for part in ("cluster", "service", "client")},
                "ms mon client mode": "crc",
                # one daemon, one copy
                "osd pool default size": 1,
                "osd pool default min size": 1,
                "osd pool default pg num": 1,
                "osd pool default pgp num": 1,
                "osd pool default pg autoscale mode": "off",
                "osd crush chooseleaf type": 0,
                "mon allow pool size one": "true",
                "mon max pg per osd": 1000,
                # as made for clusters, these make each of a dozen new pools cost a second
                "paxos propose interval": 0.05,
                "paxos min wait": 0.01,
                # how soon a client asks anew where the disk is: 10 s otherwise, at the first start and after each kill
                "objecter tick interval": 0.2,
                "objecter timeout": 1,
                # a socket's path must be shorter than those of test folders are
                "admin socket": "",
                "pid file": "",
                "run dir": folder,
                "crash dir": folder,
            },
            "mon": {
                "mon data": folder / "mon",
                "mon cluster log file": folder / "cluster.log",
                # the defaults refuse to start on a disk that is 95% full
                "mon data avail warn": 2,
                "mon data avail crit": 1,
            },
            "osd": {
                "osd data": folder / "osd",
                "osd objectstore": self.store,
                "osd memory target": 2**30,
                "memstore device bytes": 2**33,
                "memstore page set": "false",
                "bluestore block size": 2**34,
                # each start opens and closes the file eight times, and waits this long for its thread
                "bdev aio poll ms": 10,
                "osd class default list": "*",
                "osd class load list": "*",
            },
            "client.rgw": {
                "rgw data": folder,
                # without tcp_nodelay a PUT takes ten times as long
                "rgw frontends": f"beast endpoint=127.0.0.1:{self.port} tcp_nodelay=1",
                "rgw thread pool size": 64,
                "rgw get obj window size": 2**24,
                "rgw dynamic resharding": "false",
                "rgw relaxed region enforcement": "true",
            },
        }
        lines = [
            line
            for section, options in sections.items()
            for line in (f"[{section}]", *(f"{name} = {value}" for name, value in options.items()))
        ]
        (folder / "ceph.conf").write_text("\n".join(lines) + "\n")

    def _arguments(self, program: str, *arguments: object) -> list[str]:
        # whatever ends this process, the children end with it
        return ["setpriv", "--pdeathsig", "KILL", program, *map(str, arguments)]

    def _command(self, program: str, *arguments: object, config: bool = True) -> None:
        if config:
            arguments = ("-c", self.folder / "ceph.conf", *arguments)
        log = self.folder / f"{program}-command.log"
        with log.open("ab") as out:
            done = subprocess.run(
                self._arguments(program, *arguments),
                env=ENVIRONMENT,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=START_SECONDS,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"{program} ended with {done.returncode}: {tail(log)}")

    def _daemon(self, program: str, *arguments: object) -> None:
        with (self.folder / f"{program}.log").open("ab") as out:
            self._running[program] = subprocess.Popen(
                # -d: in the foreground, with the log on stderr
                self._arguments(program, "-d", "-c", self.folder / "ceph.conf", *arguments),
                env=ENVIRONMENT,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # Ctrl-C is for the tests; the store stops after them
            )

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            for name, process in self._running.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended with {process.returncode}: {tail(self.folder / f'{name}.log')}")
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                connection.request("GET", "/")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            finally:
                connection.close()
            time.sleep(0.02)
        raise RuntimeError(f"the gateway did not answer in {START_SECONDS:.0f} s: {tail(self.folder / 'radosgw.log')}")


def tail(file: Path) -> str:
    return file.read_text(errors="replace")[-2000:].strip()
