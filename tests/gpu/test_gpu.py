"""What only a GPU can show. Skips without one: CI has none."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ig_dist.models.dit import DiT, DiTConfig, initialize
from ig_dist.parallel.apply import apply_compile, apply_precision
from ig_dist.rng import Purpose, integers, normal, uniform
from tests.conftest import run_command
from tests.distributed.test_training import final_tensors, metrics

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
