"""The search over guidance: points, rounds of halving, what is used again, where it is flat; on a tiny trained run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ig_dist.config import Config
from ig_dist.config.catalogue import order
from ig_dist.config.file import config_from_tree, load_run
from ig_dist.errors import ConfigError
from ig_dist.evaluation import sweep as sweeps
from ig_dist.evaluation.sweep import Point, _real_by_class, _rounds, flat_rows, grid_points, sweep_run
from ig_dist.evaluation.tables import print_plans, print_result, print_sweep
from ig_dist.plans.samples import Listed
from ig_dist.report.sweeps import save_sweep
from ig_dist.sampling import generate
from ig_dist.terminal import console
from ig_dist.training.trainer import train
from tests.conftest import TINY
from tests.scoring import in_memory, make_plan, noise

SCALES = (1.0, 1.5, 3.0, 6.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits_index: Path) -> Path:
    """A run of 20 steps with two checkpoints and two averages, held against 300 pictures.

    Their classes are which quarters are bright: so few steps draw no digits, but that of every class.
    """
    folder, random = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    quarters = random.integers(0, 2, (300, 2, 2))
    pictures = 60 + 60 * quarters.repeat(4, axis=1).repeat(4, axis=2) + random.integers(0, 60, (300, 8, 8))
    classes = quarters.reshape(300, 4) @ [1, 2, 4, 8] % 10
    np.savez(folder / "real.npz", pictures[..., None].astype(np.uint8), classes)
    tree = {**TINY, "data": {**TINY["data"], "index": str(digits_index)}, "run": {"dir": str(folder / "run")}}
    tree |= {"train": {**TINY["train"], "steps": 20}, "checkpoint": {"every_steps": 10, "keep_last": 3}}
    tree |= {"optimizer": {"lr": 0.02, "warmup_steps": 2}, "ema": {"decays": [0.5, 0.9]}}
    tree["sample"] = {"num": 64, "steps": 2, "batch_size": 16, "unit_size": 16}
    tree["evaluate"] = {"metrics": ["fd_pixel", "label_agreement"], "reference": str(folder / "real.npz")}
    train(config_from_tree(tree, "test"))
    return folder / "run"


@pytest.fixture
def config(run: Path, tmp_path: Path) -> Config:
    """The run's, with samples in a folder of this test."""
    return load_run(run, [f"sample.url={tmp_path}/samples"])


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than all the rest: one test draws them."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(sweeps, "_save_scale_grid", lambda *arguments: None)


@pytest.fixture
def drawn() -> None:
    """This test looks at the pictures."""


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """Which units were made: plan and number."""
    made: list[tuple[str, int]] = []
    solve = generate.solve_unit

    def recorded(sampler: Any, number: int, *rest: Any) -> Any:
        if sampler.plan.unit_size == 16:  # others are of the picture grid
            made.append((sampler.plan.digest, number))
        return solve(sampler, number, *rest)

    monkeypatch.setattr(generate, "solve_unit", recorded)
    yield made


def scores_of(run: Path, digest: str, num: int, whole: int = 64) -> dict[str, float]:
    file = run / "evaluations" / f"{digest}{'' if num == whole else f'_{num}'}.json"
    told = json.loads(file.read_text())
    assert told["protocol"]["num"] == num and told["protocol"]["plan"] == digest
    return dict(told["scores"])


# --- points and rounds


def test_points_are_all_combinations_the_ig_scale_fastest() -> None:
    points = grid_points(
        ig_scale=(1.0, 2.0),
        cfg_scale=(1.0, 1.5),
        cfg_interval=(None, (0.0, 0.5)),
        ema=(0.9, 0.99),
        step=(10, 20),
    )
    assert len(points) == len(set(points)) == 32
    assert points[:3] == [
        Point(1.0, 1.0, ema=0.9, step=10),
        Point(2.0, 1.0, ema=0.9, step=10),
        Point(1.0, 1.5, ema=0.9, step=10),
    ]
    assert points[-1] == Point(2.0, 1.5, cfg_interval=(0.0, 0.5), ema=0.99, step=20)


