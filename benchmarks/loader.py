"""The loader against plain webdataset, the raw read and curl, side by side in one run.

    python benchmarks/loader.py                  # local files; S3 too where Ceph's radosgw is installed
    python benchmarks/loader.py --samples 16384 --rounds 5

Writes shards of random latents (SD-VAE-shaped moments, 16 KiB a sample), then in each round reads them in every way,
one process each, the file cache warm. Ours is the trainer's stream: exact order, every CRC checked, batches as one
tensor; steady is the second half (whole windows, at 65,536 samples), short the first 4,096 samples with the start.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what benchmarks share, and the S3 server of the tests

import numpy as np
import typer

from benchmarks.side_by_side import Claim, Record, Result, Rounds, interleaved, ratio, show, show_results
from ig_dist.data.index import SampleTable, read_index, write_index
from ig_dist.data.shards import pack_shard, scan_shard
from ig_dist.terminal import console, run_app

SHORT = 4096
"""Samples of a short run."""


def write_shards(folder: Path, shape: tuple[int, int, int], samples: int, shards: int) -> None:
    """Random moments of latents of a shape, (2C, H, W) fp16, in equal shards with an index."""
    folder.mkdir(parents=True)
    random, rows, infos = np.random.default_rng(0), [], []
    stored = (2 * shape[0], *shape[1:])
    for number, ids in enumerate(np.array_split(np.arange(samples), shards)):
        latents = random.standard_normal((len(ids), *stored), dtype=np.float32).astype(np.float16)
        data = pack_shard([f"{i:08d}" for i in ids], latents, ids % 1000)
        name = f"shard-{number:06d}.tar"
        (folder / name).write_bytes(data)
        rows += scan_shard(io.BytesIO(data), np.dtype(np.float16), stored)
        digest = hashlib.sha256(data).hexdigest()
        infos.append({"name": name, "bytes": len(data), "samples": len(ids), "sha256": digest})
    zeros = [0.0] * shape[0]
    info = {
        "source": "random",
        "seed": 0,
        "tokenizer": {"name": "random", "sha256": "0", "image_size": 256, "image_channels": 3},
        "latent": {
            "kind": "moments",
            "shape": shape,
            "dtype": "float16",
            "shift": zeros,
            "scale": [1.0] * shape[0],
        },
        "classes": [str(i) for i in range(1000)],
        "statistics": {"mean": zeros, "std": [1.0] * shape[0]},
        "shards": infos,
    }
    write_index(str(folder), info, SampleTable.from_rows(rows))


# Each way reads an index' samples once, in a process of its own, and tells what it cost.


def raw(folder: str) -> dict[str, float]:
    """Read the bytes, nothing else."""
    return timed(Path(folder, shard.name).read_bytes() for shard in read_index(folder).info.shards)


def webdataset(folder: str, batch: int) -> dict[str, float]:
    """The library's own pipeline: shuffle, decode, batch."""
    from webdataset import WebDataset

    urls = [f"{folder}/{shard.name}" for shard in read_index(folder).info.shards]
    data = WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode().to_tuple("latent.npy", "cls")
    return timed(data.batched(batch), per_item=batch)


