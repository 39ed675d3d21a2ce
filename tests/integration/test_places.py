"""Weights by any name, from any folder; a run that was copied, a run of others that cannot be written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.conftest import TINY, run_command, succeed

NUM = ["--num", "20", "--steps", "2", "sample.unit_size=20", "sample.batch_size=20"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, digits_index: Path) -> Path:
    """A folder with data and a run, started there with relative paths."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(digits_index, folder / "data")
    tree = {**TINY, "data": {**TINY["data"], "index": "data"}, "run": {"dir": "runs/a"}}
    tree |= {"train": {**TINY["train"], "steps": 4}, "checkpoint": {"every_steps": 2}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    succeed(["ig-dist", "train", "tiny.yaml"], cwd=folder)
    return folder


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Root may write anywhere but there."""
    for options in (["--bind", folder, folder], ["-o", "remount,bind,ro", folder]):
        done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
        if done.returncode:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no read-only mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def refused(command: list[object], *words: str, cwd: Path) -> None:
    done = run_command(["ig-dist", *command], cwd=cwd)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert "images" not in done.stdout  # before any work


def test_weights_have_one_way_to_be_named(home: Path, tmp_path: Path) -> None:
    run = home / "runs/a"
    for source in (f"{run}@2", run / "checkpoints/step_0000000002"):
        done = run_command(["ig-dist", "export", source], cwd=tmp_path)
        assert done.stdout.strip() == f"{run}/export/step_0000000002_ema_0.99", done.stderr
    export = Path(done.stdout.strip())
    done = run_command(["ig-dist", "export", f"{run}@2", "--ema", "0.9", "--json"], cwd=tmp_path)
    told = {"export": f"{run}/export/step_0000000002_ema_0.9", "ema": 0.9, "step": 2}
    assert json.loads(done.stdout) == told, done.stderr
    alone, checkpoints = tmp_path / "alone", tmp_path / "checkpoints"
    shutil.copytree(export, alone)
    shutil.copytree(run / "checkpoints", checkpoints)
    made = set()
    for number, source in enumerate((f"{run}@2", export, alone, checkpoints / "step_0000000002")):
        out = tmp_path / f"out{number}"
        more = [] if source != checkpoints / "step_0000000002" else [f"data.index={home}/data"]
        succeed(["ig-dist", "sample", source, *NUM, "--out", out, *more], cwd=tmp_path)
        made.add((out / "unit_00000.safetensors").read_bytes())
    assert len(made) == 1
    refused(["sample", alone, "--evaluate"], "does not say what to hold its samples against", cwd=tmp_path)
    refused(["sample", tmp_path], "no run and no weights there", "RUN@STEP", cwd=tmp_path)
    refused(["sample", f"{run}@two"], "'two' is no step; write RUN or RUN@1000", cwd=tmp_path)
    refused(["sample", f"{run}@3"], "no whole checkpoint of step 3", "there are: 2, 4", cwd=tmp_path)
    refused(["sample", export, "--raw"], "holds exported weights, and only these", cwd=tmp_path)
    refused(["sample", run, "--weak", f"{run}@2"], "guides nothing without a scale", "--auto-scale", cwd=tmp_path)


def test_chosen_classes_and_a_picture_that_keeps_its_pixels(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["ig-dist", "sample", home / "runs/a", *NUM, "--out", out]
    done = run_command([*command, "--class", "7,2"], cwd=tmp_path)
    assert done.returncode == 0 and "classes 7, 2" in done.stdout and f"{out}/samples.png" in done.stdout, done.stderr
    with np.load(out / "samples.npz") as arrays:
        assert arrays["arr_1"].tolist() == [7, 2] * 10
        first = arrays["arr_0"][0, ..., 0]
    picture = np.asarray(Image.open(out / "samples.png").convert("L"))
    large = first.repeat(8, axis=0).repeat(8, axis=1)
    assert (np.lib.stride_tricks.sliding_window_view(picture, (64, 64))[:, 4] == large).all(axis=(1, 2)).any()
    refused([*command[1:], "--class", "seven"], "sample.classes: there is no class 'seven'", cwd=tmp_path)
    refused(command[1:], f"--out {out} holds samples of another plan", cwd=tmp_path)


def test_a_copy_of_a_run_is_scored_and_swept_from_another_folder(home: Path, tmp_path: Path) -> None:
    run, copy = home / "runs/a", tmp_path / "copy"
    succeed(["ig-dist", "sample", run, *NUM], cwd=tmp_path)
    shutil.copytree(run, copy)
    before = sorted(run.rglob("*"))
    for source in ("copy", "copy/samples", next(copy.glob("samples/*/samples.npz"))):  # there is one plan
        shutil.rmtree(copy / "evaluations", ignore_errors=True)
        done = succeed(["ig-dist", "evaluate", source, "--json"], cwd=tmp_path)
        (scores,) = (copy / "evaluations").glob("*.json")
        assert json.loads(scores.read_text()) == json.loads(done.stdout)
    sweep = ["ig-dist", "sweep", "copy", "--ig-scale", "1,2", "sample.num=20", "sample.steps=1"]
    for scales in ("1,2", "1,3"):
        succeed([*sweep, "--ig-scale", scales], cwd=tmp_path)
    assert len(list(copy.glob("sweeps/ig_scale-*/sweep.json"))) == 2  # both are kept
    assert sorted(run.rglob("*")) == before
    done = run_command(["ig-dist", "evaluate", "copy"], cwd=tmp_path)
    assert done.returncode == 2 and "holds the samples of 4 plans: name the folder of one" in done.stderr
    assert done.stdout.count("20 images, ") == 4 and "IG 3, heun 1" in done.stdout

    done = run_command(["ig-dist", "train", "copy/config.yaml", "train.steps=4"], cwd=tmp_path)
    assert done.returncode == 0 and f"{copy}: finished at step 4 of 4" in done.stdout, done


def test_a_run_that_cannot_be_written(home: Path, tmp_path: Path) -> None:
    run, out = home / "runs/read_only", tmp_path / "out"
    shutil.copytree(home / "runs/a", run, ignore=shutil.ignore_patterns("samples", "export", "evaluations"))
    with read_only(run):
        mend = ["Read-only file system", "--out FOLDER"]
        refused(["sample", run, *NUM], f"{run}/samples cannot be written", *mend, "sample.url", cwd=tmp_path)
        refused(["sweep", run], f"{run} cannot be written", *mend, cwd=tmp_path)
        refused(["sample", run, *NUM, "sample.url=/proc/x"], "sample.url /proc/x cannot be written", cwd=tmp_path)
        succeed(["ig-dist", "sample", run, *NUM, "--out", out, "--evaluate"], cwd=tmp_path)
        assert {"samples.npz", "samples.png", "plan.json"} <= {file.name for file in out.iterdir()}
        done = run_command(["ig-dist", "evaluate", out, "--json"], cwd=tmp_path)
        (scores,) = out.glob("????????????????.json")
        assert json.loads(scores.read_text()) == json.loads(done.stdout), done.stderr
        done = run_command(["ig-dist", "sample", run, *NUM, f"sample.url={tmp_path}/mine"], cwd=tmp_path)
        assert done.returncode == 0 and len(list((tmp_path / "mine").glob("*.png"))) == 1, done.stderr
        sweep = ["--ig-scale", "1,2", "sample.num=20", "sample.steps=1", "--out", tmp_path / "swept"]
        done = run_command(["ig-dist", "sweep", run, *sweep], cwd=tmp_path)
        assert done.returncode == 0 and list((tmp_path / "swept").glob("sweeps/*/grid.png")), done.stderr


def test_what_no_score_fits_is_refused_before_it_is_made(home: Path, tmp_path: Path) -> None:
    run, out, other = home / "runs/a", tmp_path / "out", tmp_path / "other.npz"
    large = tmp_path / "large"  # an export of large pictures
    done = run_command(["ig-dist", "export", run], cwd=tmp_path)
    shutil.copytree(done.stdout.strip(), large)
    info = json.loads((large / "export.json").read_text())
    info["tokenizer"]["image_size"] = 65
    (large / "export.json").write_text(json.dumps(info))
    np.savez(other, np.zeros((10, 9, 9, 1), np.uint8))
    options: list[object] = [*NUM, "--out", out, f"evaluate.reference={other}"]
    said = "fd_pixel is for images of at most 4096 values, these have 4225"
    refused(["sample", large, *options, "--evaluate"], said, cwd=tmp_path)
    said = "other.npz has pictures of 9 x 9, the samples are 8 x 8"
    refused(["sample", run, *options, "--evaluate"], said, cwd=tmp_path)
    assert not out.exists()
    done = run_command(["ig-dist", "sample", run, *options, "--evaluate-if-fit"], cwd=tmp_path)  # as an array ends
    assert done.returncode == 0 and f"no scores: {other} has pictures" in done.stdout, done.stderr
    assert (out / "samples.npz").exists()
