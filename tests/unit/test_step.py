"""Norm, clipping, gate and update in a pass each: the numbers of the plain way, and nothing of a void step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.testing._internal.distributed.fake_pg import FakeStore

from ig_dist.config.file import config_from_tree
from ig_dist.config.training import OptimizerConfig
from ig_dist.errors import ConfigError
from ig_dist.models.dit import DiT, DiTConfig, initialize
from ig_dist.optim.optimizer import build_optimizer
from ig_dist.parallel.dist import Dist, shut_down
from ig_dist.parallel.engine import total_norm, update
from ig_dist.parallel.fsdp2 import FSDP2Engine, _check_rows
from tests.counting import Operations

SHAPES = [(6, 10), (5, 3, 2, 2), (7,), (1,)]


def parameters() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=draw) * 10.0 ** (step % 3 - 1) for shape in SHAPES]  # norms of 1, 10 and 100


@pytest.mark.parametrize("clip", [5.0, None])
def test_a_step_is_that_of_the_plain_way(clip: float | None) -> None:
    ours, plain = parameters(), parameters()
    optimizer = build_optimizer(ours, OptimizerConfig(lr=1e-2, weight_decay=0.1, grad_clip=clip))
    expected = AdamW(plain, lr=1e-2, weight_decay=0.1, fused=False, foreach=False)
    for step in range(12):
        for parameter, reference, grad in zip(ours, plain, gradients(step), strict=True):
            parameter.grad, reference.grad = grad.clone(), grad.clone()
        norm = total_norm([p.grad for p in ours if p.grad is not None])
        result = update(optimizer, norm, clip, 1e-2)
        truth = nn.utils.clip_grad_norm_(plain, clip or float("inf"))
        expected.step()
        assert result.grad_norm == pytest.approx(float(truth), rel=1e-6) and result.finite == 1
    for parameter, reference in zip(ours, plain, strict=True):
        assert parameter.grad is None
        torch.testing.assert_close(parameter, reference, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])  # whose square is not finite
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_void_step_changes_no_bit(kind: str, bad: float) -> None:
    ours = parameters()
    optimizer = build_optimizer(ours, OptimizerConfig.model_validate({"kind": kind, "lr": 1e-2}))
    for step, void in enumerate([False, True, False]):
        kept = [parameter.detach().clone() for parameter in ours]
        states = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in ours]
        for parameter, grad in zip(ours, gradients(step), strict=True):
            parameter.grad = grad
        if void:
            ours[1].grad.view(-1)[3] = bad  # type: ignore[union-attr]
        result = update(optimizer, total_norm([p.grad for p in ours if p.grad is not None]), 1.0, 1e-2)
        assert result.finite == (not void)
        for parameter, weight, state in zip(ours, kept, states, strict=True):
            assert torch.equal(parameter, weight) == void
            if void:
                assert all(torch.equal(optimizer.state[parameter][key], value) for key, value in state.items())


def test_fsdp2_gathers_a_block_twice_a_step_but_the_last_one_and_the_root_once(
    request: pytest.FixtureRequest,
) -> None:
    request.addfinalizer(shut_down)
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    shape = {"preset": "SiT-S/2", "hidden_size": 32, "num_heads": 2, "depth": 4, "aux_depth": 2}
    tree = {"model": shape, "data": {"index": "none"}, "train": {"steps": 1, "precision": "fp32"}}
    config = config_from_tree(tree, "test").with_data((4, 8, 8), 10)
    model = DiT(config.model.to_dit())
    initialize(model, 0)
    engine = FSDP2Engine(model, config, None, Dist(0, 2, 0, 2, torch.device("cpu")))
    x, t, labels = torch.randn(2, 4, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.int64)
    for _ in range(2):
        with Operations() as operations, engine.microbatch(last=True):
            output = engine.module(x, t, labels)
            engine.backward(sum(v.square().mean() for v in output if v is not None))  # type: ignore[arg-type]
    assert operations.launched["_allgather_base_"] == 2 * 3 + 1 + 1
    assert operations.launched["_reduce_scatter_base_"] == 4 + 1


def test_ranks_that_would_hold_nothing_are_refused() -> None:
    config = DiTConfig(2, 32, 2, patch_size=2, input_size=8, in_channels=4, num_classes=10, aux_depth=1)
    with torch.device("meta"):
        model = DiT(config)
    _check_rows(model, 192)  # 6 x 32 rows of the modulation
    with pytest.raises(ConfigError, match=r"193 ranks are too many .* with engine.replicate"):
        _check_rows(model, 193)
