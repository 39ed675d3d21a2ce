"""Encode images into WebDataset shards of latents, with an index.

    python data_prep/encode_latents.py --source digits --dest runs/digits-data --tokenizer pixel

Samples are shuffled globally by the seed; shard k holds samples k S to (k + 1) S of that order. Each shard is
written whole or not at all, the index last: run the same command again after an interruption.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, NamedTuple

import fsspec
import numpy as np
import typer
from numpy.typing import NDArray
from rich.progress import track

from ig_dist.errors import ConfigError
from ig_dist.terminal import console, run_app


class ImageSource(NamedTuple):
    """A set of labelled images held in memory."""

    name: str
    images: NDArray[np.uint8]  # (N, H, W, channels)
    labels: NDArray[np.int64]  # (N,)
    classes: list[str]


def digits() -> ImageSource:
    """The 1,797 real 8 x 8 grey digits that scikit-learn carries, as uint8."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
    return ImageSource("scikit-learn digits", images, data.target.astype(np.int64), [str(d) for d in range(10)])


def encode(source: ImageSource, dest: str, tokenizer_name: str, seed: int, samples_per_shard: int) -> None:
    """Write the shards and the index of ``source`` to ``dest`` (a path or any fsspec URL)."""
    import torch

    from ig_dist.data.index import SampleTable, read_index, write_index
    from ig_dist.data.shards import SampleRow, pack_shard, scan_shard
    from ig_dist.latents.tokenizers import get_tokenizer
    from ig_dist.rng import Purpose, permutation

    tokenizer = get_tokenizer(tokenizer_name)
    dest = dest.rstrip("/")
    fs, path = fsspec.core.url_to_fs(dest)
    if fs.exists(f"{path}/index.json"):
        old = read_index(dest)
        settings = (old.info.source, old.info.tokenizer.sha256, old.info.seed, old.info.shards[0].samples)
        if settings != (source.name, tokenizer.sha256, seed, min(samples_per_shard, len(source.labels))):
            raise ConfigError(f"--dest {dest} holds shards made with other settings: choose another, or delete it")
        console.print(f"{dest} is complete: {old.num_samples} samples in {len(old.info.shards)} shards, nothing to do")
        return
    fs.makedirs(path, exist_ok=True)

    order = permutation(seed, Purpose.ENCODE_ORDER, 0, len(source.labels)).numpy()
    rows: list[SampleRow] = []
    shards = []
    channel_sums = []
    for number, start in enumerate(track(range(0, len(order), samples_per_shard), "encode", console=console)):
        chosen = order[start : start + samples_per_shard]
        latents = tokenizer.encode(torch.from_numpy(source.images[chosen])).numpy().astype(np.float16)
        data = pack_shard([f"{i:08d}" for i in chosen], latents, source.labels[chosen])
        name = f"shard-{number:06d}.tar"
        fs.pipe_file(f"{path}/{name}.tmp", data)
        fs.mv(f"{path}/{name}.tmp", f"{path}/{name}")
        rows.extend(scan_shard(data, latents.dtype, latents.shape[1:]))
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
                "image_size": source.images.shape[1],
                "image_channels": source.images.shape[3],
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


def main(
    source: Annotated[str, typer.Option(help="Images to encode: `digits` (scikit-learn's 8 x 8 digits).")],
    dest: Annotated[str, typer.Option(help="Folder for shards and index: a path or any fsspec URL.")],
    tokenizer: Annotated[str, typer.Option(help="Tokenizer: `pixel`.")] = "pixel",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the global shuffle.")] = 0,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples in each shard but the last.")] = 256,
) -> None:
    """Encode images into WebDataset shards of latents, with an index."""
    if source != "digits":
        raise ConfigError(f"--source {source!r} is not known: use `digits`")
    encode(digits(), dest, tokenizer, seed, samples_per_shard)


if __name__ == "__main__":
    run_app(main)
