"""The loader against plain webdataset, the raw read and curl, side by side in one run.

    python benchmarks/loader.py                  # local files; S3 too where Ceph's radosgw is installed
    python benchmarks/loader.py --samples 8192 --repeats 3

Writes shards of random latents (SD-VAE-shaped moments, 16 KiB a sample, and 768 x 16 x 16, 768 KiB), then in each round
reads all of them in every way, one process each, the file cache warm. Prints the median rate of each and its ratios.
Ours is the trainer's stream: exact order, every CRC checked, batches of 64 as one tensor.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the S3 server of the tests

import numpy as np
import typer
from rich.table import Table

from ig_dist.data.index import SampleTable, read_index, write_index
from ig_dist.data.shards import pack_shard, scan_shard
from ig_dist.terminal import console, run_app

BATCH = 64


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


# Each way reads an index' samples once and returns how many it saw. It runs in a process of its own.


def raw(folder: str) -> int:
    """Read the bytes, nothing else."""
    index = read_index(folder)
    for shard in index.info.shards:
        Path(folder, shard.name).read_bytes()
    return index.num_samples


def tar_walk(folder: str) -> int:
    """A tar walk with views into the bytes, shuffled within a shard, one stack a batch; no order across shards."""
    index, seen = read_index(folder), 0
    shape, size = index.info.latent.stored_shape, index.info.latent.stored_bytes
    for number, shard in enumerate(index.info.shards):
        data = Path(folder, shard.name).read_bytes()
        views = []
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                if member.name.endswith(".npy"):
                    begin = member.offset_data + member.size - size
                    views.append(np.frombuffer(data, np.float16, size // 2, begin).reshape(shape))
        order = np.random.default_rng(number).permutation(len(views))
        for start in range(0, len(views), BATCH):
            seen += len(np.stack([views[i] for i in order[start : start + BATCH]]))
    return seen


def plain_webdataset(folder: str) -> int:
    """The library's own pipeline: shuffle, decode, batch."""
    import webdataset

    urls = [f"{folder}/{shard.name}" for shard in read_index(folder).info.shards]
    data = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode().to_tuple("latent.npy", "cls")
    return sum(len(labels) for _, labels in data.batched(BATCH))


def ours(folder: str, workers: int = 2, window: int = 1024, cache: str = "") -> int:
    """The trainer's stream over one epoch."""
    from ig_dist.data.cache import BlockCache
    from ig_dist.data.order import SampleOrder
    from ig_dist.data.reader import ShardReader
    from ig_dist.data.stream import BatchStream

    index = read_index(folder)
    order = SampleOrder(index.shard_sizes, streams=8, global_batch_size=BATCH, window_samples=window, seed=0)
    reader = ShardReader(index, cache=BlockCache(cache, 2**40, index) if cache else None)
    stream = BatchStream(index, order, workers=workers, reader=reader)
    count = index.num_samples // BATCH
    seen = sum(len(batch.labels) for batch in itertools.islice(stream, count))
    stream.close()
    return seen


def curl(folder: str) -> int:
    """One curl process for all shards, to nowhere."""
    from ig_dist.storage.files import open_url

    index = read_index(folder)
    fs, path = open_url(folder, "benchmark")
    urls = [fs.sign(f"{path}/{shard.name}") for shard in index.info.shards]
    subprocess.run(["curl", "-sf", *itertools.chain(*(("-o", "/dev/null", url) for url in urls))], check=True)
    return index.num_samples


def streaming_get(folder: str) -> int:
    """One GET a shard through botocore, into memory made for it."""
    import botocore.session

    index, client = read_index(folder), botocore.session.get_session().create_client("s3")
    bucket, _, prefix = folder.removeprefix("s3://").partition("/")
    for shard in index.info.shards:
        body = client.get_object(Bucket=bucket, Key=f"{prefix}/{shard.name}")["Body"]
        buffer, at = np.empty(shard.bytes, np.uint8).data, 0
        while count := body.readinto(buffer[at : at + 2**20]):
            at += count
    return index.num_samples


def ranged_gets(folder: str) -> int:
    """Requests of 32 MiB, one after the other, as the reader makes them; no checks."""
    from ig_dist.storage.files import REQUEST_BYTES, open_url, read_range

    index = read_index(folder)
    fs, path = open_url(folder, "benchmark")
    for shard in index.info.shards:
        for start in range(0, shard.bytes, REQUEST_BYTES):
            read_range(fs, f"{path}/{shard.name}", start, min(start + REQUEST_BYTES, shard.bytes))
    return index.num_samples


def train(folder: str, run: str) -> int:
    """A short training run; the share of the step that it waited for data is in its metrics."""
    config = {
        "run": {"dir": run},
        "model": {"depth": 4, "hidden_size": 128, "num_heads": 4, "patch_size": 4, "aux_depth": 2},
        "data": {"index": folder, "streams": 16, "window_samples": 256, "workers": 2},
        "train": {"steps": 200, "global_batch_size": 64, "precision": "fp32"},
        "log": {"every_steps": 20},
    }
    file = Path(f"{run}.yaml")
    file.write_text(json.dumps(config))
    subprocess.run([sys.executable, "-m", "ig_dist.cli", "train", str(file)], check=True, capture_output=True)
    return 200 * 64


