"""The published LightningDiT + IG implementation, reproduced from its recorded numbers (tests/data).

Its time runs from noise to data, t' = 1 - t; its velocity is -1 times ours.
"""

import json
from pathlib import Path as FilePath

import pytest
import torch
from safetensors import safe_open

from ig_dist.diffusion.guidance import GuidanceTerm, guided_velocity
from ig_dist.diffusion.loss import ig_loss
from ig_dist.diffusion.path import Path
from ig_dist.diffusion.samplers import euler, heun, time_grid
from ig_dist.models.convert import read_config, to_ours
from ig_dist.models.dit import DiT

with safe_open(FilePath(__file__).parents[1] / "data" / "lightningdit_ig_tiny.safetensors", "pt") as file:
    GOLDEN = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    META = json.loads(file.metadata()["meta"])
WEIGHTS = {key.removeprefix("state_dict."): value for key, value in GOLDEN.items() if key.startswith("state_dict.")}


@pytest.fixture(scope="module")
def model():
    config = read_config(WEIGHTS, "ig-lightningdit", aux_depth=META["model"]["encoder_depth"], num_heads=None)
    for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads"):
        assert getattr(config, name) == META["model"][name], name
    model = DiT(config)
    # the tables that a new model is built with, too
    assert torch.equal(model.pos_embed, WEIGHTS["pos_embed"])
    for name in ("freqs_cos", "freqs_sin"):
        torch.testing.assert_close(model.feat_rope.get_buffer(name), WEIGHTS[f"feat_rope.{name}"], rtol=0, atol=1e-6)
    model.load_state_dict(to_ours(WEIGHTS, "ig-lightningdit")[0])
    return model.eval()


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_forward(model):
    with torch.no_grad():
        output = model(GOLDEN["forward.x_t"], 1 - GOLDEN["forward.t"], GOLDEN["forward.labels"])
    assert_close(-output.velocity, GOLDEN["forward.velocity"])
    assert_close(-output.aux_velocity, GOLDEN["forward.aux_velocity"])


def test_losses(model):
    x_t, velocity = Path("linear").interpolate(GOLDEN["forward.x_t"], GOLDEN["loss.noise"], 1 - GOLDEN["loss.t"])
    with torch.no_grad():
        output = model(x_t, 1 - GOLDEN["loss.t"], GOLDEN["forward.labels"])
    assert_close(ig_loss(output, velocity, aux_weight=0.5).total, GOLDEN["loss.mse_total"])
    losses = ig_loss(output, velocity, aux_weight=0.5, cosine_weight=1.0)
    assert_close(losses.cosine, GOLDEN["loss.cos"])
    assert_close(losses.total, GOLDEN["loss.mse_total"] + GOLDEN["loss.cos"])


@pytest.mark.parametrize("case", META["cases"])
def test_sampling(model, case):
    settings = META["cases"][case]
    guidance = [GuidanceTerm("ig", settings["ig"])]
    if settings["cfg"] != 1.0:
        # their CFG is off before t' = cfg_start, at which it is on
        guidance.append(GuidanceTerm("cfg", settings["cfg"], (0.0, 1 - settings["cfg_start"])))
    velocity_fn = guided_velocity(model, GOLDEN["forward.labels"], guidance)
    times = time_grid(settings["num_steps"] - 1, 1 / settings["shift"])
    solve = heun if settings["method"] == "heun2" else euler
    out = solve(velocity_fn, GOLDEN["forward.x_t"].double(), times)
    assert_close(out, GOLDEN[f"sample.{case}.out"])
