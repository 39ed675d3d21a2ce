"""PyTorch's switches: as asked for within a block, as before after it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ig_dist.arithmetic import Precision, arithmetic, switches
from ig_dist.evaluation.extractors.extractor import exact_fp32

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


def test_deterministic_algorithms_for_a_while() -> None:
    before = state()
    with switches("bf16", deterministic=True):
        assert state()[3:] == (True, True, False) and not state()[2]
    assert state() == before
    with switches("fp32"):
        assert state()[3:] == before[3:]
