"""What decoding, features and writing add to sampling: whole units against the solver alone, side by side in one run.

    python benchmarks/sampling.py                                     # the quickstart's model, on pixels
    python benchmarks/sampling.py --preset SiT-XL/2 --size 32 --channels 4 --steps 64 --num 512 --extractor inception

Each round makes the same images in both ways, with random weights. On a GPU what is beside the solver has a stream and
a thread of its own; on a CPU it takes its turn, but for the writing.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from ig_dist.config.model import ModelConfig
from ig_dist.data.index import LatentInfo, TokenizerInfo
from ig_dist.evaluation.extractors.extractor import get_extractor
from ig_dist.evaluation.generate import Models, generate_units, solve
from ig_dist.evaluation.plan import Plan, image_numbers
from ig_dist.evaluation.units import Samples
from ig_dist.export import ExportInfo
from ig_dist.latents.tokenizers import get_tokenizer
from ig_dist.models.dit import DiT
from ig_dist.terminal import console, run_app
from ig_dist.this_process import this_device


def build(
    preset: str | None, size: int, channels: int, tokenizer: str, device: torch.device
) -> tuple[Models, ExportInfo]:
    """A model with random weights, and a tokenizer."""
    layers = (
        {"preset": preset, "aux_depth": 8}
        if preset
        else {"depth": 6, "hidden_size": 128, "num_heads": 4, "aux_depth": 2}
    )
    shape = {"patch_size": 2} if not preset else {}
    config = ModelConfig(**layers, **shape, input_size=size, in_channels=channels, num_classes=10).to_dit()
    with device:
        model = DiT(config).eval().requires_grad_(False)
    decoder = get_tokenizer(tokenizer, device=device)
    info = ExportInfo(
        model=config,
        path="linear",
        latent=LatentInfo(
            kind="sample", shape=(channels, size, size), dtype="float16", shift=[0.0] * channels, scale=[1.0] * channels
        ),
        tokenizer=TokenizerInfo(
            name=decoder.name, sha256=decoder.sha256, image_size=size * decoder.downsample, image_channels=channels
        ),
        classes=[str(i) for i in range(10)],
        trained_with_null_label=True,
        ema=None,
        step=0,
        images_seen=0,
        checkpoint_sha256="",
        weights_sha256="",
    )
    return Models(model, info, decoder), info


def solver_alone(models: Models, plan: Plan, device: torch.device) -> None:
    """All batches of the plan, and nothing of what follows."""
    for number in range(plan.num_units):
        unit = plan.unit(number)
        for start in range(unit.start, unit.stop, plan.batch_size):
            numbers = image_numbers(range(start, min(start + plan.batch_size, unit.stop)), device)
            solve(models, plan, numbers, plan.image_labels(numbers))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(
    preset: Annotated[str | None, typer.Option(help="Size of the model; default: the quickstart's.")] = None,
    size: Annotated[int, typer.Option(help="Side of the latents.")] = 8,
    channels: Annotated[int, typer.Option(help="Channels of the latents.")] = 1,
    tokenizer: Annotated[str, typer.Option(help="What decodes them.")] = "pixel",
    extractor: Annotated[str, typer.Option(help="Whose features are made.")] = "pixel",
    weights: Annotated[str, typer.Option(help="Of the extractor; others than the published ones will do.")] = "",
    num: Annotated[int, typer.Option(help="Images of a round.")] = 1024,
    steps: Annotated[int, typer.Option(help="Steps of Heun.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 128,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    rounds: Annotated[int, typer.Option(help="Rounds after a first one that does not count.")] = 5,
) -> None:
    """Compare whole sampling with the solver alone."""
    device = this_device()
    models, info = build(preset, size, channels, tokenizer, device)
    features = get_extractor(extractor, weights=weights, device=device, allow_other=bool(weights))
    ratios, rates = [], []
    for number in range(rounds + 1):
        plan = Plan.model_validate(
            {
                **{
                    "num": num,
                    "labels": "balanced",
                    "num_classes": 10,
                    "seed": number,
                    "solver": "heun",
                    "steps": steps,
                },
                **{"guidance": [{"kind": "ig", "scale": 1.4}], "precision": precision, "unit_size": 256},
                **{"batch_size": batch_size, "weights_sha256": ""},
            }
        )
        began = time.perf_counter()
        solver_alone(models, plan, device)
        alone = time.perf_counter() - began
        with tempfile.TemporaryDirectory() as folder:
            samples = Samples(plan, info, str(Path(folder)), models.tokenizer.uint8_rule)
            began = time.perf_counter()
            generate_units(models, samples, [features])
            whole = time.perf_counter() - began
        if number:
            ratios.append(whole / alone)
            rates.append(num / whole)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    console.print(
        f"{name}, {preset or 'quickstart'}, Heun {steps}, {precision}, {extractor} features, {rounds} rounds of {num}"
        f" images: {statistics.median(ratios):.3f} of the solver alone (lowest {min(ratios):.3f}, highest"
        f" {max(ratios):.3f}), {statistics.median(rates):.1f} images/s"
    )


if __name__ == "__main__":
    run_app(main)
