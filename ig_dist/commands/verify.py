"""Hold shards of latents against their index.

    ig-dist verify runs/digits-data
    ig-dist verify s3://bucket/imagenet-256 --picture samples.png
    ig-dist verify s3://bucket/imagenet-256 --fast

Every byte is read once: size, sha256, and each sample's place, CRC, label and finiteness, and the statistics.
``--fast`` checks sizes and one sample per shard. Nothing is changed. Exit code 0: all is well, 4: damage.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ig_dist.commands.options import AsJson
from ig_dist.errors import ConfigError, DamagedError, DataError
from ig_dist.terminal import console

if TYPE_CHECKING:
    from ig_dist.data.index import IndexFile, SampleTable, ShardIndex
    from ig_dist.data.verify import Verdict

_NAMED = 5  # damaged shards in the last line; all have a line of their own
_GRID_COLUMNS = 8


def remedy(info: IndexFile, shards: int) -> str:
    """How damaged shards are mended; ``shards`` is their number, 0: only the index is."""
    if info.foreign:
        restore = f"restore {'it' if shards == 1 else 'them'} from where they came from" if shards else ""
        index = "run ig-dist index --force again"
        return f"{restore}, or, if the index is older than the shards, {index}" if shards else index
    which = ["index.json", "this shard and index.json", "these shards and index.json"][min(shards, 2)]
    return f"delete {which}, then run the same encoding command again"


def draw_picture(index: ShardIndex, verdict: Verdict, number: int, seed: int, file: Path, place: str | None) -> str:
    """Decode samples of the sound shards into a picture; says what became of it."""
    import numpy as np
    import torch

    from ig_dist.autoencoders.tokenizers import get_tokenizer
    from ig_dist.data.reader import ShardReader
    from ig_dist.sampling.pictures import save_grid

    info = index.info
    try:
        tokenizer = get_tokenizer(place or info.tokenizer.name)
    except ConfigError as error:
        return f"no picture: {error}"
    if tokenizer.sha256 != info.tokenizer.sha256:
        return f"no picture: {tokenizer.name} on this machine is not the tokenizer of the index (sha256 differs)"
    sound = np.array([i for i, shard in enumerate(verdict.shards) if not shard.problems], np.int64)
    ends, first = np.cumsum(index.shard_sizes[sound]), index.first_ids
    total = int(ends[-1]) if len(ends) else 0
    reader = ShardReader(index, "skip")
    stored, labels = [], []
    for place in np.random.default_rng(seed).choice(total, min(number, total), replace=False):
        at = int(np.searchsorted(ends, place, side="right"))
        shard = int(sound[at])
        begin = int(place - ends[at] + index.shard_sizes[shard])
        sample = int(first[shard]) + begin
        latent, good = reader.read(shard, begin, begin + 1)
        if good[0]:
            stored.append(latent)
            labels.append(str(index.table.label[sample]))
        else:  # --fast has not seen it
            verdict.shards[shard].problems.append(f"sample {sample} has another CRC")
    if not stored:
        return "no picture: no shard is sound"
    latents = torch.from_numpy(np.concatenate(stored)).float()
    if info.latent.kind == "moments":
        latents = latents.chunk(2, dim=1)[0]  # the posterior's mean
    images = torch.cat([tokenizer.decode(part) for part in torch.split(latents, 8)]).numpy()
    if images.shape[-1] not in (1, 3):
        return f"no picture: the images have {images.shape[-1]} channels"
    blank = np.full((-len(images) % _GRID_COLUMNS, *images.shape[1:]), 255, np.uint8)
    padded = np.concatenate([images, blank]) if len(images) > _GRID_COLUMNS else images
    rows = [
        (" ".join(labels[i : i + _GRID_COLUMNS]), padded[i : i + _GRID_COLUMNS])
        for i in range(0, len(images), _GRID_COLUMNS)
    ]
    try:
        save_grid(rows, file, f"{len(images)} samples of {info.source}, decoded by {tokenizer.name}; with their labels")
    except (OSError, ValueError) as error:
        return f"no picture: {file} cannot be written ({error})"
    return f"picture: {file}"


def facts(info: IndexFile, table: SampleTable | None, verdict: Verdict, fast: bool, seconds: float) -> dict[str, Any]:
    """The result as JSON holds it."""
    import numpy as np

    from ig_dist.data.verify import TOLERANCE

    counts = None if table is None else table.class_counts(len(info.classes))
    read = sum(shard.bytes_read for shard in verdict.shards)
    return {
        "good": not (verdict.damaged or verdict.index_problems),
        "fast": fast,
        "shards": len(info.shards),
        "samples": sum(shard.samples for shard in info.shards),
        "damaged": {shard.name: shard.problems for shard in verdict.damaged},
        "index_problems": verdict.index_problems,
        "classes": len(info.classes),
        "samples_per_class": None if counts is None else [int(counts.min()), int(counts.max())],
        "empty_classes": None if counts is None else [info.classes[i] for i in np.flatnonzero(counts == 0)],
        "drift": verdict.drift and {**verdict.drift._asdict(), "tolerance": TOLERANCE},
        "orphans": verdict.orphans,
        "bytes_read": read,
        "seconds": round(seconds, 3),
    }


def show(result: dict[str, Any]) -> None:
    """The result as a table."""
    from rich.table import Table

    def some(names: list[str]) -> str:
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")

    read, seconds = result["bytes_read"], result["seconds"]
    rows = {
        "shards": f"{result['shards']}, {len(result['damaged'])} of them damaged",
        "samples": f"{result['samples']}",
        "read": f"{read / 1e6:,.1f} MB in {seconds:.1f} s: {read / 1e6 / max(seconds, 1e-3):,.0f} MB/s"
        + (" (one sample a shard)" if result["fast"] else ""),
    }
    if result["samples_per_class"]:
        low, high = result["samples_per_class"]
        empty = result["empty_classes"]
        rows["classes"] = f"{result['classes']}, {low} to {high} samples each"
        rows["classes"] += f"; {len(empty)} without any: {some(empty)}" if empty else ""
    if drift := result["drift"]:
        rows["statistics"] = (
            f"off the index's by at most {drift['mean']:.1g} std (means) and {drift['std']:.1g} (stds, relative);"
            f" tolerance {drift['tolerance']:g}"
        )
    else:
        rows["statistics"] = "not compared: not every sample was read"
    rows["other files there"] = some(result["orphans"]) or "none"
    table = Table("what", "found", show_header=False)
    for key, value in rows.items():
        table.add_row(key, value)
    console.print(table)


def verify(
    url: Annotated[str, typer.Argument(metavar="URL", help="The index's folder, or index.json: path or fsspec URL.")],
    fast: Annotated[bool, typer.Option("--fast", help="Only sizes, and one sample per shard.")] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Decode random samples into this picture (PNG).")
    ] = None,
    decode: Annotated[int, typer.Option(min=1, metavar="N", help="Samples in the picture.")] = 32,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PLACE", help="Weights for the picture. Default: by the index's name.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="SEED", help="Chooses the samples of --picture and --fast.")] = 0,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Threads, a shard each.")] = min(
        16, 2 * (os.cpu_count() or 1)
    ),
    as_json: AsJson = False,
) -> None:
    """Hold shards of latents against their index."""
    from ig_dist.data.index import ShardIndex, read_index_file, read_table
    from ig_dist.data.verify import verify_shards

    console.stderr = as_json  # stdout is the JSON alone
    folder, info, sha256 = read_index_file(url, "INDEX")
    table, table_problem = None, []
    try:
        table = read_table(folder, info, whole=True)
    except (ConfigError, DamagedError) as error:
        table_problem = [str(error)]
    began = time.perf_counter()
    verdict = verify_shards(folder, info, table, fast=fast, seed=seed, workers=workers)
    verdict.index_problems[:0] = table_problem
    seconds = time.perf_counter() - began
    drawn = None
    if picture is not None:
        drawn = "no picture: without a sound index no sample is found"
        if table is not None:
            drawn = draw_picture(ShardIndex(folder, info, table, sha256), verdict, decode, seed, picture, tokenizer)
        console.print(drawn)
    for shard in verdict.damaged:
        console.print(f"damaged: {folder}/{shard.name}: {'; '.join(shard.problems)}: {remedy(info, 1)}")
    for problem in verdict.index_problems:
        console.print(f"damaged: {folder}/index.json: {problem}: {remedy(info, 0)}")
    result = facts(info, table, verdict, fast, seconds)
    if as_json:
        print(
            json.dumps({"index": f"{folder}/index.json", "index_sha256": sha256, **result, "picture": drawn}, indent=1)
        )
    else:
        show(result)
    if verdict.damaged:
        names = [shard.name for shard in verdict.damaged]
        more = f" and {len(names) - _NAMED} more" if names[_NAMED:] else ""
        raise DataError(
            f"{folder}: {len(names)} of {len(info.shards)} shards are damaged ({', '.join(names[:_NAMED])}{more}):"
            f" {remedy(info, len(names))}"
        )
    if verdict.index_problems:
        raise DataError(f"{folder}/index.json: {verdict.index_problems[0]}: {remedy(info, 0)}")