@pytest.mark.parametrize(
    ("points", "num", "unit", "rounds"),
    [
        (8, 50_000, 512, [6656, 12_800, 25_088, 50_000]),
        (2, 50_000, 512, [25_088, 50_000]),
        (1, 50_000, 512, [50_000]),
        (6, 40, 16, [16, 32, 40]),
        (100, 40, 16, [16, 32, 40]),  # no round has less than a unit
        (5, 16, 16, [16]),
        (5, 10, 16, [10]),
    ],
)
def test_rounds_are_whole_units_about_twice_as_many_each(points: int, num: int, unit: int, rounds: list[int]) -> None:
    assert _rounds(points, num, unit) == rounds


# --- halving


@pytest.mark.parametrize("target", ["fd_pixel", "label_agreement"])
def test_halving_keeps_the_better_half_and_makes_no_unit_twice(
    target: str, config: Config, run: Path, solved: list[tuple[str, int]]
) -> None:
    sweep = sweep_run(config, grid_points(ig_scale=SCALES), target=target, halving=True)
    rows = {row["ig_scale"]: row for row in sweep["rows"]}
    assert list(rows) == list(SCALES) and sweep["target"] == target
    assert sorted(row["num"] for row in rows.values()) == [16, 16, 32, 64]
    left = list(SCALES)
    for num, keep in ((16, 2), (32, 1)):
        found = {scale: {"scores": scores_of(run, rows[scale]["plans"][0], num)} for scale in left}
        assert num > 16 or len({row["scores"][target] for row in found.values()}) > 1
        left = sorted(left, key=lambda scale: order(found[scale], target))[:keep]
        assert all(rows[scale]["num"] > num for scale in left)
        assert all(rows[scale]["num"] == num for scale in found if scale not in left)
    assert rows[left[0]]["scores"] == scores_of(run, rows[left[0]]["plans"][0], 64)
    # 16 images of each, 32 of two, 64 of one: in units of 16
    assert len(solved) == len(set(solved)) == 4 + 2 + 2
    file = run / "sweeps" / sweep["name"] / "sweep.json"
    assert sweep["name"].startswith("ig_scale-") and json.loads(file.read_text()) == sweep

    again = sweep_run(config, grid_points(ig_scale=SCALES), target=target, halving=True)
    assert again == sweep and len(solved) == 8  # it is all there
    whole = sweep_run(config, grid_points(ig_scale=SCALES), target=target)  # the grid takes what the rounds have made
    assert whole["name"] != sweep["name"] and json.loads(file.read_text()) == sweep  # both are kept
    assert {row["num"] for row in whole["rows"]} == {64} and len(solved) == len(set(solved)) == 16
    assert {row["ig_scale"]: row["plans"] for row in whole["rows"]} == {s: row["plans"] for s, row in rows.items()}
    assert next(row for row in whole["rows"] if row["ig_scale"] == left[0])["scores"] == rows[left[0]]["scores"]


