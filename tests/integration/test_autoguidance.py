"""Autoguidance from a run's earlier checkpoint, and from a smaller model, as a user asks for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import yaml

from ig_dist.autoencoders.tokenizers import PIXEL
from ig_dist.config.file import load_run
from ig_dist.diffusion.samplers import heun, time_grid
from ig_dist.errors import ConfigError
from ig_dist.export import find_weights, load_export
from ig_dist.plans.plan import make_plan
from ig_dist.rng import Purpose, normal
from tests.conftest import TINY, run_command, succeed

OPTIONS = ["--num", "24", "sample.batch_size=24", "sample.unit_size=24", "--steps", "3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits_index: Path) -> Path:
    """A run with a checkpoint in its middle, and a smaller one without a head."""
    folder = tmp_path_factory.mktemp("runs")
    small = {**TINY["model"], "hidden_size": 16, "depth": 2, "aux_depth": None}
    for name, model in (("run", TINY["model"]), ("small", small)):
        tree = {**TINY, "model": model, "data": {**TINY["data"], "index": str(digits_index)}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**tree, "run": {"dir": str(folder / name)}}))
        succeed(["ig-dist", "train", folder / f"{name}.yaml"])
    return folder


def sample(runs: Path, *options: str) -> tuple[dict[str, Any], dict[str, np.ndarray], Path]:
    """The plan, the only unit, and the folder of it."""
    before = set((runs / "run/samples").glob("*/plan.json"))
    succeed(["ig-dist", "sample", runs / "run", *OPTIONS, *options])
    (plan,) = set((runs / "run/samples").glob("*/plan.json")) - before
    unit = safetensors.numpy.load_file(plan.parent / "unit_00000.safetensors")
    return json.loads(plan.read_text())["plan"], unit, plan.parent


def transcribed(runs: Path, weak: str, scale: float) -> np.ndarray:
    """Karras et al., arXiv 2406.02507, equation 3: v_weak + w (v - v_weak), in two lines."""
    model, _ = load_export(find_weights(runs / "run").export, torch.device("cpu"))
    second, _ = load_export(find_weights(weak).export, torch.device("cpu"))
    numbers = torch.arange(24)

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        times = torch.full((24,), t)
        strong, weaker = (m(x.float(), times, numbers % 10).velocity.double() for m in (model, second))
        return weaker + scale * (strong - weaker)

    x = normal(0, Purpose.SAMPLE_NOISE, numbers, (1, 8, 8)).double()
    with torch.no_grad():
        return PIXEL.decode(heun(velocity, x, time_grid(3)).float()).numpy()


@pytest.mark.parametrize("weak", ["run@20", "small"])
def test_the_second_model_guides_and_is_in_plan_and_protocol(runs: Path, weak: str) -> None:
    plan, unit, folder = sample(runs, "--weak", f"{runs}/{weak}", "--auto-scale", "2.5")
    info = load_export(find_weights(f"{runs}/{weak}").export, torch.device("cpu"))[1]
    assert plan["weak_sha256"] == info.weights_sha256 != plan["weights_sha256"]
    assert info.step == (20 if weak == "run@20" else 50)
    expected = transcribed(runs, f"{runs}/{weak}", 2.5)
    assert np.abs(unit["images"].astype(int) - expected).max() <= 1  # rounding of another order of sums
    unguided = transcribed(runs, f"{runs}/{weak}", 1.0)
    assert (unit["images"] != unguided).mean() > 0.3
    assert unit["work"].tolist() == [[6, 6, 6]] * 24

    done = run_command(["ig-dist", "evaluate", folder, "--json"])
    protocol = json.loads(done.stdout)["protocol"]
    assert protocol["weak_weights_sha256"] == info.weights_sha256 and protocol["weak_step"] == info.step
    assert (protocol["evaluations"], protocol["forwards"], protocol["weak_forwards"]) == (6, 6, 6)


def test_another_second_model_is_another_plan(runs: Path) -> None:
    plans = [sample(runs, "--weak", f"{runs}/{weak}", "--auto-scale", "1.5") for weak in ("run@20", "run@40", "small")]
    assert len({folder for *_, folder in plans}) == 3


def test_a_model_guides_itself_to_where_it_was(runs: Path) -> None:
    _, guided, _ = sample(runs, "--weak", str(runs / "run"), "--auto-scale", "3", "--seed", "1")
    _, plain, _ = sample(runs, "--seed", "1")
    assert np.array_equal(guided["images"], plain["images"])
    assert guided["work"].tolist() == [[6, 6, 6]] * 24 and plain["work"].tolist() == [[6, 6, 0]] * 24


def test_intervals_and_branches_say_what_is_run(runs: Path) -> None:
    """Heun's stages are at 1, 2/3, 2/3, 1/3, 1/3, 0: CFG on four of them, the second model on both branches of one."""
    terms = [
        {"kind": "cfg", "scale": 1.5, "interval": [0.3, 0.7]},
        {"kind": "auto", "scale": 1.5, "interval": [0.6, 1.0], "branches": "both"},
        {"kind": "ig", "scale": 1.4},
    ]
    options: Sequence[str] = ["--weak", str(runs / "small"), f"guidance={json.dumps(terms)}"]
    assert sample(runs, *options)[1]["work"][0].tolist() == [6, 6 + 4, 1 + 2 * 2]
    terms[1]["branches"] = "null"
    assert sample(runs, *options[:2], f"guidance={json.dumps(terms)}")[1]["work"][0].tolist() == [6, 6 + 4, 2]


