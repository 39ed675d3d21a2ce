"""What only a GPU can show. Skips without one: CI has none."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ig_dist.config.training import OptimizerConfig
from ig_dist.errors import ConfigError
from ig_dist.evaluation.extractors.extractor import get_extractor
from ig_dist.evaluation.generate import generate_units, make_unit
from ig_dist.evaluation.metrics import precision_recall
from ig_dist.evaluation.units import Samples, read_unit
from ig_dist.models.dit import DiT, DiTConfig, initialize
from ig_dist.optim.apex_adam import check_apex
from ig_dist.optim.optimizer import build_optimizer, moments_of, set_state, steps_of
from ig_dist.parallel.apply import apply_compile, apply_precision
from ig_dist.parallel.sharded import update
from ig_dist.rng import Purpose, integers, normal, uniform
from ig_dist.training import preflight
from ig_dist.training.stragglers import OwnWork
from tests.conftest import run_command
from tests.distributed.test_training import final_tensors, metrics
from tests.extractors import random_inception
from tests.scoring import make_plan, tiny_models

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


def test_draws_are_those_of_the_cpu() -> None:
    ids = torch.arange(64) * 12345678901
    there = ids.cuda()
    assert torch.equal(integers(1, Purpose.NOISE, ids, 1000), integers(1, Purpose.NOISE, there, 1000).cpu())
    assert torch.equal(uniform(1, Purpose.TIME, ids, (9,)), uniform(1, Purpose.TIME, there, (9,)).cpu())
    cpu, gpu = normal(1, Purpose.NOISE, ids, (65536,)), normal(1, Purpose.NOISE, there, (65536,)).cpu()
    differ = cpu != gpu
    assert differ.double().mean() <= 1e-6
    assert torch.equal(torch.nextafter(cpu[differ], gpu[differ]), gpu[differ])  # at most one ulp


def test_blocks_compile_once() -> None:
    config = DiTConfig(
        depth=4, hidden_size=128, num_heads=4, patch_size=2, input_size=16, in_channels=4, num_classes=10, aux_depth=2
    )
    model = DiT(config)
    initialize(model, 0)
    model.cuda()
    apply_precision(model, "bf16", torch.device("cuda"))
    apply_compile(model)
    arguments = (torch.randn(8, 4, 16, 16).cuda(), torch.rand(8).cuda(), torch.arange(8).cuda())
    for _ in range(2):
        model(*arguments).velocity.sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            model(*arguments).velocity.sum().backward()


def test_the_trials_of_a_gpu_find_it_sound() -> None:
    seconds, wrong = preflight._matmul(torch.device("cuda"))
    assert not wrong
    assert 100 * 2 * 4096**3 / seconds > 1e13  # well below any GPU that trains these models
    own = OwnWork(torch.device("cuda"))
    with own.timed():
        torch.cuda._sleep(100_000_000)  # cycles
    assert 0.01 < own.take() < 1
    assert own.take() == 0


def test_resume_is_exact(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("whole", "stopped"):
        config = tiny_config(name, train={"precision": "bf16"})
        if name == "stopped":
            assert run_command(["ig-dist", "train", config, "train.steps=20"]).returncode == 0
        done = run_command(["ig-dist", "train", config])
        assert done.returncode == 0, done.stderr
    whole, stopped = (final_tensors(tmp_path / "runs" / name) for name in ("whole", "stopped"))
    for key, tensor in whole.items():
        assert torch.equal(tensor, stopped[key]), key


def test_apex_does_what_the_fused_adam_of_torch_does() -> None:
    try:
        check_apex()
    except ConfigError as error:
        pytest.skip(str(error))
    made = {}
    for kind in ("fused", "apex"):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(1000, device="cuda"))
        optimizer = build_optimizer([parameter], OptimizerConfig(implementation=kind, lr=1e-3, weight_decay=0.1))
        for step in range(8):
            kept = parameter.detach().clone()
            parameter.grad = torch.randn(1000, device="cuda")
            if step in (0, 5):
                parameter.grad[3] = float("inf")
            update(optimizer, torch.nn.utils.get_total_norm([parameter.grad]), 1.0, 1e-3 * (step + 1))
            assert torch.equal(parameter, kept) == (step in (0, 5))
            assert steps_of(optimizer) == step + 1 - (step >= 0) - (step >= 5)
            if step == 5:  # as if it were loaded: the next step goes on from here
                state = {name: moment.clone() for name, moment in moments_of(optimizer, parameter).items()}
                optimizer = build_optimizer([parameter], OptimizerConfig(implementation=kind, lr=1, weight_decay=0.1))
                set_state(optimizer, parameter, 4, state)
        made[kind] = parameter.detach()
    assert torch.allclose(made["apex"], made["fused"], rtol=1e-5, atol=1e-7)


def test_muon_on_the_gpu_follows_muon_on_the_cpu() -> None:
    made = []
    for device in ("cpu", "cuda"):
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
    for cpu, gpu in zip(*made, strict=True):  # on a GPU the iteration is in bf16
        assert (cpu - gpu).norm() < 0.05 * cpu.norm()


def test_a_run_compiles_in_its_first_step_only(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    watched = {"validate_every_steps": 10, "sample_every_steps": 25}  # compiled for themselves, and not counted
    for engine in ("ddp", "fsdp2"):
        config = tiny_config(
            engine, train={"precision": "bf16", "compile": True}, data={"validation_shards": 2}, log=watched
        )
        done = run_command(["ig-dist", "train", config, f"engine.kind={engine}"])
        assert done.returncode == 0, done.stderr
        lines = [line for line in metrics(tmp_path / "runs" / engine) if "loss" in line]
        assert [line["recompiles"] for line in lines] == [0] * 50
        assert all(2**20 < line["peak_memory_bytes"] < 2**34 for line in lines)  # of the GPU, not of the process


def test_what_is_made_beside_the_solver_is_what_is_made_alone(tmp_path: Path) -> None:
    models, info = tiny_models()
    models.model.cuda()
    plan = make_plan(num=2000, unit_size=100, batch_size=50, steps=2)
    samples = Samples(plan, info, str(tmp_path), "")
    files = generate_units(models, samples, [get_extractor("pixel", device="cuda")])
    for number in range(plan.num_units):
        beside, alone = read_unit(plan, str(tmp_path), number), make_unit(models, plan, number)
        assert all(np.array_equal(one, other) for one, other in zip(beside, alone, strict=True)), number
        features = files.read(number, "pixel", "pool")
        assert np.array_equal(features, beside.images.reshape(len(beside.images), -1) / np.float32(127.5) - 1)


def test_inception_is_that_of_the_cpu_and_repeats_itself(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(random_inception(), weights)
    images = np.random.default_rng(0).integers(0, 256, (70, 64, 64, 3), dtype=np.uint8)
    here, there, again = (
        get_extractor("inception", weights=str(weights), device=device, allow_other=True)(images)
        for device in ("cpu", "cuda", "cuda")
    )
    for name, values in here.items():
        error = (there[name].cpu() - values).abs().max() / values.abs().max()
        assert error < 1e-4 and torch.equal(there[name], again[name]), (name, error)


def test_precision_and_recall_are_those_of_the_cpu() -> None:
    random = np.random.default_rng(0)
    samples, reference = (random.standard_normal((3000, 64)).astype(np.float32) + shift for shift in (0.2, 0.0))
    here, there = (precision_recall(samples, reference, half=False, device=device) for device in ("cpu", "cuda"))
    assert there == pytest.approx(here, abs=2e-3)
