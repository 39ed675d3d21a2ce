"""The loader against plain webdataset, the raw read and curl, side by side in one run.

    python benchmarks/loader.py                  # local files; S3 too where Ceph's radosgw is installed
    python benchmarks/loader.py --samples 20000 --repeats 5

Writes shards of random latents (SD-VAE-shaped moments, 16 KiB a sample, and 768 x 16 x 16, 384 KiB), then in each round
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
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ig_dist.data.index import SampleTable, read_index, write_index
from ig_dist.data.shards import pack_shard, scan_shard
from ig_dist.terminal import run_app

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
    """One curl process for all shards, signed by itself, to nowhere."""
    index = read_index(folder)
    bucket = folder.removeprefix("s3://")
    urls = [f"{os.environ['AWS_ENDPOINT_URL']}/{bucket}/{shard.name}" for shard in index.info.shards]
    key = f"{os.environ['AWS_ACCESS_KEY_ID']}:{os.environ['AWS_SECRET_ACCESS_KEY']}"
    sign = ["--aws-sigv4", "aws:amz:us-east-1:s3", "--user", key]
    command = ["curl", "--silent", "--fail", *sign, *itertools.chain(*(("-o", "/dev/null", url) for url in urls))]
    subprocess.run(command, check=True)
    return index.num_samples


WAYS: dict[str, Callable[..., int]] = {f.__name__: f for f in (raw, tar_walk, plain_webdataset, ours, curl)}


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
    samples: Annotated[int, typer.Option(help="SD-VAE-shaped samples; of the big latents a 16th as many.")] = 32768,
    repeats: Annotated[int, typer.Option(help="Rounds; the medians are printed.")] = 5,
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure all ways, side by side."""
    if one:
        return run_one(*json.loads(one))
    with tempfile.TemporaryDirectory() as temporary:
        for name, shape, count, window in (
            ("4x32x32", (4, 32, 32), samples, 1024),
            ("768x16x16", (768, 16, 16), samples // 16, 64),
        ):
            folder = str(Path(temporary, name))
            write_shards(Path(folder), shape, count, shards=8)
            compare(name, folder, window, repeats, temporary)


def compare(name: str, folder: str, window: int, repeats: int, temporary: str) -> None:
    """All ways on one data set, round by round, and the table."""
    cache = f"{temporary}/cache"
    ways: dict[str, Callable[[], dict[str, float]]] = {
        "raw read": lambda: measure("raw", folder),
        "tar walk, one stack": lambda: measure("tar_walk", folder),
        "plain webdataset": lambda: measure("plain_webdataset", folder),
        "ours, no threads": lambda: measure("ours", folder, workers=0, window=window),
        "ours, 1 thread": lambda: measure("ours", folder, workers=1, window=window),
        "ours, 2 threads": lambda: measure("ours", folder, workers=2, window=window),
        "ours, cached": lambda: measure("ours", folder, workers=2, window=window, cache=cache),
    }
    results = [{way: run() for way, run in ways.items()} for _ in range(repeats)]
    for way in ways:
        rates = [r[way]["rate"] for r in results]
        print(
            f"{name:10s} {way:22s} {statistics.median(rates):9.0f}/s ({min(rates):.0f} to {max(rates):.0f})"
            f"  x webdataset {statistics.median(r[way]['rate'] / r['plain webdataset']['rate'] for r in results):6.2f}"
            f"  of raw {statistics.median(r[way]['rate'] / r['raw read']['rate'] for r in results):5.2f}"
            f"  memory +{max(r[way]['grown'] for r in results):.0f} MiB"
        )


if __name__ == "__main__":
    run_app(main)
