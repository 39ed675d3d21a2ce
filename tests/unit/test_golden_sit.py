"""The published SiT + IG implementation, reproduced from its recorded numbers (tests/data)."""

import json
from pathlib import Path as FilePath

import pytest
import torch
from safetensors import safe_open

from ig_dist.diffusion.guidance import GuidanceTerm, guided_velocity
from ig_dist.diffusion.loss import ig_loss
from ig_dist.diffusion.path import Path
from ig_dist.diffusion.samplers import euler, euler_maruyama, heun, sde_grid, time_grid
from ig_dist.models.dit import DiT, DiTConfig

with safe_open(FilePath(__file__).parents[1] / "data" / "sit_ig_tiny.safetensors", "pt") as file:
    GOLDEN = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    META = json.loads(file.metadata()["meta"])


@pytest.fixture(scope="module")
def model():
    published = META["model"]
    names = ("depth", "hidden_size", "num_heads", "patch_size", "input_size", "in_channels")
    config = {name: published[name] for name in names}
    model = DiT(DiTConfig(**config, num_classes=1000, aux_depth=published["encoder_depth"]))
    prefix = "state_dict."
    weights = {
        key.removeprefix(prefix).replace("final_layer_xr", "aux_layer"): tensor
        for key, tensor in GOLDEN.items()
        if key.startswith(prefix)
    }
    assert torch.equal(model.pos_embed, weights["pos_embed"])
    model.load_state_dict(weights)
    return model.eval()


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_forward(model):
    with torch.no_grad():
        output = model(GOLDEN["forward.x_t"], GOLDEN["forward.t"], GOLDEN["forward.labels"])
    assert_close(output.velocity, GOLDEN["forward.velocity"])
    assert_close(output.aux_velocity, GOLDEN["forward.aux_velocity"])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_losses(model, kind):
    t = GOLDEN[f"loss.{kind}.t"]
    x_t, velocity = Path(kind).interpolate(GOLDEN["forward.x_t"], GOLDEN[f"loss.{kind}.noise"], t)
    with torch.no_grad():
        losses = ig_loss(model(x_t, t, GOLDEN["forward.labels"]), velocity, aux_weight=0.5)
    assert_close(losses.final, GOLDEN[f"loss.{kind}.final"])
    assert_close(losses.aux, GOLDEN[f"loss.{kind}.aux"])
    assert_close(losses.total, GOLDEN[f"loss.{kind}.final"] + 0.5 * GOLDEN[f"loss.{kind}.aux"])


@pytest.mark.parametrize("case", META["cases"])
def test_sampling(model, case):
    settings = META["cases"][case]
    guidance = []
    for kind, prefix in (("cfg", ""), ("ig", "sg_")):
        interval = (
            settings.get(f"{prefix}guidance_low", 0.0),
            settings.get(f"{prefix}guidance_high", 1.0),
        )
        scale = settings.get("sg_scale" if kind == "ig" else "cfg_scale", 1.0)
        guidance.append(GuidanceTerm(kind, scale, interval))
    velocity_fn = guided_velocity(model, GOLDEN["forward.labels"], guidance)
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
