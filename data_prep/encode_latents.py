"""Encode images into WebDataset shards of latents, with an index.

    python data_prep/encode_latents.py --source digits --dest runs/digits-data --tokenizer pixel
    python data_prep/encode_latents.py --source pictures --dest runs/pictures-data --tokenizer pixel --image-size 16

Samples are shuffled globally by the seed; shard k holds samples k S to (k + 1) S of that order. Each shard is
written whole or not at all, the index last: run the same command again after an interruption. Memory holds the
images of one shard.
"""

from __future__ import annotations

import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.progress import track

from ig_dist.errors import ConfigError
from ig_dist.storage import open_url, write_whole
from ig_dist.terminal import console, run_app

if TYPE_CHECKING:
    from ig_dist.data.sources import ImageSource


def encode(
    source: ImageSource, dest: str, tokenizer_name: str, seed: int, samples_per_shard: int, workers: int
) -> None:
    """Write the shards and the index of ``source`` to ``dest`` (a path or any fsspec URL)."""
    import torch

    from ig_dist.data.images import RejectedImage
    from ig_dist.data.index import SampleTable, read_index, write_index
    from ig_dist.data.shards import SampleRow, pack_shard, scan_shard
    from ig_dist.latents.tokenizers import get_tokenizer
    from ig_dist.rng import Purpose, permutation

    tokenizer = get_tokenizer(tokenizer_name)
    dest = dest.rstrip("/")
    fs, path = open_url(dest, "--dest")
    if fs.exists(f"{path}/index.json"):
        old = read_index(dest)
        settings = (old.info.source, old.info.tokenizer.sha256, old.info.seed, old.info.shards[0].samples)
        if settings != (source.name, tokenizer.sha256, seed, min(samples_per_shard, len(source.labels))):
            raise ConfigError(
                f"--dest {dest} holds shards made with other settings or images: choose another, or delete it"
            )
        console.print(f"{dest} is complete: {old.num_samples} samples in {len(old.info.shards)} shards, nothing to do")
        return
    fs.makedirs(path, exist_ok=True)

    order = permutation(seed, Purpose.ENCODE_ORDER, 0, len(source.labels)).numpy()
    rows: list[SampleRow] = []
    shards = []
    channel_sums = []
    for number, start in enumerate(track(range(0, len(order), samples_per_shard), "encode", console=console)):
        chosen = order[start : start + samples_per_shard]
        try:
            with ThreadPoolExecutor(workers) as pool:
                images = np.stack(list(pool.map(source.read, chosen)))
        except RejectedImage as rejection:
            raise ConfigError(
                f"an image changed while it was encoded ({rejection}): run the same command again"
            ) from None
        latents = tokenizer.encode(torch.from_numpy(images)).numpy().astype(np.float16)
        data = pack_shard([f"{i:08d}" for i in chosen], latents, source.labels[chosen])
        name = f"shard-{number:06d}.tar"
        write_whole(fs, f"{path}/{name}", data)
        rows.extend(scan_shard(io.BytesIO(data), latents.dtype, latents.shape[1:]))
        digest = hashlib.sha256(data).hexdigest()
        shards.append({"name": name, "bytes": len(data), "samples": len(chosen), "sha256": digest})
        values = latents.astype(np.float64)
        channel_sums.append([values.sum((0, 2, 3)), (values**2).sum((0, 2, 3))])
    channels, height, width = latents.shape[1:]
    mean, square = np.sum(channel_sums, axis=0) / (len(order) * height * width)
    write_index(
        dest,
        {
            "source": source.name,
            "seed": seed,
            "tokenizer": {
                "name": tokenizer.name,
                "sha256": tokenizer.sha256,
                "image_size": images.shape[1],
                "image_channels": images.shape[3],
            },
            "latent": {
                "kind": "sample",
                "shape": (channels, height, width),
                "dtype": "float16",
                "shift": [0.0] * channels,
                "scale": [1.0] * channels,
            },
            "classes": source.classes,
            "statistics": {"mean": mean.tolist(), "std": np.sqrt(square - mean**2).tolist()},
            "shards": shards,
        },
        SampleTable.from_rows(rows),
    )
    counts = np.bincount(source.labels, minlength=len(source.classes))
    console.print(
        f"{len(order)} images of {len(source.classes)} classes ({counts.min()} to {counts.max()} a class) ->"
        f" {len(shards)} shards of {channels}x{height}x{width} latents in {dest}"
    )


