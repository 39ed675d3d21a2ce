"""A training step of a preset on synthetic latents: compiled against eager, and what the auxiliary head costs.

    python benchmarks/train_step.py --preset SiT-B/2 --batch-size 64

The step is the product's own: draws, loss, engine, fused optimizer, EMA. The head's cost is counted in FLOPs of
SiT-XL/2, and timed by itself beside whole steps: steps with and without it differ by less than steps of one kind do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import typer
from torch import Tensor

from benchmarks.side_by_side import Claim, Record, Result, Rounds, interleaved, show, show_results
from benchmarks.synthetic import build_draws, build_model, build_step, synthetic_info
from ig_dist.arithmetic import arithmetic
from ig_dist.config import Config
from ig_dist.config.file import config_from_tree
from ig_dist.config.model import ModelConfig
from ig_dist.models.dit import DiT
from ig_dist.models.presets import forward_flops
from ig_dist.parallel.dist import init_distributed
from ig_dist.terminal import console, run_app
from ig_dist.training.metrics import model_flops_utilisation

TRAINING, SAMPLING = "<= 0.015", "<= 0.01"


def counted(preset: str = "SiT-XL/2") -> list[Result]:
    """FLOPs of the head over those of a model without it, in training and in a forward pass alike."""
    shape = {"preset": preset, "input_size": 32, "in_channels": 4, "num_classes": 1000}
    with_head, without = (forward_flops(ModelConfig(**shape, aux_depth=depth).to_dit()) for depth in (8, None))
    share = with_head / without - 1
    return [
        Result(f"auxiliary head's FLOPs / {preset}'s, training", share, limit=TRAINING),
        Result(f"auxiliary head's FLOPs / {preset}'s, sampling", share, limit=SAMPLING),
    ]


def head_alone(model: DiT, rows: int, config: Config, *, backward: bool) -> Callable[[], None]:
    """What a step or a forward pass has more with the head: the head on tokens, its loss, its gradients."""
    device, width = model.pos_embed.device, model.config.hidden_size
    tokens = torch.randn(rows, model.config.grid_size**2, width, device=device, requires_grad=backward)
    condition = torch.randn(rows, width, device=device, requires_grad=backward)
    target = torch.randn(rows, model.config.in_channels, *2 * [model.config.input_size], device=device)

    def call() -> None:
        with torch.set_grad_enabled(backward), arithmetic(config.train.precision, device):
            assert model.aux_layer is not None
            velocity: Tensor = model._unpatchify(model.aux_layer(tokens, condition))
        if backward:
            loss = 0.5 * (velocity.float() - target).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            tokens.grad = condition.grad = None

    return call


def main(
    preset: Annotated[str, typer.Option(help="Model size.")] = "SiT-B/2",
    aux_depth: Annotated[int, typer.Option(help="Block of the auxiliary head.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 64,
    channels: Annotated[int, typer.Option(help="Latent channels.")] = 4,
    size: Annotated[int, typer.Option(help="Latent side.")] = 32,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "bf16",
    rounds: Rounds = 7,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Time the compiled step too.")] = True,
    record: Record = False,
) -> None:
    """Time a training step, and the auxiliary head."""
    dist = init_distributed(600, 600)
    info = synthetic_info(channels, size, 1000)
    case = f"{preset}, batch {batch_size}, {precision}"

    def config(*, compile_blocks: bool) -> Config:
        tree: dict[str, Any] = {
            "model": {"preset": preset, "aux_depth": aux_depth},
            "data": {"index": "synthetic", "streams": 1},
            "train": {"steps": 1, "global_batch_size": batch_size, "precision": precision, "compile": compile_blocks},
        }
        return config_from_tree(tree, "benchmark")

    eager = config(compile_blocks=False)
    model = build_model(eager, info, dist.device)
    x, t = torch.randn(batch_size, channels, size, size, device=dist.device), torch.rand(batch_size, device=dist.device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=dist.device)

    def forward() -> None:
        with torch.no_grad(), arithmetic(eager.train.precision, dist.device):
            model(x, t, labels, with_aux=False)

    ways: dict[str, Callable[[], object]] = {
        "step": build_step(eager, info, dist),
        "draws": build_draws(eager, info, dist),
        "head in training": head_alone(model, batch_size, eager, backward=True),
        "forward without head": forward,
        "head in sampling": head_alone(model, batch_size, eager, backward=False),
    }
    claims = [
        Claim(f"auxiliary head / training step, {case}", "head in training", "step", TRAINING),
        Claim(f"auxiliary head / forward pass, {case}", "head in sampling", "forward without head", SAMPLING),
        Claim(f"draws / training step, {case}", "draws", "step"),
    ]
    if compiled:
        ways["step, compiled"] = build_step(config(compile_blocks=True), info, dist)
        claims.append(Claim(f"training step, {case}: eager / compiled", "step", "step, compiled"))
    show_results(counted(), record=record)
    times = interleaved(ways, rounds)
    show(times, claims, title=case, record=record)
    for name in ("step", "step, compiled")[: 1 + compiled]:
        rate = batch_size / sorted(times[name])[rounds // 2]
        mfu = model_flops_utilisation(3 * forward_flops(model.config), rate, 1, dist.device, None)
        console.print(f"{name}: {rate:.4g} images/s" + (f", MFU {100 * mfu:.1f}%" if mfu else ""))


if __name__ == "__main__":
    run_app(main)
