"""srun alone tells each of its processes which it is; a batch script and what is typed in an allocation are alone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm_cluster import SlurmCluster

TELL = """
import os
from ig_dist.this_process import choose_gpu, meeting_place, this_process
me, gpus = this_process(), len(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(","))
place, port = meeting_place(me) if me.world_size > 1 else ("alone", os.environ["SLURM_JOB_ID"])
print("told", *me[:4], place, (int(port) - int(os.environ["SLURM_JOB_ID"])) % 10_000, end=" ")
print("GPU", choose_gpu(me, gpus, os.environ, shared=False), "of", gpus)
"""


def test_srun_tells_its_processes_which_they_are(slurm: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "tell.py").write_text(TELL)
    tell = f"{sys.executable} {tmp_path / 'tell.py'}"
    (tmp_path / "job.sh").write_text(
        "#!/bin/bash\n#SBATCH --nodes=2 --ntasks=4 --ntasks-per-node=2 --gpus-per-node=2\n"
        f"{tell}\nsrun {tell}\nsrun --ntasks=2 --nodes=1 --gpus-per-task=1 {tell}\nsrun --ntasks=1 --nodes=1 {tell}\n"
    )
    log = tmp_path / "log"
    slurm.run("sbatch", "--wait", f"--output={log}", f"--chdir={Path.cwd()}", tmp_path / "job.sh")
    deadline = time.monotonic() + 20
    while len(said := log.read_text().splitlines()) < 8 and time.monotonic() < deadline:
        time.sleep(0.1)
    first = slurm.nodes[0]
    assert said[0] == "told 0 1 0 1 alone 0 GPU 0 of 2"
    # each step has a port of its own
    assert sorted(said[1:5]) == [f"told {rank} 4 {rank % 2} 2 {first} 0 GPU {rank % 2} of 2" for rank in range(4)]
    assert sorted(said[5:7]) == [f"told {rank} 2 {rank} 2 127.0.0.1 1009 GPU 0 of 1" for rank in range(2)]
    assert said[7] == "told 0 1 0 1 alone 0 GPU 0 of 2"


def test_a_cluster_is_as_sites_are(slurm: SlurmCluster) -> None:
    """Each node has its own processes and network, its own name stands for 127.0.1.1, and users are not root."""
    told = "id -un; hostname; getent hosts node1 node2; head -1 /proc/1/cmdline | tr '\\0' ' '"
    job = ["sbatch", "--wait", "-N2", "--ntasks-per-node=1", "--output=log", "--wrap", f'srun --label bash -c "{told}"']
    done = slurm.as_user(*job)
    assert done.returncode == 0, done.stderr
    said = (slurm.home / "log").read_text().splitlines()
    first = [line.removeprefix("0: ").split() for line in said if line.startswith("0: ")]
    assert first[:3] == [["ada"], ["node1"], ["127.0.1.1", "node1"]] and first[3][1] == "node2", said
    assert first[3][0].startswith("198.18.") and first[4][0] == "bash"
    ping = ["nsenter", "-t", str(slurm.process("node1")), "-n", "bash", "-c", f"</dev/tcp/{first[3][0]}/1"]
    assert "refused" in subprocess.run(ping, capture_output=True, text=True, timeout=20, check=False).stderr
    slurm.network.cut("node2")
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(ping, capture_output=True, timeout=0.5, check=False)
    slurm.network.mend("node2")
