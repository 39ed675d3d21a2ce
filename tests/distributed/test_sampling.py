"""One plan by any number of workers: joining, dying and coming back changes no byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, TINY, run_command

OPTIONS = ["--num", "150", "--ig-scale", "1.5", "--steps", "12", "sample.unit_size=10", "sample.batch_size=5"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits_index: Path) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    tree = {**TINY, "data": {**TINY["data"], "index": str(digits_index)}, "run": {"dir": str(folder / "run")}}
    tree["evaluate"] = {"metrics": ["fd_pixel", "label_agreement"]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    done = run_command(["ig-dist", "train", folder / "tiny.yaml"])
    assert done.returncode == 0, done.stderr
    return folder / "run"


def worker(run: Path, url: Path, rank: int, workers: int) -> subprocess.Popen[bytes]:
    """A worker as an array task would be: on its own, told only its number."""
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(workers)}
    command = [sys.executable, "-m", "ig_dist.cli", "sample", str(run), *OPTIONS, f"sample.url={url}"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def units(url: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(url.glob("*/unit_*.safetensors"))}


def scores(url: Path) -> dict[str, float]:
    (plan,) = url.glob("*/plan.json")
    done = run_command(["ig-dist", "evaluate", plan.parent, "--json"])
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)["scores"])


def test_one_worker_three_workers_and_workers_that_die_make_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    done = run_command(["ig-dist", "sample", trained, *OPTIONS, f"sample.url={alone}"])
    assert done.returncode == 0, done.stderr
    assert len(units(alone)) == 15

    three = tmp_path / "three"
    command = ["python", "launchers/local.py", "--processes", "3", "--job", "sample", trained, *OPTIONS]
    done = run_command([*command, f"sample.url={three}"])
    assert done.returncode == 0, done.stderr
    assert units(three) == units(alone)

    dying = tmp_path / "dying"
    workers = [worker(trained, dying, rank, 3) for rank in range(3)]
    deadline = time.monotonic() + 60
    while len(units(dying)) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    for victim in workers[:2]:  # the first one too, which would have collected
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    assert len(units(dying)) < 15, "all was done before the kill"
    joined = worker(trained, dying, 0, 5)  # another number of workers, too
    assert joined.wait(timeout=120) == 0 and workers[2].wait(timeout=120) == 0
    assert units(dying) == units(alone)

    expected = scores(alone)
    assert scores(three) == expected and scores(dying) == expected
    assert 0 <= expected["label_agreement"] <= 1
    npz = [next(url.glob("*/samples.npz")).read_bytes() for url in (alone, three, dying)]
    assert npz[0] == npz[1] == npz[2]


def test_a_sweep_by_two_processes_with_seeds_and_intervals(trained: Path) -> None:
    command = ["python", "launchers/local.py", "--processes", "2", "--job", "sweep", trained, "sample.steps=2"]
    axes = ["--ig-scale", "1,1.5", "--ig-interval", "0,1", "--ig-interval", "0.3,1", "--seeds", "2"]
    done = run_command([*command, "sample.num=40", *axes])
    assert done.returncode == 0, done.stderr
    rows = json.loads((trained / "sweep.json").read_text())["rows"]
    assert [(row["ig_scale"], row["ig_interval"]) for row in rows] == [
        (1, [0, 1]), (1.5, [0, 1]), (1, [0.3, 1]), (1.5, [0.3, 1])
    ]  # fmt: skip
    assert rows[0]["scores"] == rows[2]["scores"]  # unguided: the interval says nothing, and it is not made again
    assert rows[1]["scores"] != rows[3]["scores"]
    for row in rows:
        each = [json.loads((trained / "evaluations" / f"{plan}.json").read_text()) for plan in row["plans"]]
        assert [e["protocol"]["seed"] for e in each] == [0, 1]
        values = [e["scores"]["fd_pixel"] for e in each]
        assert row["scores"]["fd_pixel"] == pytest.approx(sum(values) / 2)
        assert row["std"]["fd_pixel"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
