"""Bytes and FLOPs of each kernel of a block, forward and backward, eager and compiled, against a GPU's roofline.

    python benchmarks/roofline.py --preset SiT-XL/2 --batch-size 256

Nothing is computed: eager kernels are counted on fake tensors, compiled ones are those that inductor's scheduler makes
for Triton, which needs neither a GPU nor Triton. A kernel takes the longer of its bytes at the memory's speed (each
tensor read or written once) and its FLOPs at the peak; launches and the rest of a step are not in it, so that real time
is longer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, cast
from unittest import mock

import torch
import typer
from rich.table import Table
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ig_dist.models.dit import DiT, DiTConfig
from ig_dist.models.presets import PRESETS
from ig_dist.terminal import console, run_app

PEAK_FLOPS, BYTES_PER_SECOND = 989e12, 3.35e12
"""Of an H100 SXM: dense bf16, HBM3."""
Residual = Literal["fp32", "bf16"]


class Kernel(NamedTuple):
    """One kernel: its name, the bytes that it reads and writes, its FLOPs."""

    name: str
    bytes: int
    flops: int

    @property
    def seconds(self) -> float:
        """The least time that it can take."""
        return max(self.bytes / BYTES_PER_SECOND, self.flops / PEAK_FLOPS)


def main(
    preset: Annotated[str, typer.Option(help="Model size.")] = "SiT-XL/2",
    batch_size: Annotated[int, typer.Option(help="Images on a GPU.")] = 256,
    residual: Annotated[Residual, typer.Option(help="Of the tokens between blocks.")] = "fp32",
    blocks: Annotated[int, typer.Option(help="Blocks in one graph, as in a whole-model compile.")] = 1,
) -> None:
    """Show the kernels of a block and what time and MFU they allow."""
    for form, kernels in count(preset, batch_size, residual, blocks).items():
        table = Table("kernel", "calls", "GB", "GFLOP", "bound", "ms", title=f"{preset}, batch {batch_size}, {form}")
        for name in sorted(
            {k.name for k in kernels}, key=lambda name: -sum(k.seconds for k in kernels if k.name == name)
        ):
            table.add_row(*row(name, [k for k in kernels if k.name == name]))
        table.add_row(*row("a block", kernels, blocks))
        console.print(table)
        seconds = sum(kernel.seconds for kernel in kernels) / blocks
        flops = sum(kernel.flops for kernel in kernels) / blocks
        depth = PRESETS[preset].depth
        console.print(
            f"{depth} blocks: {1e3 * depth * seconds:.1f} ms, MFU at most {flops / seconds / PEAK_FLOPS:.1%}\n"
        )


def row(name: str, kernels: Sequence[Kernel], blocks: int = 1) -> list[str]:
    """A line of the table: sums, divided by the number of blocks."""
    moved, flops, seconds = (sum(getattr(k, part) for k in kernels) / blocks for part in ("bytes", "flops", "seconds"))
    bound = "FLOPs" if flops / PEAK_FLOPS > moved / BYTES_PER_SECOND else "bytes"
    return [
        name,
        f"{len(kernels) / blocks:g}",
        f"{moved / 1e9:.2f}",
        f"{flops / 1e9:,.0f}",
        bound,
        f"{1e3 * seconds:.3f}",
    ]


def count(preset: str, batch_size: int, residual: Residual = "fp32", blocks: int = 1) -> dict[str, list[Kernel]]:
    """Kernels of a forward and backward pass of blocks under bf16 autocast, eager and compiled."""
    sit = preset.startswith("SiT")
    size, channels = (32, 4) if sit else (16, 32)
    config = DiTConfig(
        **PRESETS[preset]._replace(depth=blocks)._asdict(),
        input_size=size,
        in_channels=channels,
        num_classes=1,
        aux_depth=None,
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = {"eager": eager_kernels(*chain(config, batch_size, residual))}
    return {**found, "compiled": compiled_kernels(*chain(config, batch_size, residual))}


def chain(
    config: DiTConfig, batch_size: int, residual: Residual
) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    """Blocks after each other as a function of tokens and condition, and these. Their memory is never touched."""
    with torch.device("meta"):
        model = DiT(config)
    weights = {name: torch.empty_like(tensor, device="cpu") for name, tensor in model.blocks.state_dict().items()}
    model.blocks.load_state_dict(weights, assign=True)
    blocks, rope = model.blocks, None
    if model.feat_rope is not None:
        rope = tuple(torch.empty(config.grid_size**2, config.head_width) for _ in range(2))

    def run(tokens: Tensor, condition: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            for block in blocks:
                tokens = block(tokens, condition, rope)
        return tokens

    kind = torch.bfloat16 if residual == "bf16" else torch.float32
    shape = (batch_size, config.grid_size**2, config.hidden_size)
    tokens = torch.empty(shape, dtype=kind, requires_grad=True)
    return run, tokens, torch.empty(batch_size, config.hidden_size, requires_grad=True)


class _Eager(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the kernels that run, with the bytes of their arguments and results; views are free."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        read, made = (
            {place(t): t for t in tree_leaves(values) if isinstance(t, Tensor)} for values in ((args, kwargs), out)
        )
        if {storage for storage, _ in made} - {storage for storage, _ in read} or op._schema.is_mutable:
            moved = sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in (read | made).values())
            name = op.overloadpacket.__name__
            if "empty" not in name:
                self.kernels.append(Kernel(short(name), moved, flops_of(op, args, kwargs or {}, out)))
        return out


def place(tensor: Tensor) -> tuple[int, int]:
    """What tells a tensor's memory from others': parts of one storage are read one by one."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def eager_kernels(run: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, condition: Tensor) -> list[Kernel]:
    """What PyTorch launches without a compiler."""
    counted = _Eager()
    with counted:
        out = run(tokens, condition)
        out.backward(torch.empty_like(out))  # type: ignore[no-untyped-call]
    return counted.kernels


