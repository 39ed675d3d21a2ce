"""The published SiT + IG implementation, reproduced from its recorded numbers (tests/data)."""

import pytest
import torch

from ig_dist.diffusion.guidance import GuidanceTerm, guided_velocity
from ig_dist.diffusion.path import Path
from ig_dist.diffusion.samplers import euler, euler_maruyama, heun, sde_grid, time_grid
from tests.golden import sit, sit_answers

PUBLISHED = sit()
GOLDEN, META, MODEL = PUBLISHED


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_forward_and_losses():
    for name, ours, recorded in sit_answers(PUBLISHED):
        torch.testing.assert_close(ours, recorded, rtol=1e-5, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("case", META["cases"])
def test_sampling(case):
    settings = META["cases"][case]
    guidance = []
    for kind, prefix in (("cfg", ""), ("ig", "sg_")):
        interval = (
            settings.get(f"{prefix}guidance_low", 0.0),
            settings.get(f"{prefix}guidance_high", 1.0),
        )
        scale = settings.get("sg_scale" if kind == "ig" else "cfg_scale", 1.0)
        guidance.append(GuidanceTerm(kind, scale, interval))
    velocity_fn = guided_velocity(MODEL, GOLDEN["forward.labels"], guidance)
    x, steps = GOLDEN["forward.x_t"].double(), settings["num_steps"]
    if settings["fn"] == "em_ig":
        noise = GOLDEN[f"sample.{case}.noise"]
        out = euler_maruyama(velocity_fn, x, sde_grid(steps), Path("linear"), lambda step, x: noise[step].to(x.dtype))
    elif settings.get("heun"):
        out = heun(velocity_fn, x, time_grid(steps), correct_last_step=False)
    else:
        out = euler(velocity_fn, x, time_grid(steps))
    assert out.dtype == torch.float64
    assert_close(out, GOLDEN[f"sample.{case}.out"])
