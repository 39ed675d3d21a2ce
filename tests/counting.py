"""What a step asks of its device: operations that it launches, and those for which the host waits.

On a GPU the profiler counts what CUDA was asked for. Without one a dispatch mode sees each eager operation and names
those that would wait for a GPU; the meta device stands in for it where the way there is in question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITING = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "repeat_interleave"),
    *("_unique2", "unique_dim", "unique_consecutive"),
}
_BY_MASK = {"index", "index_put", "index_put_", "_index_put_impl_"}
_ALLOCATING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_OVERWRITING = {"zero_", "fill_", "copy_", "_foreach_zero_", "_foreach_copy_"}
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemset")
_SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")


class Counts(NamedTuple):
    """Of one step."""

    launches: float
    """Kernels and fills on a GPU; on a CPU eager operations other than views."""
    copies: float
    """Copies between and within devices on a GPU, also those that do not wait; 0 on a CPU."""
    syncs: float
    """How often the host waits for the device; on a CPU: would wait, were it a GPU."""


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the eager operations within the block, forward and backward."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launched: Counter[str] = Counter()
        """By name; views launch nothing and are left out."""
        self.waits: list[str] = []
        """What would make the host wait for a GPU, in order."""
        self.bytes = 0
        """Read and written, each operation alone; views move nothing."""
        self._made = _MadeOfNumbers(self.waits)

    def __enter__(self) -> Self:
        self._made.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._made.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.partition("::")[2]
        counts = not func.is_view and name not in _ALLOCATING
        if counts:
            self.launched[name] += 1
        if name in _WAITING or (name in _BY_MASK and any(map(_is_mask, tree_leaves(args[1])))):
            self.waits.append(name)
        out = func(*args, **kwargs)
        if counts:
            self.bytes += _moved(func, args, kwargs, out)
        if name in ("_to_copy", "copy_") and not (kwargs.get("non_blocking") or True in args[2:3]):
            source, target = (args[0], out) if name == "_to_copy" else (args[1], args[0])
            if source.device != target.device:
                self.waits.append(f"{name} from {source.device} to {target.device}")
        return out

    @property
    def launches(self) -> int:
        """All of them."""
        return sum(self.launched.values())


def count(step: Callable[[], object], device: torch.device, steps: int = 3) -> Counts:
    """What ``step`` asks of the device, as a mean of some calls. It must have run before: first times cost more.

    On a GPU a call that waits raises an error where PyTorch knows of it, as ``torch.cuda.set_sync_debug_mode`` has it.
    """
    if device.type != "cuda":
        with Operations() as operations:
            for _ in range(steps):
                step()
        return Counts(operations.launches / steps, 0.0, len(operations.waits) / steps)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize(device)
    mode = torch.cuda.get_sync_debug_mode()
    with torch.profiler.profile(activities=activities) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.profiler.record_function("counted steps"):
                for _ in range(steps):
                    step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.synchronize(device)
    events = profile.events()
    block = next(event.time_range for event in events if event.name == "counted steps")
    names = [event.name for event in events if block.start <= event.time_range.start < block.end]
    asked = {
        "launches": sum(name.startswith(_LAUNCHES) for name in names),
        "copies": sum(name.startswith("cudaMemcpy") for name in names),
        "syncs": sum(name in _SYNCS or name == "cudaMemcpy" for name in names),
    }
    return Counts(**{what: number / steps for what, number in asked.items()})


class _MadeOfNumbers(TorchFunctionMode):
    """Sees tensors made of Python's numbers on a device, which dispatch modes do not."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and out.device.type != "cpu" and not isinstance(args[0], Tensor):
            self._waits.append(f"{func.__name__} on {out.device}")
        return out


def _is_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that an operation reads and writes."""
    moved = 0
    for number, argument in enumerate(func._schema.arguments):
        given = args[number] if number < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        if argument.name == "grads":  # of fused optimizers, which write what they have divided
            written = kwargs.get("grad_scale") is not None
        read = not (written and func._schema.name.rpartition("::")[2] in _OVERWRITING)
        moved += (read + written) * _size(given)
    in_place = any(returned.alias_info is not None for returned in func._schema.returns)
    return moved if in_place else moved + _size(out)


def _size(given: Any) -> int:
    return sum(tensor.nbytes for tensor in tree_leaves(given) if isinstance(tensor, Tensor))
