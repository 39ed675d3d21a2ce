"""The published implementations' recorded numbers (tests/data), and what our models say to the same questions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ig_dist.convert.formats import read_config, to_ours
from ig_dist.diffusion.loss import ig_loss
from ig_dist.diffusion.path import Path
from ig_dist.models.dit import DiT, DiTConfig

FOLDER = FilePath(__file__).parent / "data"


class Golden(NamedTuple):
    """What was recorded, and our model with the same weights."""

    numbers: dict[str, Tensor]
    meta: dict[str, Any]
    model: DiT


class Answer(NamedTuple):
    """A number of ours beside the recorded one."""

    name: str
    ours: Tensor
    recorded: Tensor


def sit(folder: FilePath = FOLDER) -> Golden:
    """SiT + IG."""
    numbers, meta, weights = _read(folder / "sit_ig_tiny.safetensors")
    published = meta["model"]
    names = ("depth", "hidden_size", "num_heads", "patch_size", "input_size", "in_channels")
    config = {name: published[name] for name in names}
    model = DiT(DiTConfig(**config, num_classes=1000, aux_depth=published["encoder_depth"]))
    weights = {name.replace("final_layer_xr", "aux_layer"): tensor for name, tensor in weights.items()}
    assert torch.equal(model.pos_embed, weights["pos_embed"])
    model.load_state_dict(weights)
    return Golden(numbers, meta, model.eval())


def lightningdit(folder: FilePath = FOLDER) -> Golden:
    """LightningDiT + IG. Its time runs from noise to data, t' = 1 - t; its velocity is -1 times ours."""
    numbers, meta, weights = _read(folder / "lightningdit_ig_tiny.safetensors")
    config = read_config(weights, "ig-lightningdit", aux_depth=meta["model"]["encoder_depth"], num_heads=None)
    for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads"):
        assert getattr(config, name) == meta["model"][name], name
    model = DiT(config)
    # the tables that a new model is built with, too
    assert torch.equal(model.pos_embed, weights["pos_embed"])
    assert model.feat_rope is not None
    for name in ("freqs_cos", "freqs_sin"):
        torch.testing.assert_close(model.feat_rope.get_buffer(name), weights[f"feat_rope.{name}"], rtol=0, atol=1e-6)
    model.load_state_dict(to_ours(weights, "ig-lightningdit")[0])
    return Golden(numbers, meta, model.eval())


@torch.no_grad()
def sit_answers(golden: Golden) -> Iterator[Answer]:
    """Forward and losses, on the device of the model."""
    said = _on_device(golden)
    output = golden.model(said["forward.x_t"], said["forward.t"], said["forward.labels"])
    yield Answer("velocity", output.velocity, said["forward.velocity"])
    yield Answer("aux_velocity", output.aux_velocity, said["forward.aux_velocity"])
    for kind in ("linear", "cosine"):
        t = said[f"loss.{kind}.t"]
        x_t, velocity = Path(kind).interpolate(said["forward.x_t"], said[f"loss.{kind}.noise"], t)
        losses = ig_loss(golden.model(x_t, t, said["forward.labels"]), velocity, aux_weight=0.5)
        final, aux = said[f"loss.{kind}.final"], said[f"loss.{kind}.aux"]
        yield Answer(f"{kind} loss", losses.final, final)
        yield Answer(f"{kind} loss of the auxiliary head", losses.aux, aux)
        yield Answer(f"{kind} loss, both", losses.total, final + 0.5 * aux)


@torch.no_grad()
def lightningdit_answers(golden: Golden) -> Iterator[Answer]:
    """Forward and losses, on the device of the model."""
    said = _on_device(golden)
    output = golden.model(said["forward.x_t"], 1 - said["forward.t"], said["forward.labels"])
    yield Answer("velocity", -output.velocity, said["forward.velocity"])
    yield Answer("aux_velocity", -output.aux_velocity, said["forward.aux_velocity"])
    x_t, velocity = Path("linear").interpolate(said["forward.x_t"], said["loss.noise"], 1 - said["loss.t"])
    output = golden.model(x_t, 1 - said["loss.t"], said["forward.labels"])
    yield Answer("loss", ig_loss(output, velocity, aux_weight=0.5).total, said["loss.mse_total"])
    losses = ig_loss(output, velocity, aux_weight=0.5, cosine_weight=1.0)
    yield Answer("cosine of the velocities", losses.cosine, said["loss.cos"])
    yield Answer("loss with the cosine", losses.total, said["loss.mse_total"] + said["loss.cos"])


def _read(file: FilePath) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """The recorded numbers, what they are of, and the weights."""
    with safe_open(file, "pt") as opened:
        numbers = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        meta = json.loads(opened.metadata()["meta"])
    prefix = "state_dict."
    weights = {key.removeprefix(prefix): tensor for key, tensor in numbers.items() if key.startswith(prefix)}
    return numbers, meta, weights


def _on_device(golden: Golden) -> dict[str, Tensor]:
    device = golden.model.pos_embed.device
    return {key: tensor.to(device) for key, tensor in golden.numbers.items() if not key.startswith("state_dict.")}
