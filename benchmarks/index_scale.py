"""What an index costs at internet scale: opening it, its memory, the first batch, and a sample of many shards.

    python benchmarks/index_scale.py --folder DISK                  # 100 million samples in 10,000 shards
    python benchmarks/index_scale.py --folder DISK --shards 100 --records 20

The shards are sparse files. A latent of zeros is as good as another, and its CRC is known, so nothing of them is
written, while sizes, offsets, CRCs and requests are those of SD-VAE moments (16 KiB a sample). Memory is the
proportional set size of all processes of a node above what they have before the index is opened; the last number is
after rows of thousands of windows were looked up, as in a long run. ``gather`` is the end of an encoding: records of
all shards become the index.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.table import Table
from zlib_ng import zlib_ng

from ig_dist.data.index import SampleTable, read_index, write_index
from ig_dist.terminal import console, run_app

SHAPE = (4, 32, 32)
BYTES = 2 * 4 * 32 * 32 * 2  # of moments in float16
STRIDE = 512 + 128 + BYTES + 384 + 1024  # of a sample in a tar: two headers, the .npy's, padding and a label
PER_SHARD = 10_000
CLASSES = 1000
STREAMS, BATCH, WINDOW = 32, 256, 1024


@dataclass(frozen=True)
class Made:
    """A column that is computed from the samples' numbers when it is looked at."""

    count: int
    dtype: np.dtype[Any]
    number: Callable[[NDArray[np.int64]], Any]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        ids = np.arange(*rows.indices(self.count))
        return np.broadcast_to(self.number(ids), ids.shape).astype(self.dtype)


def rows(count: int) -> SampleTable:
    """What an index says of samples that are zeros."""
    crc = zlib_ng.crc32(bytes(BYTES))
    return SampleTable(
        offset=Made(count, np.dtype(np.int64), lambda ids: ids % PER_SHARD * STRIDE + 640),
        label=Made(count, np.dtype(np.int32), lambda ids: ids * 7919 % CLASSES),
        crc32=Made(count, np.dtype(np.uint32), lambda ids: crc),
    )


def make_shards(folder: Path, shards: int) -> list[dict[str, Any]]:
    """Sparse tars; what the index says of them."""
    folder.mkdir(parents=True)
    infos = []
    for number in range(shards):
        name = f"shard-{number:06d}.tar"
        with (folder / name).open("wb") as file:
            file.truncate(PER_SHARD * STRIDE + 1024)
        infos.append(
            {"name": name, "bytes": PER_SHARD * STRIDE + 1024, "samples": PER_SHARD, "sha256": f"{number:064x}"}
        )
    return infos


def make_index(folder: Path, shards: int) -> None:
    """An index of shards of zeros."""
    info = {
        "source": "zeros",
        "seed": 0,
        "tokenizer": {"name": "none", "sha256": "0", "image_size": 256, "image_channels": 3},
        "latent": {"kind": "moments", "shape": SHAPE, "dtype": "float16", "shift": [0.0] * 4, "scale": [1.0] * 4},
        "classes": [str(i) for i in range(CLASSES)],
        "statistics": {"mean": [0.0] * 4, "std": [1.0] * 4},
        "shards": make_shards(folder, shards),
    }
    write_index(str(folder), info, rows(shards * PER_SHARD))


