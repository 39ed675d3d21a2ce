"""The arithmetic of networks on a device: the one place that sets PyTorch's switches for it.

PyTorch keeps the switches per process: a thread that wants others goes without while a block lasts, and two threads in
such blocks at once would restore each other's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["fp32", "tf32", "bf16"]
"""Of matrix products and convolutions. fp32 is fp32; tf32 rounds their factors to 10 bits on NVIDIA GPUs, as PyTorch's
convolutions do unless they are told not to, and is fp32 elsewhere; bf16 runs under autocast."""


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """A block in which networks compute in one precision, whatever the caller's is."""
    with switches(precision), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        yield


@contextmanager
def switches(precision: Precision, *, deterministic: bool | None = None) -> Iterator[None]:
    """PyTorch's switches alone, for who has an autocast of his own.

    Args:
        precision: of what autocast leaves in fp32.
        deterministic: the same bits each time, also of attention and of weight gradients on a GPU, and an error where
            a kernel cannot; None: as it is.
    """
    cudnn = torch.backends.cudnn
    products, convolutions = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    kept = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    cudnn.allow_tf32 = precision == "tf32"
    if deterministic is not None:
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA begins
        torch.use_deterministic_algorithms(deterministic)
        cudnn.deterministic, cudnn.benchmark = deterministic, False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        cudnn.allow_tf32 = convolutions
        torch.use_deterministic_algorithms(kept[0])
        cudnn.deterministic, cudnn.benchmark = kept[1:]
