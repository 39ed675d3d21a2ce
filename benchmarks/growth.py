"""How costs grow with the model, the batch, classes, shards, units and ranks: an exponent each, on one picture.

    python benchmarks/growth.py --picture benchmarks/growth.svg          # at most eight minutes on one core
    python benchmarks/growth.py shards units                             # these alone

The exponent is the slope between the last sizes of a line in logarithms: 1 is linear, 0 is constant. Below them a
constant part hides it. More than linear needs a reason, which stands beside the line.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import safetensors.numpy
import torch
import typer
from rich.table import Table
from zlib_ng import zlib_ng

from benchmarks import evaluation, vote
from benchmarks.checkpoint import Ours, state
from benchmarks.side_by_side import Record, Result, show_results
from benchmarks.synthetic import build_model, build_step, synthetic_info
from ig_dist.autoencoders.tokenizers import PIXEL
from ig_dist.config import Config
from ig_dist.config.file import config_from_tree
from ig_dist.data.index import SampleTable, read_index
from ig_dist.data.order import SampleOrder
from ig_dist.data.sources.source import array_source
from ig_dist.diffusion.samplers import euler
from ig_dist.encoding.gather import gather
from ig_dist.encoding.records import Dest, Ledger, ShardRecord, record_name
from ig_dist.encoding.settings import Settings, shard_name
from ig_dist.features.features import FeatureFiles
from ig_dist.features.images import plan_images
from ig_dist.models.dit import count_parameters
from ig_dist.parallel.dist import Dist
from ig_dist.plans.samples import Pictures, existing, unit_name
from ig_dist.sampling.run import write_samples_npz
from ig_dist.storage.files import open_url
from ig_dist.terminal import console, run_app

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))
LINEAR = 1.15  # beyond it a line is more than linear: times of a shared machine scatter by as much
WIDTHS, BATCHES, CLASSES = (96, 192, 384, 768), (1, 4, 16, 64), (10, 100, 1000, 5000, 21_000)
SHARDS, UNITS, RANKS = (10, 100, 1000, 10_000), (10, 100, 1000, 10_000), (2, 4, 8)
SIDE, A_SHARD, A_UNIT = 8, 4, 4  # of a latent; samples of a shard, images of a unit
HOPS = "2 (W - 1) hops of a ring, and all ranks share these cores"
Measured = Iterator[tuple[float, dict[str, float]]]
"""A size, and what was measured at it."""


class Line(NamedTuple):
    """How one cost grows."""

    axis: str
    cost: str
    sizes: list[float]
    values: list[float]

    @property
    def exponent(self) -> float:
        """Slope between the last three sizes, in logarithms."""
        return float(np.polyfit(np.log(self.sizes[-3:]), np.log(self.values[-3:]), 1)[0])


@dataclass(frozen=True)
class Axis:
    """What grows."""

    measure: Callable[[Path], Measured]
    size: str
    reasons: dict[str, str]
    """Of costs that may grow more than linearly."""


def least(call: Callable[[], object], times: int = 3) -> float:
    """Seconds of the fastest call."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return min(took)


