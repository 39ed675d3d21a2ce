"""What training and sampling take on a GPU, and where the time goes. For ``benchmarks/gpu.py``."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.table import Table

from benchmarks import compare
from benchmarks.compare_cases import GPU
from benchmarks.gpu_cases import (
    Case,
    Found,
    NotHereError,
    flops_of,
    needs_a_gpu,
    small_compiler,
    step_config,
    step_of,
)
from benchmarks.reference import Published
from benchmarks.side_by_side import interleaved, profiled, seconds
from benchmarks.synthetic import build_model, export_info, synthetic_info
from ig_dist.autoencoders.tokenizers import PIXEL, Tokenizer
from ig_dist.config import Config
from ig_dist.plans.plan import Plan
from ig_dist.plans.samples import Samples
from ig_dist.sampling.generate import generate_units
from ig_dist.sampling.solving import Models, Sampler
from ig_dist.terminal import console
from ig_dist.training.dry_run import GIB, dry_run
from ig_dist.training.metrics import model_flops_utilisation, peak_tflops_of
from tests import tally

ROUNDS, STEPS = 5, 4
BATCHES = (64, 128, 192)
PARTS = {
    "attention": r"flash|fmha|attention|sdpa|attn|cudnn::fusion",
    "matrix products": r"gemm|cutlass|nvjet|cublas|xmma|sm\d\d_|aten::(add)?mm",
    "fused by the compiler": r"triton",
    "optimizer, clip and EMA": r"adam|multi_tensor|foreach|fused_sgd|lerp|norm_kernel|linalg_vector_norm",
    "copies and casts": r"memcpy|copy|memset|fill",
}
"""Kernels of a step by their names; the rest are eager ones."""


def memory(case: Case, name: str, batch_size: int) -> Found:
    """The most memory of an eager step against what the dry run says; it may be off by a quarter."""
    config = step_config(case, name, 2 if case.small else batch_size, compiled=False)
    expected = dry_run(config, gpus=1, mfu=0.4, peak_tflops=1000.0)["engines"]["ddp"]["total_bytes"]
    if case.small:
        raise NotHereError(f"the dry run says {expected / GIB:.3f} GiB of a tiny model; measuring needs a GPU")
    _, measured = with_peak(lambda: step_of(case, config), case.device)
    ratio = measured * GIB / expected
    found: Found = {"batch": batch_size, "GiB": measured, "dry run GiB": expected / GIB, "ratio": ratio}
    assert 0.75 <= ratio <= 1.25, found
    return found


def with_peak(build: Callable[[], Callable[[], None]], device: torch.device) -> tuple[Callable[[], None], float]:
    """A step that has run three times, and the most GiB that it took."""
    if device.type != "cuda":
        step = build()
        step()
        return step, 0.0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step = build()
    for _ in range(3):
        step()
    return step, (torch.cuda.max_memory_allocated(device) - before) / GIB


def training_speed(case: Case, name: str, batch_size: int) -> Found:
    """A compiled training step of a published config; at the smallest batch in turn with the eager one."""
    if case.small and batch_size > min(BATCHES):
        needs_a_gpu(case)
    rows, least = (2 if case.small else batch_size), batch_size == min(BATCHES)
    with small_compiler() if case.small else contextlib.nullcontext():
        config = step_config(case, name, rows, compiled=True)
        try:
            step, peak = with_peak(lambda: step_of(case, config), case.device)
        except torch.cuda.OutOfMemoryError as error:
            raise NotHereError(f"the GPU has too little memory: {str(error)[:100]}") from None
        ways = {"compiled": partial(_steps, step)}
        if least:
            eager, _ = with_peak(lambda: step_of(case, step_config(case, name, rows, compiled=False)), case.device)
            ways["eager"] = partial(_steps, eager)
        times = interleaved(ways, 1 if case.small else ROUNDS)
    rate = rows * STEPS / statistics.median(times["compiled"])
    found: Found = {"batch": rows, "images/s": rate, "peak GiB": peak}
    if least:
        pairs = zip(times["compiled"], times["eager"], strict=True)
        found["time / eager"] = statistics.median(mine / theirs for mine, theirs in pairs)
    return {**found, **utilisation(case, 3 * flops_of(config), rate)}


def _steps(step: Callable[[], None]) -> None:
    for _ in range(STEPS):
        step()


def utilisation(case: Case, flops: float, images_per_s: float) -> Found:
    """MFU, and the peak that it is of."""
    mfu, peak = model_flops_utilisation(flops, images_per_s, 1, case.device, None), peak_tflops_of(case.device)
    return {} if mfu is None or peak is None else {"MFU": mfu, "of TFLOP/s": peak}


def profile(case: Case, name: str, batch_size: int) -> Found:
    """Where the time of a compiled training step goes, in ms; the whole table is in the log."""
    with small_compiler() if case.small else contextlib.nullcontext():
        step = step_of(case, step_config(case, name, 2 if case.small else batch_size, compiled=True))
        for _ in range(3):
            step()
        wall = 1e3 * statistics.median(seconds(step) for _ in range(3))
        spent = profiled(step)
    parts: dict[str, float] = {}
    table = Table("operation", "ms", "calls")
    for key, (ms, calls) in sorted(spent.items(), key=lambda item: -item[1][0])[:60]:
        table.add_row(key[:100], f"{ms:.3f}", str(calls))
    for key, (ms, _) in spent.items():
        part = next((p for p, names in PARTS.items() if re.search(names, key, re.IGNORECASE)), "eager kernels")
        parts[part] = parts.get(part, 0.0) + ms
    console.print(table)
    busy = {} if case.small else {"idle": max(0.0, wall - sum(parts.values()))}
    return {"step": wall, **busy, **{part: parts[part] for part in sorted(parts, key=lambda part: -parts[part])}}


def sampled(case: Case, name: str, steps: int, batch_size: int, **given: Any) -> tuple[Config, Plan]:
    """The published way of sampling, of few steps."""
    config = step_config(case, name, 2, compiled=False)
    kept = {key: getattr(config.sample, key) for key in ("labels", "solver", "seed", "time_shift", "precision")}
    rest = {"num": batch_size, "num_classes": 1000, "guidance": config.guidance, "weights_sha256": "", "steps": steps}
    return config, Plan.model_validate({**kept, **rest, "unit_size": batch_size, "batch_size": batch_size, **given})


def sampler_models(case: Case, config: Config, tokenizer: Tokenizer) -> Models:
    """A model with random weights."""
    info = synthetic_info(config.model.in_channels or 4, config.model.input_size or 32, 1000)
    model = build_model(config, info, case.device).eval().requires_grad_(False)
    return Models(model, export_info(model.config), tokenizer)


def sampling_speed(case: Case, name: str, precision: str) -> Found:
    """The solver of the published sampling with compiled blocks: images/s, and hours of its 50,000 images."""
    steps, rows = (2, 2) if case.small else (10, 128)
    config, plan = sampled(case, name, steps, rows, precision=precision, compile=not case.small)
    models, numbers = sampler_models(case, config, PIXEL), torch.arange(rows)
    sampler = Sampler(models, plan)
    _, work = sampler.solve(numbers)  # the compiler's work
    (taken,) = interleaved({"solver": lambda: sampler.solve(numbers)}, 1 if case.small else ROUNDS).values()
    rate = rows / statistics.median(taken)
    whole = rate * plan.evaluations / plan.model_copy(update={"steps": config.sample.steps}).evaluations
    found: Found = {"batch": rows, "evaluations": work[0], "forwards an image": work[1]}
    found |= {"images/s of the published steps": whole, "hours of 50,000": 50_000 / whole / 3600}
    return {**found, **utilisation(case, work[1] * flops_of(config), rate)}


def whole_plan(case: Case) -> Found:
    """Units of a plan with SD-VAE's decoder, and their files, against the solver alone: what is not overlapped."""
    if importlib.util.find_spec("diffusers") is None:
        raise NotHereError("needs diffusers, on a GPU or not")
    steps, rows = (2, 2) if case.small else (20, 64)
    config, plan = sampled(case, "sit_xl2_ig", steps, rows, precision="bf16", compile=not case.small, num=4 * rows)
    plan = plan.model_copy(update={"unit_size": 2 * rows})
    models = sampler_models(case, config, random_vae(case))
    sampler = Sampler(models, plan)
    batches = [torch.arange(start, start + rows) for start in range(0, plan.num, rows)]
    latents, _ = sampler.solve(batches[0])
    units = iter(range(10))

    def whole() -> None:
        folder = case.folder / f"units{next(units)}"
        generate_units(models, Samples(plan, models.info, str(folder), models.tokenizer.uint8_rule))  # type: ignore[arg-type]

    def solver() -> None:
        for numbers in batches:
            sampler.solve(numbers)

    times = interleaved(
        {"solver": solver, "whole": whole, "decode": lambda: sampler.decode(latents)}, 1 if case.small else 3
    )
    solved, all_of_it, decoded = (statistics.median(taken) for taken in times.values())
    published = plan.model_copy(update={"steps": config.sample.steps}).evaluations
    return {
        "images/s": plan.num / all_of_it,
        "time / solver alone": all_of_it / solved,
        "decode ms an image": 1e3 * decoded / rows,
        "decode / solver of the published steps": decoded * len(batches) / solved * plan.evaluations / published,
    }


