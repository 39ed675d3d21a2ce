"""The simulation of failures agrees with the closed form, and the plan runs at small size."""

import math

import numpy as np
import pytest

from benchmarks.scaling import Costs, goodput, mean_time_to_failure
from tests.conftest import run_command


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
    done = run_command(["python", "benchmarks/scaling.py", "--runs", "3"])
    assert done.returncode == 0, done.stderr
    assert "4,003,647 steps of 256 images" in done.stdout and "512 GPUs: do not divide" in done.stdout
