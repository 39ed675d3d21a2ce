"""The arithmetic of networks on a device: the one place that sets PyTorch's switches for it.

PyTorch keeps the switches per process: a thread that wants others goes without while a block lasts, and two threads in
such blocks at once would restore each other's.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeVar, cast

import torch
import torch.utils.deterministic

from ig_dist.arithmetic.compile_cache import keep_compiled, shared

GRAPHS = 64  # of one function in a process
F = TypeVar("F", bound=Callable[..., Any])
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
    """PyTorch's switches alone, for who has an autocast of his own; ``precision`` is of what that leaves in fp32.

    Where ``deterministic`` is not None, to be set before NCCL begins: the same bits each time, also of attention, of
    weight gradients and of sums over GPUs, and an error where a kernel cannot.
    """
    cudnn = torch.backends.cudnn
    products, convolutions = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    cudnn.allow_tf32 = precision == "tf32"
    try:
        with nullcontext() if deterministic is None else _kernels(deterministic=deterministic):
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        cudnn.allow_tf32 = convolutions


@contextmanager
def _kernels(*, deterministic: bool) -> Iterator[None]:
    """Kernels that repeat themselves, or any.

    Those of attention then take the slower of their ways backward, or raise an error, and cuDNN's, which have one way
    only, are left out; inductor chooses without trials by the clock; NCCL does not sum by NVLink SHARP, whose order
    differs from call to call.
    """
    cudnn, memory = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    before = torch.are_deterministic_algorithms_enabled()
    kept = cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA begins
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # and this when NCCL does
    _use_deterministic(deterministic)
    cudnn.deterministic, cudnn.benchmark = deterministic, False
    memory.fill_uninitialized_memory = False  # a pass over the memory of each tensor, which finds bugs and no more
    try:
        yield
    finally:
        _use_deterministic(before)
        cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = kept


def _use_deterministic(on: bool) -> None:
    if on != torch.are_deterministic_algorithms_enabled():  # it imports the compiler's settings, for a second
        torch.use_deterministic_algorithms(on)


def compiled(function: F, *, dynamic: bool | None = None) -> F:
    """A function as one compiled graph.

    PyTorch's own launcher of compiled kernels holds the interpreter's lock while the device's queue is full: behind a
    collective that hangs no thread would run, the watchdog's neither. Triton's lets go of it. A process may need many
    graphs of one function: a sweep has seeds, a pipeline calls of any size, and beyond a limit PyTorch gives up.
    """
    keep_compiled()  # before torch._dynamo, whose import chooses a folder
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    options: dict[str, str | int | bool | Callable[..., Any]] = {"use_static_cuda_launcher": False}
    return cast(F, shared(torch.compile(function, fullgraph=True, dynamic=dynamic, options=options)))