def test_every_process_of_a_halving_comes_to_the_same_points(
    config: Config, run: Path, solved: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    shutil.rmtree(run / "sweeps", ignore_errors=True)
    assert sweep_run(config, grid_points(ig_scale=SCALES), halving=True) == {}
    assert len(solved) == len(set(solved)) == 8 and not (run / "sweeps").exists()
    monkeypatch.setenv("RANK", "0")
    sweep = sweep_run(config, grid_points(ig_scale=SCALES), halving=True)
    assert len(solved) == 8 and sorted(row["num"] for row in sweep["rows"]) == [16, 16, 32, 64]


# --- grids


def test_a_sweep_that_was_stopped_goes_on(
    config: Config, run: Path, solved: list[tuple[str, int]], tmp_path: Path
) -> None:
    axes = grid_points(ig_scale=(1.0, 2.0))
    sweep = sweep_run(config, axes)
    assert len(solved) == 8
    units = sorted((tmp_path / "samples").glob("*/unit_00002.*"))
    assert len(units) == 4  # images and features of both points
    whole = [file.read_bytes() for file in units]
    for file in units:
        file.unlink()
    solved.clear()
    assert sweep_run(config, axes) == sweep
    assert [number for _, number in solved] == [2, 2] and [file.read_bytes() for file in units] == whole


def test_features_alone_give_the_same_sweep(config: Config, solved: list[tuple[str, int]], tmp_path: Path) -> None:
    sweep = sweep_run(config, grid_points(ig_scale=(1.0, 2.0)), seeds=2)
    dropped = config.sample.model_copy(update={"keep_images": False, "url": f"{tmp_path}/dropped"})
    assert sweep_run(config.model_copy(update={"sample": dropped}), grid_points(ig_scale=(1.0, 2.0)), seeds=2) == sweep
    images = sorted(file.name for file in (tmp_path / "dropped").glob("*/unit_?????.safetensors"))
    assert images == ["unit_00000.safetensors"] * 4
    assert len(list((tmp_path / "dropped").glob("*/*.pixel.safetensors"))) == 16
    for row in sweep["rows"]:
        assert row["std"].keys() == row["scores"].keys() and len(set(row["plans"])) == 2
    assert sweep["protocol"]["seeds"] == 2 and "seed" not in sweep["protocol"] and sweep["flat"] is not None


def test_averages_checkpoints_and_intervals_are_axes(config: Config, run: Path, drawn: None) -> None:
    axes = grid_points(ig_scale=(1.0, 2.0), ig_interval=(None, (0.3, 1.0)), ema=(0.5, 0.9), step=(10, 20))
    sweep = sweep_run(config, axes)
    rows = sweep["rows"]
    assert len(rows) == 16
    by = {(row["ig_scale"], *row["ig_interval"], row["ema"], row["step"]): row for row in rows}
    assert len(by) == 16 and {key[3:] for key in by} == {(e, s) for e in (0.5, 0.9) for s in (10, 20)}
    assert {key[1:3] for key in by} == {(0.0, 1.0), (0.3, 1.0)}
    guided = [row["scores"]["fd_pixel"] for key, row in by.items() if key[0] == 2.0]
    assert len(set(guided)) == len(guided) == 8
    for (scale, low, *model), row in by.items():  # unguided: the interval says nothing
        if scale == 1.0:
            assert row["plans"] == by[1.0, 0.0, 1.0, model[-2], model[-1]]["plans"], low
    told = json.loads((run / "evaluations" / f"{by[2.0, 0.3, 1.0, 0.9, 10]['plans'][0]}.json").read_text())["protocol"]
    assert told["guidance"] == [{"kind": "ig", "scale": 2.0, "interval": [0.3, 1.0], "branches": "both"}]
    assert (told["ema"], told["step"]) == (0.9, 10)
    assert sweep["name"].startswith("ig_scale-ig_interval-ema-step-")
    save_sweep(sweep, folder := run / "sweeps" / sweep["name"])
    for name in ("sweep.png", "grid.png", "sweep_tradeoff.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="averages with decay"):
        sweep_run(config, grid_points(ig_scale=(1.0,), ema=(0.7,)))
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        sweep_run(config, grid_points(ig_scale=(1.0,), step=(15,)))


def test_what_cannot_be_searched_for(config: Config, solved: list[tuple[str, int]]) -> None:
    with pytest.raises(ConfigError, match=r"--target fid is not scored: use one of fd_pixel, label_agreement"):
        sweep_run(config, grid_points(ig_scale=SCALES), target="fid")
    larger = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"reference": "digits"})})
    Path(f"{config.run.dir}/other.npz").unlink(missing_ok=True)
    np.savez(f"{config.run.dir}/other.npz", noise(30, side=6))
    other = larger.evaluate.model_copy(update={"reference": f"{config.run.dir}/other.npz"})
    with pytest.raises(ConfigError, match="has pictures of 6 x 6, the samples are 8 x 8"):
        sweep_run(config.model_copy(update={"evaluate": other}), grid_points(ig_scale=SCALES))
    assert not solved  # said before anything is made


# --- what is said of it


def rows_of(scores: list[float], std: list[float] | None = None, nums: list[int] | None = None) -> list[dict[str, Any]]:
    rows = []
    for i, score in enumerate(scores):
        row = {"ig_scale": float(i), "cfg_scale": 1.0, "auto_scale": 1.0, "ig_interval": [0.0, 1.0], "ema": None}
        row |= {"cfg_interval": [0.0, 1.0], "step": None, "num": nums[i] if nums else 100, "plans": ["a", "b"]}
        for name in ("fid", "recall"):
            row.setdefault("scores", {})[name] = score  # type: ignore[attr-defined]
            if std:
                row.setdefault("std", {})[name] = std[i]  # type: ignore[attr-defined]
        rows.append(row)
    return rows


