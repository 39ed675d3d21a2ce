"""The whole way as a user types it, small: encode, train, resume, export, sample, evaluate, sweep."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import run_command, succeed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits_index: Path) -> Path:
    """A run that was resumed once, with its samples at one scale."""
    import yaml

    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("first")
    tree = {**TINY, "data": {**TINY["data"], "index": str(digits_index)}, "run": {"dir": str(folder / "run")}}
    tree["train"] = {**TINY["train"], "precision": "bf16", "accumulation": 2}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    for overrides in (["train.steps=30"], []):
        done = succeed(["ig-dist", "train", folder / "tiny.yaml", *overrides])
    assert "resume at step 30 of 50" in done.stdout
    return folder / "run"


def test_a_finished_run_does_nothing_when_started_again(run: Path) -> None:
    done = run_command(["ig-dist", "train", run / "config.yaml"])
    assert done.returncode == 0 and "step 50 of 50" in done.stdout
    starts = [json.loads(line) for line in (run / "provenance.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 30] and starts[1]["command"].startswith("ig-dist train /")


def test_metrics_and_curves(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 51))
    keys = {"step", "images_seen", "loss", "loss_final", "loss_aux", "grad_norm", "lr"}
    assert keys | {"images_per_s", "mfu", "data_wait_s"} <= lines[0].keys()
    assert lines[9]["images_seen"] == 320 and lines[0]["lr"] == pytest.approx(2e-3 / 5) and lines[9]["lr"] == 2e-3
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss_final"] + 0.5 * line["loss_aux"], rel=1e-3)
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    points = board.Scalars("train/loss")
    assert [point.step for point in points] == list(range(1, 51))
    assert points[-1].value == pytest.approx(lines[-1]["loss"])


def test_export_sample_evaluate(run: Path) -> None:
    done = succeed(["ig-dist", "export", run])
    folder = Path(done.stdout.strip())
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    info = json.loads((folder / "export.json").read_text())
    assert info["ema"] == 0.99 and info["step"] == 50 and info["images_seen"] == 1600
    assert "aux_layer.linear.weight" in weights and "pos_embed" in weights

    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = run_command(["ig-dist", "sample", run, "--ig-scale", "1.5", "--num", "20", "sample.steps=3"])
    assert done.returncode == 4 and f"{file} is damaged" in done.stderr and "export again" in done.stderr
    file.write_bytes(whole)

    succeed(["ig-dist", "sample", run, "--ig-scale", "1.5", "--num", "20", "sample.steps=3"])
    (plan,) = [path.parent for path in (run / "samples").glob("*/plan.json")]
    images = np.load(plan / "samples.npz")
    assert images["arr_0"].shape == (20, 8, 8, 1) and images["arr_0"].dtype == np.uint8
    assert images["arr_1"].tolist() == [i % 10 for i in range(20)]
    assert plan.with_suffix(".png").exists()
    units = {file.name: file.read_bytes() for file in plan.glob("unit_*")}
    for file in plan.glob("unit_*0.safetensors"):
        file.unlink()  # made again, byte for byte
    again = run_command(["ig-dist", "sample", run, "--ig-scale", "1.5", "--num", "20", "sample.steps=3"])
    assert again.returncode == 0 and {file.name: file.read_bytes() for file in plan.glob("unit_*")} == units

    done = succeed(["ig-dist", "evaluate", plan, "--json"])
    result = json.loads(done.stdout)
    assert result["scores"]["fd_pixel"] > 0
    protocol = result["protocol"]
    expected = {
        "num": 20, "labels": "balanced", "seed": 0, "solver": "heun", "evaluations": 6, "ema": 0.99,
        "precision": "fp32", "reference_images": 1797, "extractor": "pixel", "step": 50,
    }  # fmt: skip
    assert {key: protocol[key] for key in expected} == expected
    assert protocol["guidance"] == [{"kind": "ig", "scale": 1.5, "interval": [0.0, 1.0], "branches": "both"}]
    for key in ("uint8_rule", "extractor_sha256", "reference_sha256", "checkpoint_sha256", "weights_sha256"):
        assert protocol[key]
    assert json.loads((run / "evaluations" / f"{plan.name}.json").read_text()) == result


def test_sweep_over_two_axes(run: Path) -> None:
    scales = ["--ig-scale", "1,1.5", "--cfg-scale", "1,1.3"]
    done = succeed(["ig-dist", "sweep", run, "sample.steps=2", "sample.num=30", *scales, "--json"])
    (file,) = run.glob("sweeps/ig_scale-cfg_scale-*/sweep.json")
    sweep = json.loads(file.read_text())
    assert json.loads(done.stdout) == sweep
    assert [(row["ig_scale"], row["cfg_scale"]) for row in sweep["rows"]] == [(1, 1), (1.5, 1), (1, 1.3), (1.5, 1.3)]
    assert len({row["scores"]["fd_pixel"] for row in sweep["rows"]}) == 4
    assert sweep["protocol"]["num"] == 30 and "guidance" not in sweep["protocol"]
    for name in ("sweep.png", "grid.png"):
        assert file.with_name(name).read_bytes().startswith(b"\x89PNG")

    succeed(["ig-dist", "report", run])
    html = (run / "report.html").read_text()
    assert "data:image/png;base64," in html and re.search(
        r"<svg[^>]*>(?:(?!</svg>).)*Internal Guidance scale", html, re.DOTALL
    )
    assert sweep["protocol"]["weights_sha256"] in html and "<dt>Processes</dt><dd>1, ddp</dd>" in html


def test_damage_to_the_newest_checkpoint_costs_only_the_steps_since_the_one_before(
    tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = tiny_config("damaged")
    succeed(["ig-dist", "train", config])
    run = tmp_path / "runs" / "damaged"
    (file,) = (run / "checkpoints/step_0000000050").glob("rank_*.safetensors")
    before = file.read_bytes()
    file.write_bytes(before[:-1])
    done = succeed(["ig-dist", "train", config])
    assert "step_0000000050 is damaged" in done.stderr and "resume at step 40" in done.stdout
    assert file.read_bytes() == before
