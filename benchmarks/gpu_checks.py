"""What a GPU must show before hours are spent on it. ``benchmarks/gpu.py`` runs the checks, ``tests/gpu`` too.

A check raises AssertionError with what is wrong, ``NotHereError`` with what is missing, and returns what it has found.
On a CPU most of them run in a small form, which shows that they run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import ig_dist
from benchmarks.gpu_cases import Case, Found, NotHereError, needs_a_gpu, small_compiler, step_config
from benchmarks.synthetic import synthetic_info
from ig_dist.arithmetic import Precision, arithmetic, switches
from ig_dist.config.file import apply_overrides, config_from_tree
from ig_dist.config.training import EngineConfig, OptimizerConfig
from ig_dist.data.index import read_index
from ig_dist.data.stream import Batch, BatchStream
from ig_dist.diffusion.loss import ig_loss
from ig_dist.errors import ConfigError
from ig_dist.models.dit import DiT, initialize
from ig_dist.optim.optimizer import build_optimizer, check_apex, moments_of, set_state, steps_of
from ig_dist.parallel.build import build_engine
from ig_dist.parallel.dist import ensure_process_group, shut_down, sum_over_ranks
from ig_dist.parallel.engine import update
from ig_dist.rng import Purpose, integers, normal, uniform
from ig_dist.training import trainer
from ig_dist.training.learner import EMA, Learner, train_step
from ig_dist.training.meter import Meter
from ig_dist.training.objective import TaskMaker, open_reader
from ig_dist.training.phases import Phases
from tests import golden
from tests.counting import count

FP32, BF16 = 1e-4, 2e-2
"""Bounds on the error against the recorded numbers: of each number, absolute or relative; of each tensor's norm."""
HALF, WHOLE = 8, 16
"""Steps of a training run."""


def recorded_numbers(case: Case, precision: Precision) -> Found:
    """Forward and losses of the published SiT + IG and LightningDiT + IG against their recorded numbers."""
    found: Found = {}
    for name, published, answers in (
        ("SiT", golden.sit(case.golden), golden.sit_answers),
        ("LightningDiT", golden.lightningdit(case.golden), golden.lightningdit_answers),
    ):
        published.model.to(case.device)
        with arithmetic(precision, case.device):
            errors = {what: distance(ours, recorded, precision) for what, ours, recorded in answers(published)}
        worst = max(errors, key=errors.__getitem__)
        bound = BF16 if precision == "bf16" else FP32
        assert errors[worst] <= bound, f"{name}, {worst}: off by {errors[worst]:.1e}, more than {bound:g}"
        found[f"{name}, largest error"] = errors[worst]
    return found


def distance(ours: Tensor, recorded: Tensor, precision: Precision) -> float:
    """Of bf16 the relative error of the norm, else the largest of one number."""
    ours, recorded = ours.double(), recorded.double()
    if precision == "bf16":
        return float((ours - recorded).norm() / recorded.norm())
    return float(((ours - recorded).abs() / (1 + recorded.abs())).max())


def draws(case: Case) -> Found:
    """Philox on the GPU is that of the CPU: bits and uniforms equal, normals at most one ulp apart in 1e-6 of them."""
    needs_a_gpu(case)
    ids = torch.arange(64) * 12345678901
    there = ids.to(case.device)
    assert torch.equal(integers(1, Purpose.NOISE, ids, 1000), integers(1, Purpose.NOISE, there, 1000).cpu())
    assert torch.equal(uniform(1, Purpose.TIME, ids, (9,)), uniform(1, Purpose.TIME, there, (9,)).cpu())
    cpu, gpu = normal(1, Purpose.NOISE, ids, (65536,)), normal(1, Purpose.NOISE, there, (65536,)).cpu()
    differ = cpu != gpu
    share = float(differ.double().mean())
    assert share <= 1e-6, f"{share:.1e} of the normals differ"
    assert torch.equal(torch.nextafter(cpu[differ], gpu[differ]), gpu[differ]), "normals are more than an ulp apart"
    return {"normals an ulp apart": int(differ.sum()), "of": differ.numel()}