_WAYS = (raw, tar_walk, plain_webdataset, ours, curl, streaming_get, ranged_gets)
WAYS: dict[str, Callable[..., int]] = {way.__name__: way for way in _WAYS}


def measure(way: str, folder: str, **options: Any) -> dict[str, float]:
    """Run one way in a process of its own: samples/s (imports not counted) and its peak memory in MiB."""
    command = [sys.executable, __file__, "--one", json.dumps([way, folder, options])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_one(way: str, folder: str, options: dict[str, Any]) -> None:
    """What the process does."""
    import torch  # not part of the measurement

    torch.set_num_threads(1)
    read_index(folder)
    before = reset_peak()
    began = time.perf_counter()
    seen = WAYS[way](folder, **options)
    seconds = time.perf_counter() - began
    print(json.dumps({"rate": seen / seconds, "grown": (memory("VmHWM") - before) / 1024}))


def memory(what: str) -> int:
    """A line of this process's status, in KiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1])


def reset_peak() -> int:
    """Forget the highest memory so far (of the imports); the memory in use, in KiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def main(
    samples: Annotated[int, typer.Option(help="SD-VAE-shaped samples; of the big latents a 48th as many.")] = 65536,
    repeats: Annotated[int, typer.Option(help="Rounds; medians are printed.")] = 5,
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure all ways, side by side."""
    if one:
        return run_one(*json.loads(one))
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as cleanup:
        store = start_store(Path(temporary, "store"), cleanup)
        for name, shape, count, window in (
            ("4x32x32", (4, 32, 32), samples, 1024),
            ("768x16x16", (768, 16, 16), samples // 48, 32),
        ):
            folder = Path(temporary, name)
            write_shards(folder, shape, count, shards=8)
            local = {
                "raw read": partial(measure, "raw", str(folder)),
                "tar walk, one stack": partial(measure, "tar_walk", str(folder)),
                "plain webdataset": partial(measure, "plain_webdataset", str(folder)),
                "ours, no thread": partial(measure, "ours", str(folder), workers=0, window=window),
                "ours, 1 thread": partial(measure, "ours", str(folder), workers=1, window=window),
                "ours, 2 threads": partial(measure, "ours", str(folder), workers=2, window=window),
                "ours, cached": partial(measure, "ours", str(folder), window=window, cache=f"{temporary}/cache"),
            }
            local["ours, cached"]()  # fills the cache
            compare(f"{name}, local files", local, repeats, ["plain webdataset", "raw read"])
            if store is None:
                continue
            url = upload(folder, f"bench/{name}")
            remote = {
                "curl": partial(measure, "curl", url),
                "one streaming GET": partial(measure, "streaming_get", url),
                "ranged GETs of 32 MiB": partial(measure, "ranged_gets", url),
                "ours, 1 thread": partial(measure, "ours", url, workers=1, window=window),
                "ours, 2 threads": partial(measure, "ours", url, workers=2, window=window),
                "ours, 4 threads": partial(measure, "ours", url, workers=4, window=window),
            }
            compare(f"{name}, S3 on loopback", remote, repeats, ["curl"])
            if name == "4x32x32":
                train(url, f"{temporary}/run")
                lines = [json.loads(line) for line in Path(temporary, "run/metrics.jsonl").read_text().splitlines()]
                steps = [64 / line["images_per_s"] for line in lines]
                waits = [line["data_wait_s"] / step for line, step in zip(lines, steps, strict=True)]
                console.print(
                    f"training from S3, 200 steps of {statistics.median(steps):.3f} s: data wait {waits[0]:.2%} in the"
                    f" first 20 (they wait for the first windows), at most {max(waits[1:]):.2%} in any 20 after them,"
                    f" {np.average(waits, weights=steps):.2%} over all"
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


def compare(title: str, ways: dict[str, Callable[[], dict[str, float]]], repeats: int, against: list[str]) -> None:
    """All ways round by round, and the table of medians; ratios are taken within a round."""
    results = [{way: run() for way, run in ways.items()} for _ in range(repeats)]
    table = Table(title=f"{title}, {repeats} rounds", title_justify="left")
    for column in ("way", "samples/s", "lowest", "highest", *(f"x {base}" for base in against), "memory MiB"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way in ways:
        rates = [result[way]["rate"] for result in results]
        ratios = [statistics.median(r[way]["rate"] / r[base]["rate"] for r in results) for base in against]
        numbers = [f"{value:,.0f}" for value in (statistics.median(rates), min(rates), max(rates))]
        grown = max(result[way]["grown"] for result in results)
        table.add_row(way, *numbers, *(f"{ratio:.2f}" for ratio in ratios), f"{grown:.0f}")
    console.print(table)


if __name__ == "__main__":
    run_app(main)