class EnoughError(Exception):
    """The kernels are known: no code is wanted."""


def compiled_kernels(run: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, condition: Tensor) -> list[Kernel]:
    """What inductor's scheduler fuses for Triton, of the forward and the backward graph."""
    from torch._inductor import config as inductor
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.graph import GraphLowering

    kernels: list[Kernel] = []
    schedule = GraphLowering._update_scheduler

    def collect(graph: GraphLowering) -> None:
        schedule(graph)
        kernels.extend(scheduled(graph.scheduler.nodes))
        raise EnoughError

    def counted(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        (results,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
        shapes = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in results]
        known = len(kernels)
        try:
            compile_fx_inner(graph, inputs, **options)
        except Exception:
            if len(kernels) == known:  # another error than that the kernels are known
                raise

        def blank(_: list[Any]) -> list[Any]:  # what the kernels would return, of untouched memory
            return [
                torch.empty_strided(s.shape, s.stride(), dtype=s.dtype) if isinstance(s, Tensor) else s for s in shapes
            ]

        blank._boxed_call = True  # type: ignore[attr-defined]
        return blank

    torch.compiler.reset()  # shapes of an earlier count are no reason to keep these open
    triton = inductor.patch(cpu_backend="triton", force_disable_caches=True)
    with mock.patch.object(GraphLowering, "_update_scheduler", collect), triton:
        out = torch.compile(
            run, fullgraph=True, dynamic=False, backend=partial(compile_fx, inner_compile=cast(Any, counted))
        )(tokens, condition)
        out.backward(torch.empty_like(out))  # type: ignore[no-untyped-call]
    return kernels


def scheduled(nodes: Sequence[Any]) -> list[Kernel]:
    """Kernels of a schedule: fused ones, and those of libraries."""
    from torch._inductor import scheduler
    from torch._inductor.ir import MultiOutput
    from torch._inductor.utils import get_fused_kernel_name

    kernels: list[Kernel] = []
    for node in nodes:
        if isinstance(node, scheduler.NopKernelSchedulerNode):
            continue
        if isinstance(node.node, MultiOutput):  # a result of the library's kernel before it
            layout = node.node.get_layout()
            made = int(torch.Size(layout.size).numel()) * layout.dtype.itemsize
            kernels[-1] = kernels[-1]._replace(bytes=kernels[-1].bytes + made)
            continue
        origins = node.node.get_origins() if node.node is not None else ()
        library = isinstance(node, scheduler.ExternKernelSchedulerNode)
        name = short(get_fused_kernel_name(node.get_nodes(), "original_aten").removeprefix("fused_"))
        flops = sum(flops_of(o.target, *values(o)) for o in origins) if library else 0
        kernels.append(Kernel(name if library else f"fused: {name}", node.get_read_write_buffers_sizes(), flops))
    return kernels


def values(node: torch.fx.Node) -> tuple[Any, Any, Any]:
    """Arguments and result of a node of a graph, as fake tensors."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return args, kwargs, node.meta["val"]


def flops_of(op: Any, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs of an operator, 2 per multiply-accumulate; 0 of what is no product."""
    packet = getattr(op, "overloadpacket", None)
    if packet is None:
        return 0
    name = packet.__name__
    if name.startswith("_scaled_dot_product"):  # 2 products forward, 5 backward
        backward = "backward" in name
        batch, heads, tokens, width = args[1 if backward else 0].shape
        return int(2 * (5 if backward else 2) * batch * heads * tokens * tokens * width)
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


def short(name: str) -> str:
    """A kernel's name without what does not tell."""
    if "scaled_dot_product" in name:
        return "attention backward" if "backward" in name else "attention"
    if re.search(r"(^|_)(add)?mm(_|$)", name):
        return "matrix product"
    return (
        re.sub(r"_?\b(?:_?(?:to_copy|view|unsqueeze|squeeze|split|transpose|t)(?=_|$))+", "", name).strip("_") or "cast"
    )


if __name__ == "__main__":
    run_app(main)