def peak_mib(call: Callable[[], object]) -> float:
    """What a call has in memory at its highest, beside what was there before and what was freed."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return max(_status("VmHWM") - before, 1024) / 1024


def config(width: int, rows: int, depth: int) -> Config:
    """A run of a model of 16 tokens."""
    size = {"depth": depth, "hidden_size": width, "num_heads": width // 48, "patch_size": 2, "aux_depth": depth // 3}
    train = {"steps": 1, "global_batch_size": rows, "precision": "fp32", "compile": False}
    tree: dict[str, Any] = {"model": size, "data": {"index": "synthetic", "streams": 1}, "train": train}
    return config_from_tree(tree, "benchmark")


def model(folder: Path) -> Measured:
    """Depth 12, four images: steps, memory, a start's parts, checkpoints, sampling."""
    info, labels = synthetic_info(4, SIDE, 10), torch.zeros(4, dtype=torch.int64)
    for width in WIDTHS:
        settings = config(width, 4, 12)
        built = build_model(settings, info, ALONE.device)
        parameters = count_parameters(built)
        x, times = torch.randn(4, 4, SIDE, SIDE), torch.linspace(1, 0, 5, dtype=torch.float64).tolist()

        def sample(built: Any = built, x: Any = x, times: Any = times) -> None:
            with torch.inference_mode():
                euler(lambda x, t: built(x, torch.full((4,), t), labels).velocity, x, times)

        found = {
            "initial weights": least(partial(build_model, settings, info, ALONE.device), 2),
            "sampling, 4 evaluations": least(sample),
        }
        step = build_step(settings, info, ALONE, built)
        found["memory of steps, MiB"] = peak_mib(step)
        found["step"] = least(step)
        ours = Ours(str(folder / str(width)), state(max(4, parameters * 16 // 10**6)))
        found["checkpoint: save"] = least(ours.save, 2)
        found["checkpoint: restore"] = least(ours.restore, 2)
        yield parameters, found


def batch(folder: Path) -> Measured:
    """Depth 6, width 192."""
    info = synthetic_info(4, SIDE, 10)
    for rows in BATCHES:
        step = build_step(config(192, rows, 6), info, ALONE)
        memory = peak_mib(step)
        yield rows, {"step": least(step), "memory of steps, MiB": memory}


def classes(folder: Path) -> Measured:
    """Their table of embeddings in a model of depth 6 and width 192; plans and indexes beside it."""
    for number in CLASSES:
        step = build_step(config(192, 8, 6), synthetic_info(4, SIDE, number), ALONE)
        step()
        plan = evaluation.samples(folder, 50_000).plan.model_copy(update={"num_classes": number})
        table = SampleTable.from_rows([(0, label % number, 0, -1, 0) for label in range(100_000)])
        yield (
            number,
            {
                "step": least(step),
                "labels of 50,000 images": least(partial(plan.image_labels, torch.arange(50_000))),
                "counts of 100,000 labels": least(partial(table.class_counts, number)),
            },
        )


def shards(folder: Path) -> Measured:
    """Of an encoding that is finished, and of the index that it leaves."""
    shape, names = (3, SIDE, SIDE), ("offset", "label", "crc32")
    settings = Settings(
        source="s, 1 files", tokenizer="pixel", tokenizer_sha256=PIXEL.sha256, precision="fp32", image_size=SIDE,
        image_channels=3, store="sample", flips=False, seed=0, samples_per_shard=A_SHARD,
    )  # fmt: skip
    latent = np.zeros(shape, np.float16)
    crc, offset = zlib_ng.crc32(latent.tobytes()), 640
    table = SampleTable(**{name: np.full(A_SHARD, value) for name, value in zip(names, (offset, 0, crc), strict=True)})
    source = array_source("s", np.zeros((1, SIDE, SIDE, 3), np.uint8), np.zeros(1), 1, None)  # of one class
    for number in SHARDS:
        dest = Dest(str(folder / f"shards-{number}"))
        (folder / f"shards-{number}" / "parts").mkdir(parents=True)
        tar = bytes(offset) + latent.tobytes() + bytes(10240 - offset - latent.nbytes)
        record = ShardRecord(
            settings=settings, name="", bytes=len(tar), samples=A_SHARD, sha256="0" * 64, rows=table, rejected=[],
            upscaled=0, sums=[0.0] * 3, square_sums=[1.0] * 3,
        )  # fmt: skip
        for i in range(number):
            Path(dest.path, shard_name(i)).write_bytes(tar)
            told = record.model_copy(update={"name": shard_name(i)}).model_dump_json()
            Path(dest.path, record_name(i)).write_text(told)
        ledger = Ledger(dest, settings, number)
        found = {"first look at the records": least(ledger.look, 1), "next look": least(ledger.look, 2)}
        found["the records become an index"] = least(partial(gather, dest, source, "s", PIXEL, shape, number), 1)
        index = read_index(dest.url)
        found["index opened"] = least(partial(read_index, dest.url))
        options = {"streams": 8, "global_batch_size": 8, "window_samples": 4, "seed": 0}

        def first(index: Any = index, options: Any = options) -> None:
            SampleOrder(index.shard_sizes, **options).batch(0)

        order = SampleOrder(index.shard_sizes, **options)
        found["order, first batch"] = least(first)
        found["order, 100 batches"] = least(partial(list, map(order.batch, range(100))), 1)
        yield number, found


def units(folder: Path) -> Measured:
    """Of four images of 8 x 8 each: looking, merging, and what scoring does beside the arithmetic."""
    extractor = replace(evaluation.extractor(), dimensions={"pool": 8})
    for number in UNITS:
        drawn = evaluation.samples(folder / f"units-{number}", number * A_UNIT)
        drawn = replace(drawn, plan=drawn.plan.model_copy(update={"unit_size": A_UNIT}))
        fs, path = open_url(drawn.url, "sample.url")
        Path(path).mkdir(parents=True)
        images, pictures = plan_images(drawn), np.zeros((A_UNIT, SIDE, SIDE, 3), np.uint8)
        files = FeatureFiles(images, [extractor])
        for i in range(number):
            labels = np.arange(i * A_UNIT, (i + 1) * A_UNIT) % 1000
            unit = Pictures(pictures, labels, np.zeros((A_UNIT, 3), np.int64))
            Path(path, unit_name(i)).write_bytes(safetensors.numpy.save(unit._asdict()))
            files.write(i, extractor, Pictures(pictures, labels), {"pool": np.ones((A_UNIT, 8), np.float32)})
        yield (
            number,
            {
                "listing": least(partial(existing, fs, path)),
                "merged into samples.npz": least(partial(write_samples_npz, drawn), 1),
                "features looked at": least(partial(list, map(files.missing, range(number))), 1),
                "features read": least(partial(list, files.rows("inception", "pool", number * A_UNIT)), 1),
            },
        )


def ranks(folder: Path) -> Measured:
    """The vote of each step among processes that share this machine's cores (gloo)."""
    context = multiprocessing.get_context("fork")
    for count in RANKS:
        mine, theirs = context.Pipe(duplex=False)
        arguments = (count, folder / f"store-{count}", 0.0, theirs)
        began = time.perf_counter()
        processes = [context.Process(target=vote.vote, args=(rank, *arguments), daemon=True) for rank in range(count)]
        for process in processes:
            process.start()
        found = [mine.recv() for _ in processes]
        for process in processes:
            process.join()
        yield (
            count,
            {
                "vote": statistics.median(one[0] for one in found),
                "processes meet and part": time.perf_counter() - began,
            },
        )


AXES = {
    "ranks": Axis(ranks, "ranks", {"vote": HOPS, "processes meet and part": HOPS}),  # before any thread
    "model": Axis(model, "parameters", {}),
    "batch": Axis(batch, "images", {}),
    "classes": Axis(classes, "classes", {}),
    "shards": Axis(shards, "shards", {}),
    "units": Axis(units, "units", {}),
}


def why(line: Line) -> str:
    """The reason of one that may be more than linear."""
    return AXES[line.axis].reasons.get(line.cost, "") if line.exponent > LINEAR else ""


def draw(lines: list[Line], file: Path) -> None:
    """All lines, an axis each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    for axes, name in zip(figure.subplots(2, 3).flat, dict.fromkeys(line.axis for line in lines), strict=False):
        for line in (line for line in lines if line.axis == name):
            axes.loglog(line.sizes, line.values, "o-", label=f"{line.cost}: {line.exponent:.2f}")
        axes.set(xlabel=AXES[name].size, ylabel="MiB or seconds" if name in ("model", "batch") else "seconds")
        axes.legend(fontsize=7, title="exponent", title_fontsize=7)
        axes.grid(alpha=0.3)
    figure.savefig(file, metadata={"Date": None})


def main(
    axes: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(AXES)}; default: all.")] = None,
    folder: Annotated[Path | None, typer.Option(help="On the disk to use. Default: the temporary one.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw all lines into this file.")] = None,
    record: Record = False,
) -> None:
    """Measure all sizes, print exponents."""
    torch.set_num_threads(1)
    lines: list[Line] = []
    for name in axes or AXES:
        found: dict[str, Line] = {}
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            for size, costs in AXES[name].measure(Path(scratch)):
                for cost, value in costs.items():
                    line = found.setdefault(cost, Line(name, cost, [], []))
                    line.sizes.append(size)
                    line.values.append(value)
        table = Table(AXES[name].size, *(f"{size:,.0f}" for size in line.sizes), "exponent", "why")
        for cost, line in found.items():
            values = (f"{value:.3g}" if "MiB" in cost else f"{1e3 * value:.3g} ms" for value in line.values)
            table.add_row(cost, *values, f"{line.exponent:.2f}", why(line))
        console.print(table)
        lines += found.values()
    worst = []
    for name in dict.fromkeys(line.axis for line in lines):
        line = max((line for line in lines if line.axis == name), key=lambda one: (not why(one), one.exponent))
        limit = "" if why(line) else f"<= {LINEAR}"
        worst.append(Result(f"growth with {name}, the highest exponent ({line.cost})", line.exponent, limit=limit))
    show_results(worst, record=record)
    if picture:
        draw(lines, picture)


def _status(what: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1])


if __name__ == "__main__":
    run_app(main)
