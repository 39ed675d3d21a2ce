"""What a save costs the training loop: in the background against at once, side by side in one run.

    python benchmarks/checkpoint.py              # to a disk; to S3 too where Ceph's radosgw is installed
    python benchmarks/checkpoint.py --megabytes 1000 --rounds 9

Each round saves the same state in both ways while the loop computes, and takes the time for which the loop stands
still. Then the average (EMA) and the optimizer, each over all tensors at once and tensor by tensor, beside a step.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the S3 server of the tests

import torch
import typer
from torch import Tensor

from ig_dist.checkpoints.saving import Saver
from ig_dist.checkpoints.store import CheckpointStore, Piece
from ig_dist.config.model import ModelConfig
from ig_dist.export import ALONE
from ig_dist.models.dit import DiT
from ig_dist.terminal import run_app
from ig_dist.training.ema import EMA


def state(megabytes: int) -> dict[str, Piece]:
    """Tensors of 4 MB each."""
    tensors = {f"model/{i}": torch.randn(10**6) for i in range(megabytes // 4)}
    return {name: Piece(tuple(tensor.shape), 0, tensor) for name, tensor in tensors.items()}


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def stalls(url: str, pieces: dict[str, Piece], rounds: int) -> list[tuple[float, float, float]]:
    """Of each round: the stall in the background, that of a save at once, and the time of the write behind it."""
    saver = Saver(CheckpointStore(url, keep_last=1), ALONE)
    step, measured = 0, []
    weights = torch.randn(512, 512)
    for number in range(rounds + 1):
        step += 1
        behind = seconds(lambda: saver.save(step, pieces, {"optimizer_steps": step}))  # noqa: B023
        while saver.busy:  # the loop goes on, and takes its share of the cores
            weights = torch.tanh(weights @ weights.T / 512)
        written = saver.write_s or 0.0
        step += 1

        def save_and_wait(step: int = step) -> None:
            saver.save(step, pieces, {"optimizer_steps": step})
            saver.wait()

        at_once = seconds(save_and_wait)
        if number:  # the first round fills the buffers
            measured.append((behind, at_once, written))
    return measured


def report_stalls(name: str, measured: list[tuple[float, float, float]]) -> None:
    """The medians."""
    behind, at_once, written = (1000 * statistics.median(column) for column in zip(*measured, strict=True))
    ratios = [b / a for b, a, _ in measured]
    print(
        f"{name:5s} stall {behind:5.0f} ms in the background, {at_once:5.0f} ms at once:"
        f" ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f});"
        f" written behind the loop in {written:.0f} ms"
    )


@contextmanager
def object_store(kind: Literal["memstore", "bluestore"] = "memstore") -> Iterator[str]:
    """A folder on a real S3 server, in this process's environment; empty where there can be none."""
    from tests.object_store import ObjectStore, available

    if reason := available():
        print(f"no S3: {reason}")
        yield ""
        return
    with tempfile.TemporaryDirectory() as folder, ObjectStore(Path(folder), kind) as store:
        os.environ.update(store.environment())
        store.create_bucket("benchmark")
        yield "s3://benchmark/checkpoints"


def updates(preset: str, batch_size: int, rounds: int) -> None:
    """The shares of EMA and optimizer in a step of training."""
    shape = {"input_size": 32, "in_channels": 4, "num_classes": 1000}
    config = ModelConfig.model_validate({"preset": preset, "aux_depth": 2, **shape}).to_dit()
    model = DiT(config)
    x_t, t, labels = torch.randn(batch_size, 4, 32, 32), torch.rand(batch_size), torch.zeros(batch_size).long()

    def passes() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x_t, t, labels)
        out.velocity.float().square().mean().backward()

    passes()
    weights: dict[str, Tensor] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    average, one = EMA(weights, [0.9999]), torch.ones(())
    single = {name: weight.clone() for name, weight in weights.items()}

    together = [weight.clone() for weight in weights.values()]

    def foreach() -> None:
        difference = torch._foreach_sub(list(weights.values()), together)
        torch._foreach_mul_(difference, 1e-4)
        torch._foreach_add_(together, difference)

    def one_by_one() -> None:
        for name, weight in weights.items():
            single[name].lerp_(weight, 1e-4)

    optimizers: dict[str, Any] = {
        "fused": torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True),
        "foreach": torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=True),
    }
    optimizers["one by one"] = torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=False)
    ways: dict[str, Callable[[], object]] = {
        "forward and backward": passes,
        "EMA (ours)": lambda: average.update(one),
        "EMA, foreach": foreach,
        "EMA, one by one": one_by_one,
        **{f"AdamW, {name}{' (ours)' * (name == 'fused')}": o.step for name, o in optimizers.items()},
    }
    results = [{name: seconds(way) for name, way in ways.items()} for _ in range(rounds + 1)][1:]
    print(f"{preset}, {sum(w.numel() for w in weights.values()):,} weights, batch {batch_size}, bf16:")
    for name in ways:
        time_ms = 1000 * statistics.median(r[name] for r in results)
        share = statistics.median(r[name] / r["forward and backward"] for r in results)
        print(f"{name:24s} {time_ms:8.1f} ms, x forward and backward {share:.3f}")


def main(
    megabytes: Annotated[int, typer.Option(help="Size of the state.")] = 200,
    rounds: Annotated[int, typer.Option(help="Rounds; the medians are printed.")] = 5,
    folder: Annotated[str, typer.Option(help="A folder on the disk to write to; default: a temporary one.")] = "",
    preset: Annotated[str, typer.Option(help="Model whose step EMA and optimizer are compared with.")] = "SiT-S/2",
    batch_size: Annotated[int, typer.Option(help="Of that step.")] = 8,
) -> None:
    """Measure."""
    pieces = state(megabytes)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder or None) as temporary:
        report_stalls("disk", stalls(f"{temporary}/checkpoints", pieces, rounds))
    with object_store() as url:
        if url:
            report_stalls("S3", stalls(url, pieces, rounds))
    updates(preset, batch_size, rounds)


if __name__ == "__main__":
    run_app(main)