def compiled_draws(case: Case) -> Found:
    """What is asked of the model is the same to the bit whether its draws are compiled or not."""
    needs_a_gpu(case)
    info = synthetic_info(4, 32, 1000)
    numbers = torch.arange(256, device=case.device)
    batch = Batch(torch.ones(256, *info.latent.stored_shape).half(), numbers, numbers, numbers, numbers)
    eager, compiled = (
        TaskMaker(step_config(case, "sit_xl2_ig", 256, compiled=way), info, case.device)(batch) for way in (False, True)
    )
    for name, ours, theirs in zip(eager._fields, eager, compiled, strict=True):
        share = float((ours != theirs).double().mean())
        assert torch.equal(ours, theirs), f"{name}: {share:.1e} of the numbers differ"
    return {"numbers": sum(field.numel() for field in eager)}


def waits(case: Case) -> Found:
    """A step as the trainer makes it, compiled on a GPU, waits for nothing; how many operations it launches."""
    config = config_from_tree(apply_overrides(run_tree(case, "none"), [f"train.compile={not case.small}"]), "benchmark")
    index = read_index(config.data.index)
    config = config.with_data(index.info.latent.shape, len(index.info.classes))
    model = DiT(config.model.to_dit())
    initialize(model, 0)
    engine = build_engine(model, config, None, case.dist)
    ema = EMA(engine.masters(), config.ema.decays, engine.masters_written)
    to_task, meter = TaskMaker(config, index.info, case.device), Meter(config, model, case.dist, Phases())
    meter.phases.last_warm_up = 1
    meter.phases.enter("data", 2)
    learner = Learner(config, model, engine, ema, to_task, meter)
    stream = BatchStream(index, trainer.build_order(config, index, case.dist), reader=open_reader(index, config))
    batch = stream.get()
    stream.close()
    assert batch is not None
    if not case.small:
        for part in (batch, batch.split(2)[1]):
            assert part.latents.is_pinned() and part.labels.is_pinned() and part.positions.is_pinned()

    def step() -> None:
        train_step(learner, batch, 3, 1e-4)

    for _ in range(3):
        step()
    counts = count(step, case.device)
    if case.small:
        return {"launches": counts.launches, "waits": "need a GPU"}
    assert counts.syncs == 0, f"the host waits for the device {counts.syncs:g} times a step"
    return {"waits": counts.syncs, "launches": counts.launches, "copies": counts.copies}


def train(case: Case, name: str, *overrides: str) -> Path:
    """A training run on the digits, compiled and deterministic; goes on where it is."""
    with small_compiler() if case.small else contextlib.nullcontext():
        return ig_dist.train(run_tree(case, name), *overrides)


def run_tree(case: Case, name: str) -> dict[str, Any]:
    """The config of a run on the digits, on a GPU of B/2's width."""
    depth, width, heads = (3, 32, 2) if case.small else (6, 768, 12)
    data = ig_dist.encode("digits", case.folder / "digits")
    return {
        "run": {"dir": str(case.folder / name)},
        "model": {"depth": depth, "hidden_size": width, "num_heads": heads, "patch_size": 4, "aux_depth": 1},
        "data": {"index": data, "streams": 8, "window_samples": 32, "workers": 1, "validation_shards": 2},
        "train": {"steps": WHOLE, "global_batch_size": 32, "precision": "bf16", "compile": True, "deterministic": True},
        "optimizer": {"lr": 1e-3},
        "ema": {"decays": [0.99, 0.9]},
        "checkpoint": {"every_steps": HALF, "keep_last": 9},
        "sample": {"num": 8, "steps": 2, "batch_size": 8, "unit_size": 8},
        "log": {"every_steps": 4, "validate_every_steps": 6, "sample_every_steps": WHOLE},
    }


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """Weights, averages and moments that a run saved at a step."""
    (file,) = (run / "checkpoints" / f"step_{step:010d}").glob("rank_*.safetensors")
    return safetensors.torch.load_file(file)


