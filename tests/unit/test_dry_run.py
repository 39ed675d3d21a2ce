"""The dry run counts what a real model keeps, and tells the published costs."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from ig_dist.config.file import load_config
from ig_dist.models.dit import DiT, DiTConfig
from ig_dist.training.dry_run import activation_bytes, dry_run
from tests.conftest import run_command

TINY = DiTConfig(
    depth=3, hidden_size=64, num_heads=2, patch_size=2, aux_depth=1, input_size=8, in_channels=4, num_classes=10
)


@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_what_autograd_keeps_of_a_real_model(bf16: bool) -> None:
    model = DiT(TINY)
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def saved(batch: int) -> int:
        sizes: dict[int, tuple[int, Tensor]] = {}  # holding the tensors keeps addresses from being used again

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(torch.zeros(batch, 4, 8, 8), torch.zeros(batch), torch.zeros(batch, dtype=torch.int64))
        assert output.velocity.requires_grad
        return sum(size for size, _ in sizes.values())

    assert activation_bytes(TINY, bf16) == pytest.approx(saved(9) - saved(8), rel=0.02)


def test_the_published_run_is_told_without_data_and_without_weights() -> None:
    command = ["ig-dist", "train", "configs/sit_xl2_ig.yaml", "--dry-run", "--gpus", "8"]
    done, as_json = run_command(command), run_command([*command, "--json"])
    assert done.returncode == as_json.returncode == 0, done.stderr + as_json.stderr
    text = done.stdout
    assert "no index there, so ImageNet is assumed: 1,281,167 samples of 4x32x32, 1000 classes" in text
    assert "711.7 GFLOP a training image" in text or "711.8 GFLOP" in text
    assert "4,003,647 steps of 256 images (800.0 epochs): 8 GPUs x 32 images x 1 micro-batches" in text
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    rows = {engine: [float(number) for number in numbers] for engine, *numbers in cells}
    totals = [rows[engine][3] for engine in ("ddp", "zero1", "zero2", "zero3", "fsdp2")]
    assert totals == sorted(set(totals), reverse=True) and totals[-1] > 0
    assert len({row[2] for row in rows.values()}) == 1
    told = json.loads(as_json.stdout)
    assert told["assumed_imagenet"] and told["steps"] == 4_003_647
    assert {name: round(sizes["total_bytes"] / 2**30, 2) for name, sizes in told["engines"].items()} == {
        name: row[3] for name, row in rows.items()
    }


def test_what_engine_and_checkpointing_change_is_told() -> None:
    def told(*overrides: str) -> dict[str, Any]:
        return dry_run(load_config("sit_xl2_ig", [*overrides, "engine.kind=fsdp2"]), gpus=8, mfu=0.4, peak_tflops=989.0)

    plain, kept = told(), told("engine.reshard_after_forward=false")
    sizes, whole = plain["engines"]["fsdp2"], kept["engines"]["fsdp2"]
    assert whole["working_bytes"] == 2 * plain["parameters"] > 10 * sizes["working_bytes"]
    assert whole["sent_bytes_per_step"] == pytest.approx(6 / 8 * sizes["sent_bytes_per_step"], rel=1e-6)
    micro = told("train.accumulation=2")["engines"]["fsdp2"]  # gradients are whole until the last micro-batch
    assert micro["working_bytes"] - sizes["working_bytes"] == 4 * 7 / 8 * plain["parameters"]
    again = told("train.activation_checkpointing=true")
    assert again["engines"]["fsdp2"]["activation_bytes"] < 0.15 * sizes["activation_bytes"]
    assert again["seconds"] == pytest.approx(4 / 3 * plain["seconds"])


def test_hsdp_shards_within_nodes_and_sends_gradients_between_them() -> None:
    def told(gpus: int, *overrides: str) -> dict[str, Any]:
        asked = ["train.global_batch_size=1024", "data.streams=512", *overrides]
        return dry_run(load_config("sit_xl2_ig", asked), gpus=gpus, mfu=0.4, peak_tflops=989.0)

    one, eight = told(8), told(64)
    assert "hsdp" not in one["engines"] and eight["replicate"] == 8
    p, sizes = eight["parameters"], eight["engines"]["hsdp"]
    assert sizes["state_bytes"] == one["engines"]["fsdp2"]["state_bytes"]  # a node is what one node alone is
    within = sizes["sent_bytes_per_step"] - sizes["sent_between_nodes_bytes_per_step"]
    assert within == pytest.approx(one["engines"]["fsdp2"]["sent_bytes_per_step"], rel=1e-6)
    assert sizes["sent_between_nodes_bytes_per_step"] == pytest.approx(7 / 8 * 8 * p / 8, rel=1e-6)
    ddp = eight["engines"]["ddp"]  # a ring through all nodes: each GPU's turn is one in eight
    assert ddp["sent_between_nodes_bytes_per_step"] == pytest.approx(63 / 64 * 8 * p / 8, rel=1e-6)
    two = told(64, "engine.kind=fsdp2", "engine.replicate=2", "train.accumulation=2")["engines"]  # groups of four nodes
    assert two["hsdp"]["state_bytes"] == sizes["state_bytes"] // 4
    assert two["hsdp"]["sent_bytes_per_step"] == pytest.approx(31 / 32 * 16 * p + 1 / 2 * 8 * p / 32, rel=1e-6)
    muon = told(64, "optimizer.kind=muon")["engines"]
    assert muon["ddp"]["sent_bytes_per_step"] == pytest.approx(1.5 * ddp["sent_bytes_per_step"], rel=1e-2)


def test_muon_keeps_one_moment_of_a_matrix() -> None:
    state = {}
    for kind in ("adamw", "muon"):
        config = load_config("configs/sit_xl2_ig.yaml", [f"optimizer.kind={kind}"])
        told = dry_run(config, gpus=8, mfu=0.4, peak_tflops=989.0)["engines"]
        state[kind] = {engine: round(sizes["state_bytes"] / 2**30, 2) for engine, sizes in told.items()}
    assert state["muon"].keys() == {"ddp", "fsdp2"} < state["adamw"].keys()
    with torch.device("meta"):
        model = DiT(load_config("configs/sit_xl2_ig.yaml").with_data((4, 32, 32), 1000).model.to_dit())
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    for engine, share in (("ddp", 1), ("fsdp2", 8)):
        saved = state["adamw"][engine] - state["muon"][engine]
        assert saved == pytest.approx(4 * matrices / 2**30 / share, abs=0.011)


def test_processes_that_do_not_divide_are_refused() -> None:
    done = run_command(["ig-dist", "train", "configs/sit_xl2_ig.yaml", "--dry-run", "--gpus", "7"])
    assert done.returncode == 2 and "7 processes do not divide data.streams 256" in done.stderr


def test_acceleration_by_the_ema_costs_a_forward_more() -> None:
    def gflop(*overrides: str) -> float:
        told = dry_run(load_config("configs/sit_b2_ig.yaml", overrides), gpus=8, mfu=0.4, peak_tflops=989.0)
        return float(told["flops_per_image"])

    plain = gflop()
    assert gflop("loss.acceleration.weight=0.5") == plain
    assert gflop("loss.acceleration={weight: 0.5, source: ema}") == pytest.approx(4 / 3 * plain, rel=0.01)
