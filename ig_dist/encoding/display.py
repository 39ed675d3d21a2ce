"""What an encoding says in the end: what was made, and what to type next."""

from __future__ import annotations

import shlex
from pathlib import PurePosixPath

from rich.filesize import decimal

from ig_dist.data.index import ShardIndex

_LISTED_CHANNELS = 8  # more are summed up


def summary(index: ShardIndex) -> list[str]:
    """Lines that say what an index holds, and what to type next."""
    info = index.info
    counts = index.table.class_counts(len(info.classes))
    stored = sum(shard.bytes for shard in info.shards)
    shape = "x".join(map(str, info.latent.shape))
    kind = "posterior moments of " if info.latent.kind == "moments" else ""
    flips = ", and those of the mirrored images" if info.latent.flips else ""
    size = info.tokenizer.image_size
    rejected = f"{info.rejected} rejected" + (f" ({index.folder}/rejected.csv)" if info.rejected else "")
    return [
        f"{index.num_samples} images of {len(info.classes)} classes ({counts.min()} to {counts.max()} a class) ->"
        f" {len(info.shards)} shards of {kind}{shape} latents{flips} in {index.folder} ({decimal(stored)})",
        f"{rejected}, {info.upscaled} upscaled from less than {size} x {size}",
        f"latents as the model sees them, per channel: mean {_numbers(info.statistics.mean)},"
        f" std {_numbers(info.statistics.std)}",
        f"index: {index.folder}/index.json",
        f"next: {_training(index)}",
    ]


def _training(index: ShardIndex) -> str:
    """The command that trains on the latents, with a config that fits them."""
    info, name = index.info, PurePosixPath(index.folder).name
    run = name.removesuffix("-data") if name.endswith("-data") else f"{name}-run"
    fitting = {(4, 32, 32): "sit_xl2_ig", (32, 16, 16): "lightningdit_xl1_ig"}
    config = "digits" if info.tokenizer.name == "pixel" else fitting.get(info.latent.shape, "CONFIG")
    return shlex.join(["ig-dist", "train", config, f"data.index={index.folder}", f"run.dir=runs/{run}"])


def _numbers(values: list[float]) -> str:
    if len(values) > _LISTED_CHANNELS:
        return f"{min(values):.3f} to {max(values):.3f}"
    return " ".join(f"{value:.3f}" for value in values)
