"""What follows the gradient, on a preset's weights: norm, clipping, gate, AdamW and average, ours and the plain ways.

    python benchmarks/optimizer.py --preset SiT-B/2

"published" is how public trainers of DiTs have it: ``clip_grad_norm_``, AdamW as torch sets it up, and an average by
two operations a tensor. "apart" has fused AdamW and a lerp a tensor, and clips in a pass of its own, as ours once did.
Counted are the bytes that each operation reads and writes, in units of the weights' size, and the operations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import typer
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.side_by_side import Claim, Record, Result, Rounds, interleaved, show, show_results
from benchmarks.synthetic import build_model, build_step, synthetic_info
from ig_dist.config.file import config_from_tree
from ig_dist.optim.optimizer import build_optimizer
from ig_dist.parallel.dist import init_distributed
from ig_dist.parallel.engine import total_norm, update
from ig_dist.terminal import run_app
from ig_dist.training.learner import EMA
from tests.counting import Operations

CLIP, LR, DECAY = 1.0, 1e-4, 0.9999
Way = Callable[[], object]


def apart(parameters: list[nn.Parameter], *, fused: bool) -> Way:
    """Norm, clipping, AdamW and average by torch's own functions, one after the other."""
    optimizer = AdamW(parameters, lr=LR, weight_decay=0.0, fused=fused or None)
    averages = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def step() -> None:
        norm = nn.utils.clip_grad_norm_(parameters, CLIP)
        if fused:
            optimizer.found_inf = 1.0 - norm.isfinite().float()  # type: ignore[attr-defined]
        optimizer.step()
        for average, parameter in zip(averages, parameters, strict=True):
            if fused:
                average.lerp_(parameter, 1 - DECAY)
            else:
                average.mul_(DECAY).add_(parameter, alpha=1 - DECAY)

    return step


def ours(parameters: list[nn.Parameter], config: Any) -> Way:
    """What an engine's step and the average after it do."""
    optimizer = build_optimizer(parameters, config.optimizer)
    ema = EMA({str(i): parameter.detach() for i, parameter in enumerate(parameters)}, [DECAY])

    @torch.no_grad()
    def step() -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        ema.update(update(optimizer, total_norm(grads), CLIP, LR).finite)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad

    return step


def passes(way: Way, weights: int) -> tuple[float, int]:
    """Bytes that a call moves over those of the weights, and its operations."""
    with Operations() as operations:
        way()
    return operations.bytes / weights, operations.launches


def averages_alone(parameters: list[nn.Parameter]) -> Mapping[str, Way]:
    """The average alone: our pass, and a lerp a tensor."""
    weights: dict[str, Tensor] = {str(i): parameter.detach() for i, parameter in enumerate(parameters)}
    ema, finite = EMA(weights, [DECAY]), torch.ones((), device=parameters[0].device)
    plain = [weight.clone() for weight in weights.values()]

    def lerps() -> None:
        for average, weight in zip(plain, weights.values(), strict=True):
            average.lerp_(weight, 1 - DECAY)

    return {"average, ours": lambda: ema.update(finite), "average, a lerp a tensor": lerps}


def main(
    preset: Annotated[str, typer.Option(help="Model size.")] = "SiT-S/2",
    batch_size: Annotated[int, typer.Option(help="Images of the step that the share is of.")] = 8,
    rounds: Rounds = 7,
    record: Record = False,
) -> None:
    """Time and count what a step does with its gradient."""
    dist = init_distributed(600, 600)
    train = {"steps": 1, "global_batch_size": batch_size}
    tree = {"model": {"preset": preset}, "data": {"index": "synthetic", "streams": 1}, "train": train}
    config, info = config_from_tree(tree, "benchmark"), synthetic_info(4, 32, 1000)

    def parameters() -> list[nn.Parameter]:
        made = list(build_model(config, info, dist.device).parameters())
        for parameter in made:
            parameter.grad = torch.full_like(parameter, 1e-3)
        return made

    lent = parameters()
    weights = sum(parameter.nbytes for parameter in lent)
    ways: dict[str, Way] = {
        "ours": ours(lent, config),
        "apart": apart(parameters(), fused=True),
        "published": apart(parameters(), fused=False),
        **averages_alone(lent),
        "step": build_step(config, info, dist),
    }
    times = interleaved(ways, rounds)
    claims = [
        Claim(f"norm, clip, AdamW, average of {preset}, published / ours", "published", "ours", ">= 1.0"),
        Claim(f"norm, clip, AdamW, average of {preset}, apart / ours", "apart", "ours", ">= 1.0"),
        Claim(f"average of {preset}, a lerp a tensor / ours", "average, a lerp a tensor", "average, ours", ">= 0.95"),
        Claim(f"norm, clip, AdamW, average, share of a step of {preset} at batch {batch_size}", "ours", "step"),
    ]
    show(times, claims, title=f"{preset}, {weights / 4e6:.1f} M weights", record=record)
    counts = {name: passes(ways[name], weights) for name in ("ours", "apart", "published")}
    found = [Result("passes over the weights' size, norm to average, ours", counts["ours"][0], limit="<= 12.1")]
    found += [Result(f"passes over the weights' size, norm to average, {n}", counts[n][0]) for n in list(counts)[1:]]
    found += [Result(f"operations of {preset}, norm to average, {name}", counts[name][1]) for name in counts]
    show_results(found, record=record)


if __name__ == "__main__":
    run_app(main)
