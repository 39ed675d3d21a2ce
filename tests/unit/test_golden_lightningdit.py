"""The published LightningDiT + IG implementation, reproduced from its recorded numbers (tests/data).

Its time runs from noise to data, t' = 1 - t; its velocity is -1 times ours.
"""

import pytest
import torch

from ig_dist.diffusion.guidance import GuidanceTerm, guided_velocity
from ig_dist.diffusion.samplers import euler, heun, time_grid
from tests.golden import lightningdit, lightningdit_answers

PUBLISHED = lightningdit()
GOLDEN, META, MODEL = PUBLISHED


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_forward_and_losses():
    for name, ours, recorded in lightningdit_answers(PUBLISHED):
        torch.testing.assert_close(ours, recorded, rtol=1e-5, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("case", META["cases"])
def test_sampling(case):
    settings = META["cases"][case]
    guidance = [GuidanceTerm("ig", settings["ig"])]
    if settings["cfg"] != 1.0:
        # their CFG is off before t' = cfg_start, at which it is on
        guidance.append(GuidanceTerm("cfg", settings["cfg"], (0.0, 1 - settings["cfg_start"])))
    velocity_fn = guided_velocity(MODEL, GOLDEN["forward.labels"], guidance)
    times = time_grid(settings["num_steps"] - 1, 1 / settings["shift"])
    solve = heun if settings["method"] == "heun2" else euler
    out = solve(velocity_fn, GOLDEN["forward.x_t"].double(), times)
    assert_close(out, GOLDEN[f"sample.{case}.out"])