def test_a_sweep_over_its_scale(runs: Path) -> None:
    command = ["ig-dist", "sweep", runs / "run", "sample.num=24", "sample.steps=2", "--json"]
    done = succeed([*command, "--weak", runs / "run@20", "--ig-scale", "1,1.5", "--auto-scale", "1,2"])
    rows = json.loads(done.stdout)["rows"]
    assert [(row["ig_scale"], row["auto_scale"]) for row in rows] == [(1, 1), (1.5, 1), (1, 2), (1.5, 2)]
    assert len({row["scores"]["fd_pixel"] for row in rows}) == 4
    assert next(runs.glob("run/sweeps/ig_scale-auto_scale-*/sweep.png")).stat().st_size > 5000
    refused = run_command(["ig-dist", "sweep", runs / "run", "--weak", runs / "run@20", "--ig-scale", "1,1.5"])
    assert refused.returncode == 2 and "guides nothing without a scale: give --auto-scale" in refused.stderr
    done = run_command(["ig-dist", "report", runs / "run"])
    assert done.returncode == 0 and "autoguidance scale" in (runs / "run/report.html").read_text()


@pytest.mark.parametrize("what", ["latents", "classes", "loss.path", "tokenizer"])
def test_a_second_model_of_other_data_is_refused(runs: Path, what: str) -> None:
    _, info = load_export(find_weights(runs / "run").export, torch.device("cpu"))
    other = {
        "latents": {"latent": info.latent.model_copy(update={"scale": [2.0]})},
        "classes": {"classes": [*info.classes[:-1], "ten"]},
        "loss.path": {"path": "cosine"},
        "tokenizer": {"tokenizer": info.tokenizer.model_copy(update={"sha256": "1"})},
    }[what]
    config = load_run(runs / "run", ["sample.weak_model=small", "guidance=[{kind: auto, scale: 2}]"])
    assert make_plan(config, info, "0", info).weak_sha256 == info.weights_sha256
    with pytest.raises(ConfigError, match=rf"sample\.weak_model small was trained with other {what} than"):
        make_plan(config, info, "0", info.model_copy(update=other))


def test_the_grids_of_training_leave_it_out(runs: Path, tmp_path: Path) -> None:
    guidance = "guidance=[{kind: auto, scale: 2}, {kind: ig, scale: 1.5}]"
    options = [guidance, f"sample.weak_model={runs}/small", f"run.dir={tmp_path}/run", "log.sample_every_steps=2"]
    succeed(["ig-dist", "train", runs / "run.yaml", "train.steps=2", *options])