def ours(folder: str, batch: int, streams: int = 8, workers: int = 2) -> dict[str, float]:
    """The trainer's stream over one epoch."""
    from ig_dist.data.order import SampleOrder
    from ig_dist.data.stream import BatchStream

    index = read_index(folder)
    order = SampleOrder(index.shard_sizes, streams=streams, global_batch_size=batch, window_samples=1024, seed=0)
    stream = BatchStream(index, order, workers=workers)
    told = timed(itertools.islice(stream, index.num_samples // batch), per_item=batch)
    stream.close()
    return told


def curl(folder: str) -> dict[str, float]:
    """One curl process for all shards, to nowhere."""
    from ig_dist.storage.files import open_url

    index = read_index(folder)
    fs, path = open_url(folder, "benchmark")
    urls = [fs.sign(f"{path}/{shard.name}") for shard in index.info.shards]
    before, began = children_cpu(), time.perf_counter()
    subprocess.run(["curl", "-sf", *itertools.chain(*(("-o", "/dev/null", url) for url in urls))], check=True)
    return {"s": time.perf_counter() - began, "cpu": children_cpu() - before}


def children_cpu() -> float:
    """Processor seconds of the processes that this one waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(items: Any, per_item: int = 0) -> dict[str, float]:
    """Go through what a way gives, and tell seconds, processor seconds, memory and the bytes before the first item."""
    memory, read, began, cpu = status("VmHWM"), bytes_read(), time.perf_counter(), time.process_time()
    told, marks = {"before": memory}, [(0.0, 0)]
    for number, _ in enumerate(items, 1):
        marks.append((time.perf_counter() - began, number * per_item))
        if number == 1:
            told |= {"first_s": marks[-1][0], "first_bytes": bytes_read() - read}
    last, samples = marks[-1]
    if per_item:
        half, seen = next(mark for mark in marks if mark[1] >= samples / 2)
        told["steady"] = (last - half) / max(1, samples - seen) * samples
        told["short"] = next(at for at, count in marks if count >= min(SHORT, samples))
    return told | {"s": last, "cpu": time.process_time() - cpu, "memory": status("VmHWM")}


def status(name: str) -> float:
    """A line of this process's status, in MiB."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) / 1024


def bytes_read() -> int:
    """From files and sockets, by this process so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def train(folder: str, run: str, steps: int) -> None:
    """A short training run; the share of the step that it waited for data is in its metrics."""
    config = {
        "run": {"dir": run},
        "model": {"depth": 4, "hidden_size": 128, "num_heads": 4, "patch_size": 4, "aux_depth": 2},
        "data": {"index": folder, "streams": 16, "window_samples": 256, "workers": 2},
        "train": {"steps": steps, "global_batch_size": 64, "precision": "fp32"},
        "log": {"every_steps": 20},
    }
    file = Path(f"{run}.yaml")
    file.write_text(json.dumps(config))
    subprocess.run([sys.executable, "-m", "ig_dist.cli", "train", str(file)], check=True, capture_output=True)


WAYS = {way.__name__: way for way in (raw, webdataset, ours, curl)}
Told = list[dict[str, float]]


def measure(told: Told, way: str, folder: str, **options: Any) -> float:
    """Run one way in a process of its own; its seconds, imports not counted."""
    command = [sys.executable, __file__, "--one", json.dumps([way, folder, options])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    told.append(json.loads(done.stdout.splitlines()[-1]))
    return told[-1]["s"]


def main(
    samples: Annotated[int, typer.Option(help="SD-VAE-shaped samples.")] = 65536,
    rounds: Rounds = 5,
    steps: Annotated[int, typer.Option(help="Of the training run from S3 whose data wait is printed.")] = 200,
    record: Record = False,
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure all ways, side by side."""
    if one:
        import torch  # not part of the measurement

        torch.set_num_threads(1)
        way, folder, options = json.loads(one)
        print(json.dumps(WAYS[way](folder, **options)))
        return
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as cleanup:
        folder = Path(temporary, "shards")
        write_shards(folder, (4, 32, 32), samples, shards=8)
        for batch, streams, limit in ((64, 8, ">= 8"), (256, 32, ">= 10")):
            told: dict[str, Told] = {name: [] for name in ("raw", "webdataset", "ours")}
            options = {"raw": {}, "webdataset": {"batch": batch}, "ours": {"batch": batch, "streams": streams}}
            times = interleaved(
                {name: partial(measure, told[name], name, str(folder), **options[name]) for name in told}, rounds
            )
            told = {name: runs[-rounds:] for name, runs in told.items()}
            times |= {
                f"{name}, {part}": [run[part] for run in told[name]]
                for name in ("webdataset", "ours")
                for part in ("steady", "short")
            }
            at = f"batch {batch}"
            show(
                times,
                [
                    Claim(f"loader, {at}, steady: webdataset / ours", "webdataset, steady", "ours, steady", limit),
                    Claim(f"loader, {at}, short run: webdataset / ours", "webdataset, short", "ours, short"),
                    Claim(f"loader, {at}, steady: raw read / ours", "raw", "ours, steady", ">= 0.65"),
                ],
                title=f"{at}, {streams} streams, local files",
                record=record,
            )
            gigabytes = sum(shard.bytes for shard in read_index(str(folder)).info.shards) / 1e9
            costs = {
                "memory of a process, MiB": [run["memory"] for run in told["ours"]],
                "memory beyond the imports, MiB": [run["memory"] - run["before"] for run in told["ours"]],
                "MB read before the first batch": [run["first_bytes"] / 1e6 for run in told["ours"]],
                "seconds to the first batch": [run["first_s"] for run in told["ours"]],
                "processor seconds a GB": [run["cpu"] / gigabytes for run in told["ours"]],
            }
            show_results([Result(f"loader, {at}: {name}", *middle(v)) for name, v in costs.items()], record=record)
        store = start_store(Path(temporary, "store"), cleanup)
        if store is not None:
            from_s3(upload(folder, "bench/shards"), f"{temporary}/run", rounds, steps, record)


def middle(values: list[float]) -> tuple[float, float, float]:
    """Median and ends of its interval."""
    return ratio(values, [1.0] * len(values))


def from_s3(url: str, run: str, rounds: int, steps: int, record: bool) -> None:
    """Ours against curl, and the data wait of a training."""
    told: dict[str, Told] = {"curl": [], "ours": []}
    options: dict[str, dict[str, int]] = {"curl": {}, "ours": {"batch": 64, "workers": 2}}
    times = interleaved({name: partial(measure, told[name], name, url, **options[name]) for name in told}, rounds)
    told = {name: runs[-rounds:] for name, runs in told.items()}
    times["ours, steady"] = [run["steady"] for run in told["ours"]]
    claims = [Claim("loader from S3, steady: one curl / ours", "curl", "ours, steady", ">= 0.7")]
    show(times, claims, title="S3 on loopback, server and reader on the same cores", record=record)
    cpu = {name: [run["cpu"] for run in runs] for name, runs in told.items()}
    train(url, run, steps)
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    times_of_steps = [64 / line["images_per_s"] for line in lines]
    waits = [line["data_wait_s"] / step for line, step in zip(lines, times_of_steps, strict=True)]
    show_results(
        [
            Result("loader from S3: processor seconds, ours / curl", *ratio(cpu["ours"], cpu["curl"])),
            Result("loader from S3: MB read before the first batch", told["ours"][0]["first_bytes"] / 1e6),
            Result("data wait of a training from S3, % of its time", 100 * statistics.fmean(waits), limit="<= 1"),
        ],
        record=record,
    )


def start_store(folder: Path, cleanup: ExitStack) -> Any:
    """The real S3 server of the tests, and the environment that finds it; None without Ceph."""
    from tests import object_store

    if reason := object_store.available():
        console.print(f"no S3: {reason}")
        return None
    store = cleanup.enter_context(object_store.ObjectStore(folder))
    os.environ.update(store.environment())
    store.create_bucket("bench")
    return store


def upload(folder: Path, place: str) -> str:
    """Copy a folder to the store; its URL."""
    from ig_dist.storage.files import open_url, write_whole

    fs, path = open_url(f"s3://{place}", "benchmark")
    for file in folder.iterdir():
        write_whole(fs, f"{path}/{file.name}", file.read_bytes())
    return f"s3://{place}"


if __name__ == "__main__":
    run_app(main)