def random_vae(case: Case) -> Tokenizer:
    """SD-VAE's network with random weights; a narrow one on a CPU."""
    from diffusers import AutoencoderKL

    from ig_dist.autoencoders.vae import load_vae

    widths = (32,) * 4 if case.small else (128, 256, 512, 512)
    levels = {"block_out_channels": widths, "layers_per_block": 1 if case.small else 2, "latent_channels": 4}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(**levels, **kinds).save_pretrained(case.folder / "vae")
    return load_vae("random", case.folder / "vae", case.device, "tf32")


def against_published(case: Case, number: int) -> Found:
    """A case of ``benchmarks/compare.py``."""
    if case.reference is None or case.small:
        raise NotHereError("needs a GPU, and the published code with --reference")
    asked = GPU[number]
    published = Published(case.reference, compiled=True)
    results = compare.measure(asked, published, case.device, ROUNDS, record=False)
    if not results:
        raise NotHereError("the GPU has too little memory")
    found: Found = {}
    for result in results:
        low, high = result.low or 0.0, result.high or 0.0
        found[result.claim.rpartition(": ")[2]] = f"{result.ratio:.3g} ({low:.3g} to {high:.3g}), {result.limit}"
    return found


def other_tests(case: Case) -> Found:
    """The tests of ``tests/gpu`` that are not checks of this report."""
    needs_a_gpu(case)
    if importlib.util.find_spec("pytest") is None:
        raise NotHereError("pytest is not installed")
    os.environ["PYTEST_ADDOPTS"] = "-k 'not test_check'"
    sums: Counter[str] = Counter()
    for file in sorted((tally.ROOT / "gpu").glob("test_*.py")):  # a process for each: NCCL reads its settings once
        sums += tally.run_tier(tally.ROOT, f"gpu/{file.name}")[0]
    assert not sums["failed"], f"{sums['failed']} failed: see the log"
    return dict(sums)


MODELS = {"SiT-XL/2": "sit_xl2_ig", "LightningDiT-XL/1": "lightningdit_xl1_ig"}
SPEED: dict[str, tuple[int, Callable[[Case], Found]]] = {
    "memory of SiT-B/2": (30, partial(memory, name="sit_b2_ig", batch_size=128)),
    "memory of SiT-XL/2": (40, partial(memory, name="sit_xl2_ig", batch_size=32)),
    **{
        f"training {model}, batch {batch}": (100, partial(training_speed, name=name, batch_size=batch))
        for batch in BATCHES
        for model, name in MODELS.items()
    },
    **{
        f"profile of training {model}": (75, partial(profile, name=name, batch_size=64))
        for model, name in MODELS.items()
    },
    **{
        f"sampling {model}, {precision}": (90, partial(sampling_speed, name=name, precision=precision))
        for model, name in MODELS.items()
        for precision in ("bf16", "tf32")
    },
    "a plan, its decoding and writing": (120, whole_plan),
    **{
        f"published / ours: {asked.name}": (150, partial(against_published, number=number))
        for number, asked in enumerate(GPU)
    },
    "other tests of tests/gpu": (60, other_tests),
}
"""As ``CHECKS`` of ``gpu_checks``."""