def assert_equal(expected: dict[str, Tensor], found: dict[str, Tensor]) -> Found:
    """Bitwise."""
    assert expected.keys() == found.keys()
    wrong = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    assert not wrong, f"{len(wrong)} of {len(expected)} tensors differ: {', '.join(wrong[:3])}"
    return {"tensors": len(expected), "MB": round(sum(tensor.nbytes for tensor in expected.values()) / 1e6, 1)}


def recompiles(case: Case) -> Found:
    """A run compiles in its first step only, validation and sampling beside it, under DDP and FSDP2."""
    total = 0
    for engine in ("ddp", "fsdp2"):
        run = train(case, "whole" if engine == "ddp" else engine, f"engine.kind={engine}")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if "loss" in line]
        assert len(lines) == WHOLE // 4
        assert all(math.isfinite(line["loss"]) for line in lines)
        total += sum(line["recompiles"] for line in lines)
        if not case.small:  # of the GPU, not of the process
            assert all(2**20 < line["peak_memory_bytes"] < 2**34 for line in lines)
    assert total == 0, f"{total} recompiles after the first step"
    return {"recompiles": 0, "steps": 2 * WHOLE}


def snapshot(case: Case) -> Found:
    """What was saved while steps went on is what a run holds that ends there."""
    return assert_equal(
        tensors(train(case, "whole"), HALF), tensors(train(case, "stopped", f"train.steps={HALF}"), HALF)
    )


def resume(case: Case) -> Found:
    """A run that was stopped in the middle ends like one that was not, bitwise."""
    train(case, "stopped", f"train.steps={HALF}")
    return assert_equal(tensors(train(case, "whole"), WHOLE), tensors(train(case, "stopped"), WHOLE))


def follows(case: Case, kind: str, **engine: Any) -> Found:
    """An engine of one rank, over NCCL on a GPU, makes the steps that are made without any group of processes.

    Args:
        case: where.
        kind: of the engine.
        engine: more keys of its config.
    """
    if kind == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise NotHereError("deepspeed is not installed")
    if missing := engine.keys() - EngineConfig.model_fields.keys():
        raise NotHereError(f"there is no engine.{', '.join(missing)}")
    alone = {precision: losses(case, precision, "ddp") for precision in ("fp32", "bf16")}
    ensure_process_group(case.dist)
    found: Found = {}
    try:
        total = torch.ones(3, device=case.device)
        torch.distributed.all_reduce(total)
        assert total.tolist() == [1.0] * 3
        for precision, bound in (("fp32", 1e-5), ("bf16", BF16)):
            pairs = list(zip(alone[precision], losses(case, precision, kind, **engine), strict=True))
            worst = max(abs(theirs / mine - 1) for mine, theirs in pairs)
            assert worst <= bound, f"{precision}: losses {pairs} differ by {worst:.1e}"
            assert pairs[-1][1] < 0.9 * pairs[0][1], f"{precision}: it does not learn: {pairs}"
            found[f"{precision} losses, largest relative difference"] = worst
    finally:
        shut_down()
    return found


def losses(case: Case, precision: str, kind: str, **engine: Any) -> list[float]:
    """Losses of six steps of a small model."""
    info = synthetic_info(4, 8, 10)
    tree: dict[str, Any] = {
        "model": {"depth": 3, "hidden_size": 64, "num_heads": 2, "patch_size": 2, "aux_depth": 1},
        "data": {"index": "synthetic", "streams": 1},
        "train": {"steps": 1, "global_batch_size": 8, "precision": precision},
        "engine": {"kind": kind, **engine},
    }
    config = config_from_tree(tree, "benchmark").with_data(info.latent.shape, len(info.classes))
    model = DiT(config.model.to_dit())
    initialize(model, 0)
    ids = torch.arange(8, device=case.device)
    x_t, velocity = (normal(0, purpose, ids, (4, 8, 8)) for purpose in (Purpose.NOISE, Purpose.POSTERIOR))
    t = uniform(0, Purpose.TIME, ids).float()
    with switches("fp32"):
        built = build_engine(model, config, None, case.dist)
        found = []
        for _ in range(6):
            with built.microbatch(last=True):
                loss = ig_loss(built.module(x_t, t, ids), velocity, aux_weight=0.5).total.mean()
                built.backward(loss)
            assert built.step(1e-2).finite
            found.append(float(sum_over_ranks(loss.detach(), case.dist)))
    return found


