"""The commands that measure run, at a size that measures nothing."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from tests import golden
from tests.conftest import run_command


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["benchmarks/checkpoint.py", "--megabytes", "2", "--rounds", "1", "--folder", "DISK"], "torch.load"),
        (
            ["benchmarks/startup.py", "digits", "--ranks", "2", "--rounds", "1", "--on", "disk", "--folder", "DISK"],
            "disk",
        ),
        pytest.param(
            ["benchmarks/loader.py", "--samples", "768", "--rounds", "1", "--steps", "40"],
            "data wait of a training from S3",
            marks=pytest.mark.full,  # each way is a process of its own
        ),
        (
            [
                *("benchmarks/train_step.py", "--preset", "SiT-S/8", "--batch-size", "2", "--size", "16"),
                *("--rounds", "1", "--no-compile"),
            ],
            "head in training",
        ),
        (
            ["benchmarks/optimizer.py", "--preset", "SiT-S/8", "--batch-size", "2", "--rounds", "1"],
            "passes over the weights",
        ),
        (["benchmarks/vote.py", "--processes", "2", "--step-ms", "5"], "2 processes: a vote"),
        pytest.param(
            [
                *("benchmarks/index_scale.py", "--shards", "300", "--few", "10", "--ranks", "2"),
                *("--records", "5", "--rounds", "1"),
            ],
            "300 shards",
            marks=pytest.mark.full,  # three processes
        ),
    ],
    ids=["checkpoint", "startup", "loader", "train_step", "optimizer", "vote", "index_scale"],
)
def test_it_runs(command: list[str], said: str, tmp_path: Path) -> None:
    done = run_command(["python", *(str(tmp_path / "disk") if word == "DISK" else word for word in command)])
    assert done.returncode == 0, done.stderr[-2000:]
    assert said in done.stdout


def test_the_gpu_report_fails_with_a_check(tmp_path: Path) -> None:
    """A number that was not recorded so, and a check that takes too long."""
    numbers = tmp_path / "numbers"
    shutil.copytree(golden.FOLDER, numbers)
    file = numbers / "sit_ig_tiny.safetensors"
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        meta = opened.metadata()
    tensors["forward.velocity"][0, 0, 0, 0] += 1e-3
    save_file(tensors, file, meta)
    only = ("--only", "fp32", "--only", "recompiles")
    done = run_command(
        ["python", "benchmarks/gpu.py", "--out", tmp_path, "--numbers", numbers, *only, "--limit-s", "1.5"]
    )
    assert done.returncode == 1, done.stdout
    machine, wrong, slow = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert machine["result"] == "passed" and wrong["result"] == slow["result"] == "failed"
    assert wrong["said"].startswith("AssertionError: SiT, velocity: off by ")
    assert slow["said"].startswith("not done in ")
