"""The original SiT's sampler, whose CFG guides three of four channels, from its recorded numbers (tests/data).

Recorded by running its published code (the file's ``meta`` says which) in fp32 on a CPU, on a tiny model with random
weights: the model's ``forward_with_cfg`` under ``transport.Sampler``, and the noise that each step of the SDE drew. Its
time runs from noise to data, t' = 1 - t.
"""

import json

import pytest
import torch
from safetensors import safe_open

from ig_dist.config.file import load_config
from ig_dist.convert.formats import read_config, to_ours
from ig_dist.diffusion.guidance import GuidanceTerm, guided_velocity
from ig_dist.diffusion.path import Path
from ig_dist.diffusion.samplers import euler, euler_maruyama, sde_grid, time_grid
from ig_dist.models.dit import DiT
from ig_dist.plans.asking import recipe
from tests.conftest import ROOT

with safe_open(ROOT / "tests/data/sit_original_tiny.safetensors", "pt") as file:
    GOLDEN = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    META = json.loads(file.metadata()["meta"])
WEIGHTS = {key.removeprefix("state_dict."): tensor for key, tensor in GOLDEN.items() if key.startswith("state_dict.")}
MODEL = DiT(read_config(WEIGHTS, "sit", aux_depth=None, num_heads=META["model"]["num_heads"]))
MODEL.load_state_dict(to_ours(WEIGHTS, "sit")[0])
MODEL.eval()


def sample(case: str, channels: int | None) -> torch.Tensor:
    settings = META["cases"][case]
    guidance = [GuidanceTerm("cfg", settings["cfg_scale"], channels=channels)]
    velocity_fn, steps = guided_velocity(MODEL, GOLDEN["labels"], guidance), settings["num_steps"]
    if settings["kind"] == "euler":  # num_steps counts points in time
        return euler(velocity_fn, GOLDEN["z"].double(), time_grid(steps - 1))
    noise = GOLDEN[f"{case}.noise"]
    return euler_maruyama(
        velocity_fn, GOLDEN["z"].double(), sde_grid(steps), Path("linear"), lambda step, x: noise[step].to(x.dtype)
    )


@pytest.mark.parametrize("case", META["cases"])
def test_the_originals_sampler(case: str) -> None:
    recorded = GOLDEN[f"{case}.out"].double()
    torch.testing.assert_close(sample(case, 3), recorded, rtol=1e-5, atol=2e-5)  # its state is float32
    assert (sample(case, None) - recorded).abs().max() > 0.05  # CFG on all four is another sampler


def test_the_config_and_the_recipe_guide_as_the_original_does() -> None:
    written = load_config(ROOT / "configs/sit_xl2.yaml")
    asked = load_config(ROOT / "configs/sit_xl2.yaml", ["guidance=[]", *recipe("paper", written.model)])
    for config in (written, asked):
        assert config.guidance == [GuidanceTerm("cfg", 1.5, channels=3)]