def read_folder(folder: Path, dest: str, size: int, max_rejected: float, workers: int) -> ImageSource:
    """The pictures of a folder of class folders. Rejected files go to ``rejected.csv`` in ``dest``.

    Raises:
        ConfigError: more than ``max_rejected`` of the files are rejected, or the folder is not laid out as it must be.
    """
    from ig_dist.data.sources import check_pictures, folder_source, list_folder, rejected_csv

    if "://" not in dest and Path(dest).resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"--dest {dest} lies in --source {folder}, where shards would count as pictures: move it out")
    listing = list_folder(folder)
    checked = check_pictures(listing, size, workers)
    fs, path = open_url(dest, "--dest")
    file = f"{path}/rejected.csv"
    complete = fs.exists(f"{path}/index.json")  # then the list there belongs to other shards, or is the same
    too_many = len(checked.rejected) > max_rejected * len(listing.paths)
    source = None if too_many else folder_source(listing, checked.accepted, size)
    if checked.rejected and not complete:
        fs.makedirs(path, exist_ok=True)
        fs.pipe_file(file, rejected_csv(checked.rejected))
    elif not complete and fs.exists(file):  # of an earlier try
        fs.rm_file(file)
    if source is None:
        first, reason = checked.rejected[0]
        where = "" if complete else f" (all in {dest}/rejected.csv)"
        raise ConfigError(
            f"--source {folder}: {len(checked.rejected)} of {len(listing.paths)} files are rejected, the first is"
            f" {first}: {reason}{where}; mend or remove them, or raise --max-rejected {max_rejected:g}"
        )
    rejected = f"{len(checked.rejected)} rejected" + (f" ({dest}/rejected.csv)" if checked.rejected else "")
    console.print(f"{source.name}: {rejected}, {checked.upscaled} upscaled from less than {size} x {size}")
    return source


def main(
    source: Annotated[
        str,
        typer.Option(help="Images to encode: `digits` (scikit-learn's 8 x 8 digits), or a folder of class folders."),
    ],
    dest: Annotated[str, typer.Option(help="Folder for shards and index: a path or any fsspec URL.")],
    tokenizer: Annotated[str, typer.Option(help="Tokenizer: `pixel`.")] = "pixel",
    image_size: Annotated[int | None, typer.Option(help="Side of the square images cut from a folder's.")] = None,
    max_rejected: Annotated[float, typer.Option(help="Fraction of a folder's files that may be no pictures.")] = 0.01,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode pictures.")] = min(16, os.cpu_count() or 1),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the global shuffle.")] = 0,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples in each shard but the last.")] = 256,
) -> None:
    """Encode images into WebDataset shards of latents, with an index."""
    from ig_dist.data.sources import digits
    from ig_dist.latents.tokenizers import get_tokenizer

    get_tokenizer(tokenizer)  # an unknown name is said before any picture is read
    if not 0 <= max_rejected <= 1:
        raise ConfigError(f"--max-rejected {max_rejected:g} is not a fraction: use 0 to 1")
    if source == "digits":
        if image_size is not None:
            raise ConfigError("--image-size is for folders of pictures, the digits are 8 x 8: leave it out")
        images = digits()
    elif not Path(source).is_dir():
        what = "is a file" if Path(source).exists() else "does not exist"
        raise ConfigError(
            f"--source {source!r} {what}: use `digits`, or a folder with one sub-folder of pictures per class"
        )
    elif image_size is None:
        raise ConfigError(f"--source {source} needs --image-size, the side of the square images, e.g. --image-size 16")
    elif image_size < 1:
        raise ConfigError(f"--image-size {image_size} is not positive: use e.g. --image-size 16")
    else:
        images = read_folder(Path(source), dest, image_size, max_rejected, workers)
    encode(images, dest, tokenizer, seed, samples_per_shard, workers)


if __name__ == "__main__":
    run_app(main)