def proportional_kib() -> int:
    """Of this process: its own memory, and its share of what it has in common with others."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1])


# What runs in processes of its own. Each prints a line of JSON when it is done.


def rank(folder: str, number: int, world: int) -> None:
    """A process of a node: opens the index, takes a batch, and looks up rows as a long run does."""
    import torch

    from ig_dist.data.order import SampleOrder
    from ig_dist.data.stream import BatchStream

    torch.set_num_threads(1)
    before = proportional_kib()
    _say("ready")
    began = time.perf_counter()
    index = read_index(folder)
    opened = time.perf_counter() - began
    _say("opened", seconds=opened, kib=proportional_kib() - before)
    order = SampleOrder(index.shard_sizes, streams=STREAMS, global_batch_size=BATCH, window_samples=WINDOW, seed=0)
    began = time.perf_counter()
    stream = BatchStream(index, order, rank=number, world_size=world, workers=2)
    stream.get()
    first = time.perf_counter() - began
    stream.close()
    _say("first batch", seconds=opened + first)
    del stream
    for place in range(0, 2000 * WINDOW, WINDOW):
        for piece in order.window(number * STREAMS // world + place // WINDOW % (STREAMS // world), place).stretches:
            begin = int(index.first_ids[piece.shard])
            index.table[begin + piece.start : begin + piece.stop]
    _say("long run", kib=proportional_kib() - before)


def _say(what: str, **numbers: float) -> None:
    """Print a line, and go on when all processes have."""
    print(json.dumps({"what": what, **numbers}), flush=True)
    sys.stdin.readline()


def gather(folder: str) -> None:
    """The end of an encoding, as a worker does it."""
    from ig_dist.autoencoders.tokenizers import get_tokenizer
    from ig_dist.data.sources import Source
    from ig_dist.encoding import gather as gathering
    from ig_dist.encoding.records import PARTS, Dest

    labels, classes = np.zeros(0, np.int64), [str(i) for i in range(CLASSES)]
    source = Source("zeros", classes, None, labels, [], lambda number: None)  # type: ignore[arg-type, return-value]
    tokenizer, dest, shards = get_tokenizer("pixel"), Dest(folder), len(list(Path(folder, PARTS).iterdir()))
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest memory so far
    before, began = _status("VmRSS"), time.perf_counter()
    assert gathering.gather(dest, source, "zeros", tokenizer, SHAPE, shards)
    print(json.dumps({"seconds": time.perf_counter() - began, "kib": _status("VmHWM") - before}))


def _status(what: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1])


# The measurements.


def node(folder: Path, world: int) -> dict[str, dict[str, float]]:
    """The ranks of a node, side by side: the longest time and the sum of the memory at each of their stations."""
    command = [sys.executable, __file__, "--one"]
    ranks = [
        subprocess.Popen(
            [*command, json.dumps(["rank", str(folder), number, world])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(world)
    ]
    found = {}
    for _ in range(4):
        lines = [json.loads(process.stdout.readline()) for process in ranks if process.stdout]
        seconds = max(line.get("seconds", 0.0) for line in lines)
        found[lines[0]["what"]] = {"seconds": seconds, "mb": sum(line.get("kib", 0) for line in lines) / 1000}
        for process in ranks:
            if process.stdin:
                process.stdin.write("\n")
                process.stdin.flush()
    for process in ranks:
        process.wait()
    return found


def of_many_and_few(many: Path, few: Path, rounds: int) -> list[float]:
    """Processor time of a sample of many shards over that of few, in turn; the median, the lowest and the highest."""
    import torch

    from ig_dist.data.order import SampleOrder
    from ig_dist.data.stream import BatchStream

    torch.set_num_threads(1)

    def seconds(folder: Path, start: int) -> float:
        index = read_index(str(folder))
        order = SampleOrder(index.shard_sizes, streams=8, global_batch_size=64, window_samples=WINDOW, seed=0)
        began = time.process_time()
        stream = BatchStream(index, order, start=start)
        for _ in islice(stream, WINDOW):  # eight windows of each stream, most of a shard
            pass
        stream.close()
        return time.process_time() - began

    times = []
    for number in range(rounds):
        for folder in (many, few, many, few):  # now the kernel has the pages, of zeros, of both, and knows them well
            seconds(folder, 1000 * number)
        times.append([seconds(folder, 1000 * number) for folder in (many, few)])
    ratios = [of_many / of_few for of_many, of_few in times]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def make_records(folder: Path, shards: int) -> None:
    """What an encoding has finished: shards and their records."""
    from ig_dist.encoding.records import Dest, ShardRecord, record_name
    from ig_dist.encoding.settings import Settings

    settings = Settings(
        source="zeros",
        tokenizer="pixel",
        tokenizer_sha256="0",
        precision="fp32",
        image_size=32,
        image_channels=3,
        store="moments",
        flips=False,
        seed=0,
        samples_per_shard=PER_SHARD,
    )
    table, infos = rows(PER_SHARD)[0:PER_SHARD], make_shards(folder, shards)
    dest, sums = Dest(str(folder)), [1.0] * SHAPE[0]
    for number, info in enumerate(infos):
        record = ShardRecord(
            settings=settings, rows=table, rejected=[], upscaled=0, sums=sums, square_sums=sums, **info
        )
        dest.create(record_name(number), record.model_dump_json().encode())


def main(
    folder: Annotated[str, typer.Option(help="Where 2 GB are free, on a disk. Default: the system's for such.")] = "",
    shards: Annotated[int, typer.Option(help="Of 10,000 samples each.")] = 10_000,
    few: Annotated[int, typer.Option(help="Shards of the index that is compared with it.")] = 10,
    ranks: Annotated[int, typer.Option(help="Processes of a node.")] = 4,
    only_ratio: Annotated[bool, typer.Option(help="Only compare many shards with few.")] = False,
    records: Annotated[int, typer.Option(help="Shards whose records are gathered; 0: none.")] = 1000,
    rounds: Annotated[int, typer.Option(help="Of the comparison of many shards with few.")] = 7,
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure what an index costs."""
    if one:
        what, *arguments = json.loads(one)
        return rank(*arguments) if what == "rank" else gather(*arguments)
    table = Table("what", "time", "memory", title=f"{shards * PER_SHARD:,} samples in {shards:,} shards")
    with tempfile.TemporaryDirectory(dir=folder or None) as temporary:
        began = time.perf_counter()
        make_index(Path(temporary, "many"), shards)
        side_file = Path(temporary, "many", "index.samples.safetensors").stat().st_size
        table.add_row("written", f"{time.perf_counter() - began:.1f} s", f"(side file {side_file / 1e6:,.0f} MB)")
        make_index(Path(temporary, "few"), few)
        for world in () if only_ratio else (1, ranks):
            for what, numbers in node(Path(temporary, "many"), world).items():
                if what == "ready":
                    continue
                seconds = f"{numbers['seconds']:.2f} s" if numbers["seconds"] else ""
                memory = f"{numbers['mb']:.0f} MB" if numbers["mb"] else ""
                table.add_row(f"{what}, {world} process{'es' * (world > 1)}", seconds, memory)
        ratio = of_many_and_few(Path(temporary, "many"), Path(temporary, "few"), rounds)
        table.add_row(f"a sample, of {shards:,} shards / of {few}", "{:.2f} ({:.2f} to {:.2f})".format(*ratio), "")
        if records and not only_ratio:
            make_records(Path(temporary, "records"), records)
            command = [sys.executable, __file__, "--one", json.dumps(["gather", f"{temporary}/records"])]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            what = f"gather of {records * PER_SHARD:,} rows"
            table.add_row(what, f"{found['seconds']:.0f} s", f"{found['kib'] / 1000:.0f} MB")
    console.print(table)


if __name__ == "__main__":
    run_app(main)
