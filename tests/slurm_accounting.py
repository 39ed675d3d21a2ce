"""A SLURM cluster with an accounting database (slurmdbd over MariaDB), in which nobody runs without an account."""

from __future__ import annotations

import shutil
import subprocess

from tests.object_store import free_port
from tests.slurm_cluster import SEARCH, USER, SlurmCluster

PACKAGES = "slurmdbd mariadb-server-core mariadb-client-core"
PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb", "sacctmgr")
ACCOUNT, QOS = "vision", "short"


def available() -> str | None:
    """Why there can be no such cluster on this machine, or None."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=SEARCH)]
    return f"no {', '.join(missing)} on this machine (Debian: apt install {PACKAGES})" if missing else None


class AccountedCluster(SlurmCluster):
    """As other clusters, and starts in about 10 s more. The ordinary user has an account, and one job at a time."""

    def start_controller(self) -> None:
        """Start the database and what stands before it, then slurmctld, and open the accounts."""
        data, port = self.folder / "mariadb", free_port()
        socket = self.folder / "mariadb.socket"
        make = ["mariadb-install-db", f"--datadir={data}", "--user=root", "--auth-root-authentication-method=normal"]
        subprocess.run([*make, "--skip-test-db"], env={"PATH": SEARCH}, check=True, capture_output=True)
        where = [f"--datadir={data}", f"--socket={socket}", f"--port={port}", "--bind-address=127.0.0.1"]
        self._daemon("mariadbd", "--no-defaults", "--user=root", f"--pid-file={data}/pid", *where)
        self._until(socket.exists, "mariadbd made no socket")
        words = "CREATE USER slurm@'127.0.0.1' IDENTIFIED BY 'slurm'; GRANT ALL ON *.* TO slurm@'127.0.0.1'"
        self._until(lambda: self._asked("mariadb", f"--socket={socket}", "--user=root", "-e", words), "no user")
        settings = {
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self.folder}/munge/socket",
            "DbdHost": "localhost",
            "DbdPort": (dbd_port := free_port()),
            "SlurmUser": "root",
            "PidFile": self.folder / "slurmdbd.pid",
            "LogFile": self.folder / "log/slurmdbd.log",
            "StorageType": "accounting_storage/mysql",
            "StorageHost": "127.0.0.1",
            "StoragePort": port,
            "StorageUser": "slurm",
            "StoragePass": "slurm",
            "StorageLoc": "accounts",
        }
        file = self.folder / "slurmdbd.conf"
        file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        file.chmod(0o600)
        inside = '. "$0/mounts"; exec slurmdbd -D'
        self._daemon("unshare", "--mount", "bash", "-c", inside, str(self.folder), name="slurmdbd")
        self.configure(
            AccountingStorageType="accounting_storage/slurmdbd",
            AccountingStorageHost="localhost",
            AccountingStoragePort=dbd_port,
            AccountingStoragePass=self.folder / "munge/socket",  # by which it is asked, not a password
            AccountingStorageEnforce="associations,limits,qos",
        )
        self._until(lambda: self._asked("sacctmgr", "-i", "add", "cluster", "test"), "slurmdbd does not answer")
        for what in (
            f"account {ACCOUNT}",
            f"qos {QOS} MaxWall=30",
            f"user {USER} account={ACCOUNT} qos=normal,{QOS} defaultqos=normal MaxJobs=1",
        ):
            self.run("sacctmgr", "-i", "add", *what.split())
        super().start_controller()

    def _asked(self, *command: str) -> bool:
        done = subprocess.run(command, env=self.environment(), capture_output=True, timeout=30, check=False)
        return done.returncode == 0
