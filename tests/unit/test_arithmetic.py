"""PyTorch's switches: as asked for within a block, as before after it."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch

from ig_dist.arithmetic import Precision, arithmetic, switches
from ig_dist.config.file import load_config
from ig_dist.errors import HangError
from ig_dist.features.extractors.extractor import exact_fp32
from ig_dist.training import trainer

CPU = torch.device("cpu")


def state() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    return (
        torch.get_float32_matmul_precision(),
        cudnn.allow_tf32,
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,
    )


INSIDE = {"fp32": ("highest", False, False), "tf32": ("high", True, False), "bf16": ("highest", False, True)}


@pytest.mark.parametrize("precision", INSIDE)
def test_each_precision(precision: Precision) -> None:
    before = state()
    with arithmetic(precision, CPU):
        assert state()[:3] == INSIDE[precision]
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert state() == before


@pytest.mark.parametrize("outer", ["tf32", "bf16"])
def test_fp32_within_another_precision(outer: Precision) -> None:
    for block in (partial(arithmetic, "fp32", CPU), partial(exact_fp32, CPU)):
        with arithmetic(outer, CPU):
            within = state()
            with pytest.raises(ZeroDivisionError), block():
                assert state()[:3] == ("highest", False, False)
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
                raise ZeroDivisionError
            assert state() == within


def test_deterministic_algorithms_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE"):
        monkeypatch.setenv(name, "as it was")
        monkeypatch.delenv(name)
    before = state()
    with switches("bf16", deterministic=False):
        assert "NCCL_NVLS_ENABLE" not in os.environ
    with switches("bf16", deterministic=True):
        assert state()[3:] == (True, True, False, False) and not state()[2]
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # else attention would stay as it is
        assert os.environ["NCCL_NVLS_ENABLE"] == "0" and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with switches("fp32"):
            assert state()[3:] == (True, True, False, False)
    assert state() == before
    with switches("fp32"):
        assert state()[3:] == before[3:]


def test_training_sets_its_switches_before_the_processes_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    def meet(*_: float) -> None:
        assert state()[:1] == ("highest",) and state()[3:] == (True, True, False, False)
        raise HangError("nobody comes")

    monkeypatch.setattr(trainer, "init_distributed", meet)  # NCCL reads its part of them once, when it begins
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE"):
        monkeypatch.setenv(name, "as it is")
    before = state()
    with pytest.raises(HangError):
        trainer.train(load_config("configs/digits.yaml", ["train.deterministic=true"]))
    assert state() == before
