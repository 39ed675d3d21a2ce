"""Sampling against itself: whole units and the solver alone, compiled and plain, weights cast once and by autocast.

    python benchmarks/sampling.py                                     # the quickstart's model, on pixels
    python benchmarks/sampling.py --preset SiT-B/2 --size 32 --channels 4 --steps 2 --num 8 --batch-size 4
    python benchmarks/sampling.py --preset SiT-XL/2 --size 32 --channels 4 --steps 16 --num 512 --extractor inception

Each way makes the same images with random weights, in the turns of a round. What stands beside the solver has a stream
and a thread of its own on a GPU; on a CPU it takes its turn, but for the writing. What the auxiliary head costs is in
``train_step.py``, the published samplers are in ``compare.py``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import typer

from benchmarks.side_by_side import Claim, Record, Rounds, interleaved, show
from benchmarks.synthetic import export_info
from ig_dist.autoencoders.tokenizers import get_tokenizer
from ig_dist.config.model import ModelConfig
from ig_dist.data.index import TokenizerInfo
from ig_dist.features.extractors.extractor import Extractor, get_extractor
from ig_dist.models.dit import DiT, initialize
from ig_dist.plans.plan import Plan, image_numbers
from ig_dist.plans.samples import Samples
from ig_dist.sampling.generate import generate_units
from ig_dist.sampling.solving import Models, Sampler
from ig_dist.terminal import run_app
from ig_dist.this_process import this_device

QUICKSTART: dict[str, Any] = {"depth": 6, "hidden_size": 128, "num_heads": 4, "aux_depth": 2, "patch_size": 2}


def build(preset: str | None, size: int, channels: int, tokenizer: str, device: torch.device) -> Models:
    """A model as a run begins, with a tokenizer."""
    layers = {"preset": preset, "aux_depth": 8 if "XL" in preset else 4} if preset else QUICKSTART
    config = ModelConfig(**layers, input_size=size, in_channels=channels, num_classes=10).to_dit()
    with device:
        model = DiT(config).eval().requires_grad_(False)
    initialize(model, 0)
    decoder = get_tokenizer(tokenizer, device=device)
    side, colours = size * decoder.downsample, decoder.image_channels or channels
    told = TokenizerInfo(name=decoder.name, sha256=decoder.sha256, image_size=side, image_channels=colours)
    return Models(model, export_info(config, told), decoder)


def solver_alone(sampler: Sampler) -> None:
    """All batches of the plan, and nothing of what follows."""
    for number in range(sampler.plan.num_units):
        for batch in sampler.batches(number):
            sampler.solve(image_numbers(batch.solved))


def whole_units(models: Models, plan: Plan, features: Extractor) -> None:
    """What ``ig-dist sample --evaluate`` makes."""
    with tempfile.TemporaryDirectory() as folder:
        info: Any = models.info
        generate_units(models, Samples(plan, info, str(Path(folder)), models.tokenizer.uint8_rule), [features])


def under_autocast(models: Models, plan: Plan) -> Sampler:
    """As sampling was: weights in fp32, cast at each use."""
    sampler = Sampler(models, plan)
    sampler._model = models.model
    return sampler


def main(
    preset: Annotated[str | None, typer.Option(help="Size of the model; default: the quickstart's.")] = None,
    size: Annotated[int, typer.Option(help="Side of the latents.")] = 8,
    channels: Annotated[int, typer.Option(help="Channels of the latents.")] = 1,
    tokenizer: Annotated[str, typer.Option(help="What decodes them.")] = "pixel",
    extractor: Annotated[str, typer.Option(help="Whose features are made.")] = "pixel",
    weights: Annotated[str, typer.Option(help="Of the extractor; others than the published ones will do.")] = "",
    num: Annotated[int, typer.Option(help="Images of a round.")] = 256,
    steps: Annotated[int, typer.Option(help="Steps of Heun.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 128,
    precision: Annotated[
        str, typer.Option(help="fp32, tf32 or bf16: of all but the casts, which are bf16's.")
    ] = "fp32",
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="The compiled way too.")] = True,
    rounds: Rounds = 5,
    record: Record = False,
) -> None:
    """Make the same images in each way, and say the ratios."""
    device = this_device()
    models = build(preset, size, channels, tokenizer, device)
    features = get_extractor(extractor, weights=weights, device=device, allow_other=bool(weights))
    given: dict[str, Any] = {"labels": "balanced", "num_classes": 10, "seed": 0, "solver": "heun", "weights_sha256": ""}
    given |= {"num": num, "steps": steps, "unit_size": 256, "batch_size": batch_size, "compile": False}
    plan = Plan.model_validate({**given, "guidance": [{"kind": "ig", "scale": 1.4}], "precision": precision})
    in_bf16 = plan.model_copy(update={"precision": "bf16"})
    ways: dict[str, Callable[[], object]] = {
        "whole units": partial(whole_units, models, plan, features),
        "solver": partial(solver_alone, Sampler(models, plan)),
        "weights cast once": partial(solver_alone, Sampler(models, in_bf16)),
        "under autocast": partial(solver_alone, under_autocast(models, in_bf16)),
    }
    of = f"{preset or 'quickstart'}, batch {batch_size}"
    claims = [
        Claim(f"sampling, {of}, {precision}: whole units / solver", "whole units", "solver", "<= 1.05"),
        Claim(f"sampling, {of}, bf16: under autocast / cast once", "under autocast", "weights cast once", ">= 1.0"),
    ]
    if compiled:
        ways["compiled"] = partial(solver_alone, Sampler(models, plan.model_copy(update={"compile": True})))
        limit = ">= 1.5" if device.type == "cuda" else ">= 1.0"
        claims.append(Claim(f"sampling, {of}, {precision}: plain / compiled", "solver", "compiled", limit))
    title = f"{num} images, Heun {steps}, IG 1.4, {extractor} features, {rounds} rounds"
    show(interleaved(ways, rounds), claims, title=title, record=record)


if __name__ == "__main__":
    run_app(main)