def test_where_the_score_is_flat_within_its_noise() -> None:
    """Two seeds of deviation 0.1 each: a difference of means has 0.1, and 0.2 is two deviations."""
    rows = rows_of([2.0, 1.1, 1.0, 1.19, 1.21], [0.1] * 5)
    assert flat_rows(rows, "fid") == [1, 2, 3]
    assert flat_rows(rows, "recall") == [0]
    assert flat_rows(rows_of([1.0, 1.0, 1.1], [0.0] * 3), "fid") == [0, 1]  # ties
    assert flat_rows(rows_of([1.0, 2.0]), "fid") is None
    # scores of fewer images are neither alike nor part of the noise
    assert flat_rows(rows_of([0.5, 1.0, 1.05], [9.0, 0.1, 0.1], [50, 100, 100]), "fid") == [1, 2]


@pytest.mark.parametrize("target", ["fid", "recall"])
def test_the_table(target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 200)
    for rows in (rows_of([0.0, 1.5, 1.0], [0.1] * 3), rows_of([2.0, 1.0, 4.0], nums=[100, 100, 50])):
        print_sweep({"rows": rows, "target": target, "flat": flat_rows(rows, target)})
    said = capsys.readouterr().out
    assert "1.5000 +- 0.1000" in said and f"{target} / first" in said and "--seeds 3 would tell" in said
    assert ("lower" if target == "fid" else "higher") + " is better" in said


def test_tables_lose_nothing_at_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(console, "_width", 80)
    names = ["fid", "sfid", "inception_score", "precision", "recall"]
    rows = rows_of([12.345, 11.5, 10.25], [0.0123] * 3)
    for row, interval in zip(rows, ([0.0, 1.0], [0.0, 0.7], [0.0, 0.7]), strict=True):
        row |= {"scores": dict.fromkeys(names, row["scores"]["fid"]), "std": dict.fromkeys(names, 0.0123)}
        row |= {"cfg_scale": 1.35 * interval[1], "cfg_interval": interval}
    print_sweep({"rows": rows, "target": "fid", "flat": [2]})
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80 and "\u2026" not in said and said.count("+-0.012 ") == 15
    assert all(word in said for word in ("12.345", "0-0.7", "CFG", "IS: inception_score; prec: precision"))
    assert "in every row: IG times 0-1, images 100" in said
    term = {"kind": "cfg", "scale": 1.35, "interval": [0, 0.7], "branches": "both"}
    print_result({"scores": {"fid": 1.5}, "protocol": {"guidance": [term], "reference": "r" * 100}})
    said = capsys.readouterr().out
    assert "CFG 1.35 for t in [0, 0.7]" in said and said.count("r") >= 100 and "\u2026" not in said
    plans = [Listed("a/1234", make_plan(), 40, {"fid": 2.5}, 1200), Listed("a/5678", None, 3, {})]
    print_plans(plans)
    said = capsys.readouterr().out
    assert all(
        word in said for word in ("1234", "1,200", "40", "IG 1.5, heun 3, seed 0", "fid 2.5", "5678", "not finished")
    )


def test_real_pictures_above_the_grid_are_of_the_columns_classes(tmp_path: Path) -> None:
    images, labels = noise(90), [i // 30 for i in range(90)]  # sorted, and far apart
    chosen = _real_by_class(in_memory(images, tmp_path, labels=labels), 3)
    known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert [known[image.tobytes()] for image in chosen] == [i % 3 for i in range(20)]
    assert len({image.tobytes() for image in chosen}) == 20
    few = _real_by_class(in_memory(images[:31], tmp_path, labels=labels[:31]), 3)  # one of class 1, none of class 2
    found = [known[image.tobytes()] for image in few]
    assert found[0::3] == [0] * 7 and found[1::3] == [1] * 7 and len(found) == 20
    assert len(_real_by_class(in_memory(images, tmp_path), 3)) == 20
