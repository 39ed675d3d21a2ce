"""Which process this is, where the others are met, and which GPU is its own, in the words of every launcher."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from ig_dist.errors import ConfigError
from ig_dist.parallel.blame import VARIABLE, blamed
from ig_dist.this_process import (
    Process,
    choose_gpu,
    explained,
    meeting_place,
    missing_gpus,
    this_device,
    this_process,
    unusable,
)

TORCHRUN = {"RANK": 9, "WORLD_SIZE": 16, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 8}
MPIRUN = {f"OMPI_COMM_WORLD_{name}": number for name, number in zip(("RANK", "SIZE"), (5, 8), strict=True)}
MPIRUN |= {"OMPI_COMM_WORLD_LOCAL_RANK": 1, "OMPI_COMM_WORLD_LOCAL_SIZE": 4}
MPIEXEC = {"PMI_RANK": 5, "PMI_SIZE": 8, "MPI_LOCALRANKID": 1, "MPI_LOCALNRANKS": 4}
# as SLURM 22.05 sets them, seen on a cluster
BATCH = {"SLURM_JOB_ID": 12, "SLURM_NTASKS": 4, "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NODEID": 0}
SHELL = {"SLURM_JOB_ID": 12, "SLURM_NTASKS": 4}  # of salloc
STEP = {"SLURM_STEP_ID": 2, "SLURM_STEP_NUM_TASKS": 4, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
SRUN = BATCH | STEP | {"SLURM_PROCID": 3, "SLURM_LOCALID": 1, "SLURM_NODEID": 1}
INTERACTIVE = BATCH | STEP | {"SLURM_STEP_NUM_TASKS": 1, "SLURM_STEP_TASKS_PER_NODE": 1}
UNEVEN = SRUN | {"SLURM_STEP_NUM_TASKS": 5, "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_PROCID": 4}
UNEVEN |= {"SLURM_NODEID": 2, "SLURM_LOCALID": 0}
ORTED = BATCH | STEP | {"SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": 1, "SLURM_NODEID": 1}  # mpirun's own step
ALONE = (0, 1, 0, 1, 0)


def told(environment: dict[str, Any], worker: str | None = None, **options: bool) -> tuple[int, ...]:
    said = {name: str(value) for name, value in environment.items()}
    return this_process(worker, environment=said, **options)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ALONE),
        (TORCHRUN, (9, 16, 1, 8, 1)),
        ({"RANK": 3, "WORLD_SIZE": 4}, (3, 4, 0, 1, 3)),  # by hand, or PyTorchJob's pods
        ({"WORLD_SIZE": 1}, ALONE),
        ({"LOCAL_RANK": 2}, (0, 1, 2, 1, 2)),
        (MPIRUN, (5, 8, 1, 4, 1)),
        (MPIEXEC, (5, 8, 1, 4, 1)),
        (ORTED | MPIRUN, (5, 8, 1, 4, 1)),
        (SRUN, (3, 4, 1, 2, 1)),
        (SRUN | {"PMI_RANK": 3, "PMI_SIZE": 4}, (3, 4, 1, 2, 1)),  # srun --mpi=pmi2
        (UNEVEN, (4, 5, 0, 1, 0)),
        (BATCH, ALONE),
        (SHELL, ALONE),
        (INTERACTIVE, ALONE),
        (SRUN | TORCHRUN, (9, 16, 1, 8, 1)),  # torchrun in a step
        (SRUN | {"RANK": 3, "WORLD_SIZE": 4}, (3, 4, 1, 2, 1)),  # a script that exports the ranks, not the local ones
        (SRUN | {"WORLD_SIZE": 4}, (3, 4, 1, 2, 1)),
        (SRUN | {"RANK": 0, "WORLD_SIZE": 8}, (0, 8, 0, 1, 0)),
        ({"JOB_COMPLETION_INDEX": 3, "PET_NODE_RANK": 3, "PET_NNODES": 4}, ALONE),  # for torchrun
    ],
)
def test_a_process_knows_which_it_is(environment: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert told(environment) == expected


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "x", "WORLD_SIZE": 2}, "RANK is 'x', no number"),
        ({"RANK": -1, "WORLD_SIZE": 2}, "RANK is '-1', no number"),
        ({"RANK": 2, "WORLD_SIZE": 2}, "RANK does not fit WORLD_SIZE (2)"),
        ({"RANK": 1}, "RANK does not fit WORLD_SIZE (1)"),
        ({"WORLD_SIZE": 2}, "WORLD_SIZE is 2, and RANK is not set"),
        (TORCHRUN | {"LOCAL_RANK": 8}, "LOCAL_RANK does not fit LOCAL_WORLD_SIZE (8)"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": 17}, "LOCAL_WORLD_SIZE does not fit WORLD_SIZE (16)"),
        (SRUN | {"WORLD_SIZE": 8}, "WORLD_SIZE is 8, but srun says 4"),
        (SRUN | {"RANK": 0}, "RANK is 0, but srun says 3"),
    ],
)
def test_what_contradicts_itself_is_said(environment: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        told(environment)


def test_workers_are_told_by_hand_and_by_arrays() -> None:
    assert told({}, "3/5") == (3, 5, 0, 1, 3)  # GPU 3 of those of its machine
    assert told(TORCHRUN, "3/5") == (3, 5, 1, 8, 1)
    assert told(SRUN, "3/5") == (3, 5, 1, 2, 1)
    array = {"SLURM_ARRAY_TASK_MIN": 10, "SLURM_ARRAY_TASK_MAX": 16, "SLURM_ARRAY_TASK_COUNT": 4}
    tasks = [{"SLURM_ARRAY_TASK_ID": i, **array} for i in (10, 12, 14, 16)]
    assert [told(task, arrays=True)[:2] for task in tasks] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert told(SRUN | tasks[1], arrays=True) == (7, 16, 1, 2, 1)
    assert told(tasks[1]) == ALONE
    assert told(TORCHRUN | tasks[1], arrays=True) == told(TORCHRUN)  # ig-dist slurm has counted them
    with pytest.raises(ConfigError, match="--worker 5/5 is not i/W"):
        told({}, "5/5")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (TORCHRUN | {"MASTER_ADDR": "a", "MASTER_PORT": 1}, ("a", "1")),
        (SRUN | {"MASTER_ADDR": "a"}, ("a", "22030")),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": 0}, ("127.0.0.1", "22030")),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": 8}, ("127.0.0.1", "29500")),
        (MPIRUN | {"MASTER_ADDR": "a"}, ("a", "29500")),
        (TORCHRUN, None),
        (MPIRUN, None),
    ],
)
def test_where_the_others_are_met(environment: dict[str, Any], expected: tuple[str, str] | None) -> None:
    said = {name: str(value) for name, value in environment.items()}
    process = this_process(environment=said)
    if expected:
        assert meeting_place(process, said) == expected
    else:
        with pytest.raises(ConfigError, match="MASTER_ADDR or MASTER_PORT is not set, or no number: say"):
            meeting_place(process, said)


@pytest.mark.parametrize(
    ("process", "gpus", "bound", "alone", "shared"),
    [
        ((0, 1, 0, 1, 0), 8, "", 0, 0),
        ((9, 16, 1, 8, 1), 8, "", 1, 1),
        ((9, 16, 1, 8, 1), 1, "3", 0, 0),  # --gpus-per-task=1
        ((9, 16, 1, 8, 1), 1, "", None, 0),
        ((9, 16, 1, 8, 1), 2, "0,1", None, 1),
        ((9, 16, 7, 8, 7), 3, "", None, 1),
        ((3, 4, 0, 1, 3), 1, "", 0, 0),  # a pod with one GPU
        ((3, 4, 0, 1, 3), 8, "", 3, 3),  # --worker 3/4, or ranks by hand
        ((9, 16, 0, 1, 9), 8, "", None, 1),
    ],
)
def test_each_has_its_gpu(process: tuple[int, ...], gpus: int, bound: str, alone: int | None, shared: int) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": bound} if bound else {}
    assert choose_gpu(Process(*process), gpus, environment, shared=True) == shared
    if alone is None:
        with pytest.raises(ConfigError, match=f"this one sees {gpus} GPUs: start at most {gpus}"):
            choose_gpu(Process(*process), gpus, environment, shared=False)
    else:
        assert choose_gpu(Process(*process), gpus, environment, shared=False) == alone


def test_gpus_that_are_not_there_are_missed() -> None:
    seen = {"": 0, "0,1": 2, "NoDevFiles": 0, "-1": 0, "1,-1,2": 1, "GPU-5c,MIG-7a": 2}
    assert not any(missing_gpus(gpus, {"CUDA_VISIBLE_DEVICES": named}) for named, gpus in seen.items())
    assert not missing_gpus(0, {})
    said = missing_gpus(1, {"CUDA_VISIBLE_DEVICES": "0,9"})
    assert said == "CUDA_VISIBLE_DEVICES=0,9: 1 of these 2 GPUs are there (nvidia-smi -L)"


@pytest.mark.parametrize(
    ("cuda", "words", "alone", "launched"),
    [
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nFor", "another process holds it", 2, 6),
        ("CUDA error: out of memory\nFor", "another process holds it", 2, 6),
        ("CUDA error: no kernel image is available for execution on the device", "that is built for it", 2, 2),
        ("CUDA error: uncorrectable ECC error encountered", "mend that machine", 6, 6),
    ],
)
def test_a_gpu_that_cannot_be_used(
    cuda: str, words: str, alone: int, launched: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    why = explained(torch.device("cuda", 3), cuda)
    assert "cuda:3 cannot be used (CUDA error: " in why[0] and words in why[0] and "\n" not in why[0]
    monkeypatch.delenv(VARIABLE, raising=False)
    error = unusable(Process(5, 8, 1, 4, 1), *why)
    assert error.exit_code == alone and not error.everywhere
    monkeypatch.setenv(VARIABLE, str(tmp_path / "blame"))
    error = unusable(Process(5, 8, 1, 4, 1), *why)
    assert error.exit_code == launched
    assert blamed(tmp_path / "blame") == ({5} if launched == 6 else set())
    assert launched == 2 or str(error).startswith(f"{socket.gethostname()}: ")


def test_a_gpu_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a CUDA that says what it says on a machine whose first GPU is taken; the last step needs a real one."""
    tried = []

    def set_device(device: torch.device) -> None:
        tried.append(str(device))
        raise RuntimeError(
            "CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCompile with TORCH_USE_CUDA_DSA"
        )

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", set_device)
    for shared, process in ((True, Process(3, 4, 0, 1, 3)), (False, Process(3, 4, 1, 2, 1))):
        with pytest.raises(
            ConfigError, match=r"^cuda:1 cannot be used \(CUDA error: CUDA.*unavailable\): another process"
        ):
            this_device(process, shared=shared)
    assert tried == ["cuda:1"] * 2
    with pytest.raises(ConfigError, match="4 processes on this machine, and this one sees 2 GPUs"):
        this_device(Process(3, 4, 3, 4, 3), shared=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,9")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=0,1,9: 2 of these 3 GPUs are there"):
        this_device(Process(0, 1, 0, 1, 0))


def test_a_device_that_is_asked_for_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IG_DIST_DEVICE", "cpu")
    assert this_device() == torch.device("cpu")
    monkeypatch.setenv("IG_DIST_DEVICE", "CUDA")
    with pytest.raises(ConfigError, match="IG_DIST_DEVICE=CUDA: say cpu, or unset it"):
        this_device()
