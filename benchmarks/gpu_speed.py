"""What a step takes on a GPU: memory against the dry run, images a second. For ``benchmarks/gpu.py``."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu_cases import Case, Found, NotHereError, needs_a_gpu, small_compiler, step_config, step_of
from benchmarks.sampling import build, solver_alone
from benchmarks.train_step import seconds_per_step
from ig_dist.arithmetic import arithmetic
from ig_dist.config import Config
from ig_dist.dry_run import GIB, dry_run
from ig_dist.evaluation.plan import Plan
from ig_dist.models.presets import forward_flops
from ig_dist.training.metrics import model_flops_utilisation, peak_tflops_of
from tests import tally

ROUNDS, STEPS = 3, 5


def predicted(config: Config) -> tuple[int, int]:
    """Bytes on one GPU under DDP as the dry run says: all, and what there is between steps."""
    told = dry_run(config, gpus=1, mfu=0.4, peak_tflops=1000.0)["engines"]["ddp"]
    return told["total_bytes"], told["state_bytes"]


def memory(case: Case, name: str, batch_size: int) -> Found:
    """The most memory of an eager step against what the dry run says; it may be off by a quarter."""
    config = step_config(case, name, 2 if case.small else batch_size, compiled=False)
    expected = predicted(config)[0]
    if case.small:
        raise NotHereError(f"the dry run says {expected / GIB:.3f} GiB of a tiny model; measuring needs a GPU")
    torch.cuda.reset_peak_memory_stats(case.device)
    before = torch.cuda.memory_allocated(case.device)
    step, _ = step_of(case, config)
    for _ in range(3):
        step()
    measured = torch.cuda.max_memory_allocated(case.device) - before
    ratio = measured / expected
    found: Found = {"batch": batch_size, "GiB": measured / GIB, "dry run GiB": expected / GIB, "ratio": ratio}
    assert 0.75 <= ratio <= 1.25, found
    return found


def training_speed(case: Case, name: str) -> Found:
    """A compiled training step of a published config, in turn with the eager one, at the largest batch that fits."""
    batch_size = largest_batch(case, name)
    with small_compiler() if case.small else contextlib.nullcontext():
        compiled, flops = step_of(case, step_config(case, name, batch_size, compiled=True))
        eager, _ = step_of(case, step_config(case, name, batch_size, compiled=False))
        for step in (compiled, eager):  # compilation, optimizer state
            step()
            step()
        rounds, steps = (1, 1) if case.small else (ROUNDS, STEPS)
        pairs = [[seconds_per_step(step, steps, case.device) for step in (compiled, eager)] for _ in range(rounds)]
    seconds, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "batch": batch_size,
        "images/s": batch_size / seconds,
        "eager images/s": batch_size / plain,
        "time / eager": statistics.median(mine / theirs for mine, theirs in pairs),
        **utilisation(case, flops, batch_size / seconds),
    }


def largest_batch(case: Case, name: str) -> int:
    """256, 128 or 64: the largest with which both variants fit, as the dry run says."""
    if case.small:
        return 2
    free, _ = torch.cuda.mem_get_info(case.device)
    for batch_size in (256, 128, 64):
        total, state = predicted(step_config(case, name, batch_size, compiled=False))
        if total + state < 0.9 * free:
            return batch_size
    raise NotHereError(f"64 images need {(total + state) / GIB:.0f} GiB, and {free / GIB:.0f} are free")


def utilisation(case: Case, flops: float, images_per_s: float) -> Found:
    """MFU, and the peak that it is of."""
    mfu, peak = model_flops_utilisation(flops, images_per_s, 1, case.device, None), peak_tflops_of(case.device)
    return {} if mfu is None or peak is None else {"MFU": mfu, "of TFLOP/s": peak}


def sampling_speed(case: Case) -> Found:
    """SiT-XL/2 with IG 1.4 by Heun, no decoder, in turn with as many bare forward passes."""
    batch_size, steps = (4, 2) if case.small else (64, 8)
    size, channels = (8, 1) if case.small else (32, 4)
    models, _ = build(None if case.small else "SiT-XL/2", size, channels, "pixel", case.device)
    fields = {"num": batch_size, "labels": "balanced", "num_classes": 10, "seed": 0, "solver": "heun", "steps": steps}
    plan = Plan.model_validate(
        {
            **fields,
            "guidance": [{"kind": "ig", "scale": 1.4}],
            "precision": "bf16",
            "unit_size": batch_size,
            "batch_size": batch_size,
            "weights_sha256": "",
        }
    )
    calls: list[None] = []
    counting = models.model.register_forward_hook(lambda *_: calls.append(None))
    solver_alone(models, plan, case.device)
    counting.remove()
    x = torch.randn(batch_size, channels, size, size, device=case.device)
    t, labels = torch.rand(batch_size, device=case.device), torch.zeros(batch_size, device=case.device).long()

    def bare() -> None:
        with torch.inference_mode(), arithmetic("bf16", case.device):
            for _ in calls:
                models.model(x, t, labels)

    bare()
    pairs = [
        [seconds_per_step(way, 1, case.device) for way in (partial(solver_alone, models, plan, case.device), bare)]
        for _ in range(1 if case.small else ROUNDS)
    ]
    seconds = statistics.median(mine for mine, _ in pairs)
    return {
        "batch": batch_size,
        "evaluations": len(calls),
        "images/s": batch_size / seconds,
        "evaluations/s": batch_size * len(calls) / seconds,
        "time / bare forwards": statistics.median(mine / theirs for mine, theirs in pairs),
        **utilisation(case, len(calls) * forward_flops(models.model.config), batch_size / seconds),
    }


def other_tests(case: Case) -> Found:
    """The tests of ``tests/gpu`` that are not checks of this report."""
    needs_a_gpu(case)
    if importlib.util.find_spec("pytest") is None:
        raise NotHereError("pytest is not installed")
    os.environ["PYTEST_ADDOPTS"] = "-k 'not test_check'"
    sums: Counter[str] = Counter()
    for file in sorted((tally.ROOT / "gpu").glob("test_*.py")):  # a process for each: NCCL reads its settings once
        sums += tally.run_tier(tally.ROOT, f"gpu/{file.name}")
    assert not sums["failed"], f"{sums['failed']} failed: see the log"
    return dict(sums)


SPEED: dict[str, tuple[int, Callable[[Case], Found]]] = {
    "memory of SiT-B/2": (30, partial(memory, name="sit_b2_ig", batch_size=128)),
    "memory of SiT-XL/2": (40, partial(memory, name="sit_xl2_ig", batch_size=32)),
    "training SiT-XL/2": (100, partial(training_speed, name="sit_xl2_ig")),
    "training LightningDiT-XL/1": (100, partial(training_speed, name="lightningdit_xl1_ig")),
    "sampling SiT-XL/2": (40, sampling_speed),
    "other tests of tests/gpu": (60, other_tests),
}
"""As ``CHECKS`` of ``gpu_checks``."""
