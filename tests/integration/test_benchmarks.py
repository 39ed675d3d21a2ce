"""The commands that measure run, at a size that measures nothing."""

from pathlib import Path

import pytest

from tests.conftest import run_command


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["benchmarks/checkpoint.py", "--megabytes", "2", "--rounds", "1", "--folder", "DISK"], "disk  stall"),
        pytest.param(
            ["benchmarks/loader.py", "--samples", "768", "--repeats", "1", "--steps", "40"],
            "training from S3, 40 steps",
            marks=pytest.mark.full,  # each way is a process of its own
        ),
        (
            [
                *("benchmarks/train_step.py", "--preset", "SiT-S/8", "--batch-size", "2", "--size", "16"),
                *("--rounds", "1", "--steps", "1", "--no-compile"),
            ],
            "1 rounds of 1 steps",
        ),
    ],
    ids=["checkpoint", "loader", "train_step"],
)
def test_it_runs(command: list[str], said: str, tmp_path: Path) -> None:
    done = run_command(["python", *(str(tmp_path / "disk") if word == "DISK" else word for word in command)])
    assert done.returncode == 0, done.stderr[-2000:]
    assert said in done.stdout