def apex(case: Case) -> Found:
    """FusedAdam of apex makes the steps of torch's fused Adam, leaves out the same ones, and goes on from a state."""
    try:
        check_apex()
    except ConfigError as error:
        raise NotHereError(str(error)) from None
    made = {}
    for kind in ("fused", "apex"):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(1000, device=case.device))
        config = OptimizerConfig.model_validate({"implementation": kind, "lr": 1e-3, "weight_decay": 0.1})
        optimizer = build_optimizer([parameter], config)
        for step in range(8):
            kept = parameter.detach().clone()
            parameter.grad = torch.randn(1000, device=case.device)
            if step in (0, 5):
                parameter.grad[3] = float("inf")
            update(optimizer, torch.nn.utils.get_total_norm([parameter.grad]), 1.0, 1e-3 * (step + 1))
            assert torch.equal(parameter, kept) == (step in (0, 5))
            assert steps_of(optimizer) == step + 1 - (step >= 0) - (step >= 5)
            if step == 5:  # as if it were loaded: the next step goes on from here
                state = {name: moment.clone() for name, moment in moments_of(optimizer, parameter).items()}
                optimizer = build_optimizer([parameter], config)
                set_state(optimizer, parameter, 4, state)
        made[kind] = parameter.detach()
    torch.testing.assert_close(made["apex"], made["fused"], rtol=1e-5, atol=1e-7)
    return {"largest difference": float((made["apex"] - made["fused"]).abs().max())}


def muon(case: Case) -> Found:
    """Muon, whose iteration is in bf16 on a GPU, follows Muon on the CPU."""
    needs_a_gpu(case)
    made = []
    for device in (torch.device("cpu"), case.device):
        generator = torch.Generator().manual_seed(0)
        shapes = [(96, 32), (32, 96), (7,)]
        parameters = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in shapes]
        start = [parameter.detach().cpu().clone() for parameter in parameters]
        optimizer = build_optimizer(parameters, OptimizerConfig.model_validate({"kind": "muon", "lr": 1e-2}))
        for _ in range(5):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            update(optimizer, norm, 1.0, 1e-2)
        made.append([p.detach().cpu() - first for p, first in zip(parameters, start, strict=True)])
    errors = [float((gpu - cpu).norm() / cpu.norm()) for cpu, gpu in zip(*made, strict=True)]
    assert max(errors) < 0.05, errors
    return {"largest relative difference": max(errors)}


CHECKS: dict[str, tuple[int, Callable[[Case], Found]]] = {
    "golden numbers, fp32 without TF32": (30, partial(recorded_numbers, precision="fp32")),
    "golden numbers, bf16": (20, partial(recorded_numbers, precision="bf16")),
    "Philox on CPU and GPU": (20, draws),
    "draws, compiled": (60, compiled_draws),
    "recompiles after the first step": (120, recompiles),
    "waits and launches of a step": (90, waits),
    "snapshot while steps go on": (60, snapshot),
    "resume, bitwise": (60, resume),
    "DDP of one rank": (40, partial(follows, kind="ddp")),
    "FSDP2 of one rank": (40, partial(follows, kind="fsdp2")),
    "HSDP of one rank": (40, partial(follows, kind="fsdp2", replicate=1)),
    "DeepSpeed of one rank": (60, partial(follows, kind="deepspeed")),
    "apex": (30, apex),
    "Muon in bf16": (20, muon),
}
"""Seconds that each may take on an H100, and the check; in the order in which they run."""
