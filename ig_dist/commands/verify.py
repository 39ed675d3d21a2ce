"""Hold shards of latents against their index.

Every byte is read once: size, sha256, and each sample's place, CRC, label and finiteness, and the statistics.
``--fast`` checks sizes and one sample per shard. Nothing is changed. Exit code 0: all is well, 4: damage.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ig_dist.commands.options import WORKERS, AsJson, Workers, argument, flag, option, print_json
from ig_dist.errors import ConfigError, DamagedError, DataError, StorageError
from ig_dist.terminal import console

if TYPE_CHECKING:
    from ig_dist.data.index import IndexFile, SampleTable, ShardIndex
    from ig_dist.data.verify import Verdict

_NAMED = 5  # damaged shards in the last line; all have a line of their own


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

    from ig_dist.features.images import index_images
    from ig_dist.sampling.pictures import pictures_in_rows

    try:
        decoded = index_images(index, place or "")
    except ConfigError as error:
        return f"no picture: {str(error).replace('sample.tokenizer', '--tokenizer')}"
    shard_of = np.repeat(np.arange(len(index.shard_sizes)), index.shard_sizes)
    sound = np.flatnonzero(np.array([not shard.problems for shard in verdict.shards])[shard_of])
    images, labels = [], []
    for sample in map(int, np.random.default_rng(seed).choice(sound, min(number, len(sound)), replace=False)):
        try:
            images.append(decoded.read(range(sample, sample + 1)).images[0])
        except StorageError:
            raise
        except DataError:  # --fast has not seen it
            verdict.shards[shard_of[sample]].problems.append(f"sample {sample} has another CRC")
        else:
            labels.append(str(index.table.label[sample]))
    if not images:
        return "no picture: no shard is sound"
    if images[0].shape[-1] not in (1, 3):
        return f"no picture: the images have {images[0].shape[-1]} channels"
    title = f"{len(images)} samples of {index.info.source}, decoded by {index.info.tokenizer.name}; with their labels"
    rows = [("", np.stack(images[i : i + 8]), labels[i : i + 8]) for i in range(0, len(images), 8)]
    try:
        pictures_in_rows(rows, title).save(file)
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

    table = Table("what", "found", show_header=False)
    table.add_row("shards", f"{result['shards']}, {len(result['damaged'])} of them damaged")
    table.add_row("samples", f"{result['samples']}")
    megabytes, seconds, few = result["bytes_read"] / 1e6, result["seconds"], " (one sample a shard)" * result["fast"]
    speed = f"{megabytes / max(seconds, 1e-3):,.0f} MB/s"
    table.add_row("read", f"{megabytes:,.1f} MB in {seconds:.1f} s: {speed}{few}")
    if result["samples_per_class"]:
        low, high = result["samples_per_class"]
        empty = result["empty_classes"]
        without = f"; {len(empty)} without any: {some(empty)}" if empty else ""
        table.add_row("classes", f"{result['classes']}, {low} to {high} samples each{without}")
    compared = "not compared: not every sample was read"
    if drift := result["drift"]:
        off = f"off the index's by at most {drift['mean']:.1g} std (means) and {drift['std']:.1g} (stds, relative)"
        compared = f"{off}; tolerance {drift['tolerance']:g}"
    table.add_row("statistics", compared)
    table.add_row("other files there", some(result["orphans"]) or "none")
    console.print(table)


def verify(
    url: Annotated[str, argument("URL", "The index's folder, or index.json: path or fsspec URL.")],
    fast: Annotated[bool, flag("--fast", "Only sizes, and one sample per shard.")] = False,
    picture: Annotated[Path | None, option("FILE", "Decode random samples into this picture (PNG).")] = None,
    decode: Annotated[int, option("N", "Samples in the picture.", min=1)] = 32,
    tokenizer: Annotated[str | None, option("PLACE", "Weights for the picture. Default: by the index's name.")] = None,
    seed: Annotated[int, option("SEED", "Chooses the samples of --picture and --fast.", min=0)] = 0,
    workers: Workers = WORKERS,
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
        print_json({"index": f"{folder}/index.json", "index_sha256": sha256, **result, "picture": drawn})
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
