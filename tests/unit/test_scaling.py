"""The simulation of failures agrees with the closed form, and the plan runs at small size."""

import itertools
import math

import numpy as np
import pytest

from benchmarks.scaling import COLUMNS, Costs, goodput, mean_time_to_failure, plan, stored_bytes
from ig_dist.config.file import load_config
from ig_dist.training.dry_run import GIB, IMAGENET_CLASSES, IMAGENET_IMAGES, SD_LATENT, dry_run
from tests.conftest import ROOT, succeed

WIDE = ["train.global_batch_size=1024", "data.streams=512"]


@pytest.mark.parametrize("every_s", [600.0, 3600.0, 20000.0])
def test_the_simulation_agrees_with_dalys_closed_form(every_s: float) -> None:
    """Expected time of a segment of length s under failures of mean M with restart R: (M + R) (exp(s / M) - 1)."""
    work, mttf, costs = 100 * every_s, 30000.0, Costs(stall_s=20.0, write_s=0.0, restart_s=500.0)
    expected = 100 * (mttf + costs.restart_s) * (math.exp((every_s + costs.stall_s) / mttf) - 1)
    random = np.random.default_rng(0)
    walls = [work / goodput(work, every_s, mttf, costs, random) for _ in range(400)]
    assert np.mean(walls) == pytest.approx(expected, rel=0.02)


def test_the_measured_failure_rates_are_kept() -> None:
    assert mean_time_to_failure(8) == pytest.approx(47.7 * 86400)
    assert mean_time_to_failure(1024) == pytest.approx(7.9 * 3600)


def test_the_plan_runs_at_small_size() -> None:
    done = succeed(["python", "benchmarks/scaling.py", "--runs", "3"])
    assert "4,003,647 steps of 256 images" in done.stdout and "512 GPUs: do not divide" in done.stdout


def tables() -> list[list[list[str]]]:
    """Cells of each table of docs/scaling.md, its head first."""
    lines = (ROOT / "docs/scaling.md").read_text().splitlines()
    blocks = [list(block) for head, block in itertools.groupby(lines, lambda line: line.startswith("|")) if head]
    return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in (block[0], *block[2:])] for block in blocks]


@pytest.mark.parametrize(("batch", "overrides"), list(enumerate([[], WIDE])))
def test_the_tables_of_the_docs_are_what_is_computed_today(batch: int, overrides: list[str]) -> None:
    config = load_config("sit_xl2_ig", overrides).with_data(SD_LATENT, IMAGENET_CLASSES)
    head, *told = tables()[batch]
    rows, steps = plan(config, 0.4, 989.0), config.total_steps(IMAGENET_IMAGES)
    assert tuple(head) == COLUMNS
    assert told == [row.cells(stored_bytes(), config.train.global_batch_size, steps) for row in rows]
    days = [(row.cells(stored_bytes(), 1, steps)[0], f"{steps * row.seconds / 86400:.2f}") for row in rows]
    ddp = [pair for pair, row in zip(days, rows, strict=True) if row.engine == "ddp"]
    assert [tuple(cells[:2]) for cells in tables()[3 + batch][1:]] == ddp


def test_the_engines_of_the_docs_are_what_the_dry_run_prints_today() -> None:
    found = []
    for gpus in (64, 512):
        told = dry_run(load_config("sit_xl2_ig", WIDE), gpus=gpus, mfu=0.4, peak_tflops=989.0)
        for engine, sizes in told["engines"].items():
            found.append([str(gpus), engine, *(f"{size / GIB:.2f}" for size in sizes.values())])
    assert tables()[2][1:] == found
