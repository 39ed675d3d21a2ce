"""What `ig-dist encode` costs beside decoding the pictures, which is what bounds it.

    python benchmarks/encoding.py --rounds 5        # two minutes on one core, one on two

Pictures are made here: JPEGs of ImageNet's sizes and bytes (500 x 375, 110 KB on average), smooth noise of many scales.
Decoding alone is one process that decodes and cuts them to 256 x 256, as ImageNet is for the published models. An
encoding has a decoding process on each core, and its own work beside them; it writes whole shards, and no start-up is
in it. `pixel` stores 393 KB an image, 24 times what SD-VAE's moments weigh. `moments` stores arrays of the VAE's shape
that cost no arithmetic: what a GPU's encoding leaves to the cores.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.side_by_side import Record, Result, Rounds, interleaved, ratio, show, show_results
from ig_dist.autoencoders.tokenizers import PIXEL, Tokenizer
from ig_dist.data.sources import Source, find_source
from ig_dist.encoding.encode import Job, encode
from ig_dist.encoding.loader import Request, decode
from ig_dist.encoding.records import Dest
from ig_dist.encoding.settings import Settings
from ig_dist.terminal import run_app
from ig_dist.this_process import Process

SIZES = ((500, 375), (500, 333), (375, 500), (500, 375), (640, 480), (400, 300))  # ImageNet's commonest
SIZE, CLASSES, DIFFERENT, OCTAVES, FALL = 256, 8, 256, range(2, 9), 0.85
BATCH, SHARD = 16, 128


def picture(number: int) -> Image.Image:
    """Smooth noise of many scales, which compresses about as a photograph does."""
    random = np.random.default_rng(number)
    width, height = SIZES[int(random.integers(len(SIZES)))]
    total = np.zeros((height, width, 3), np.float32)
    for octave in OCTAVES:
        coarse = random.standard_normal((3, max(2, 2**octave * height // width), 2**octave)).astype(np.float32)
        for channel, values in enumerate(coarse):
            smooth = Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)
            total[..., channel] += FALL**octave * np.asarray(smooth)
    return Image.fromarray(np.clip(128 + 60 * total / total.std(), 0, 255).astype(np.uint8))


def pictures(folder: Path, count: int) -> Path:
    """Class folders of JPEGs; each is there under several names."""
    made: list[Path] = []
    for number in range(count):
        file = folder / f"class{number % CLASSES}" / f"{number:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        if number < DIFFERENT:
            picture(number).save(file, quality=95)
            made.append(file)
        else:
            file.hardlink_to(made[number % DIFFERENT])
    return folder


def moments(images: Tensor) -> Tensor:
    """Arrays of SD-VAE's shape, (B, 8, 32, 32), from one of 64 pixels."""
    few = images[:, ::8, ::8].permute(0, 3, 1, 2).float().div_(127.5)
    return torch.cat([few, few[:, :1]] * 2, dim=1)


SHAPES = replace(PIXEL, name="shapes of moments", downsample=8, stochastic=True, scale=0.18215, encode=moments)


def encoding(source: Source, folder: Path, tokenizer: Tokenizer, workers: int) -> Callable[[], float]:
    """A way that encodes the source anew into the folder, and says how long it took."""
    settings = Settings(
        source=source.name, tokenizer=tokenizer.name, tokenizer_sha256=tokenizer.sha256, precision="fp32",
        image_size=SIZE, image_channels=3, store="moments" if tokenizer.stochastic else "sample", flips=False,
        seed=0, samples_per_shard=SHARD,
    )  # fmt: skip
    shape = (4, 32, 32) if tokenizer.stochastic else (3, SIZE, SIZE)
    dest, worker = folder / tokenizer.name, Process(0, 1, 0, 1, 0)

    def run() -> float:
        shutil.rmtree(dest, ignore_errors=True)
        device = torch.device("cpu")
        began = time.perf_counter()
        job = (source, "pictures", Dest(str(dest)), settings, tokenizer, device, shape, worker, workers, BATCH, 0.0)
        encode(Job(*job))
        return time.perf_counter() - began

    return run


def main(
    rounds: Rounds = 5,
    images: Annotated[int, typer.Option(min=CLASSES, help="Pictures.")] = 1024,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that decode. Default: the cores.")] = None,
    folder: Annotated[Path | None, typer.Option(help="On the disk to write to. Default: the temporary one.")] = None,
    record: Record = False,
) -> None:
    """Print rates of decoding and encoding, and the share that encoding has of decoding."""
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source = find_source(str(pictures(Path(scratch) / "pictures", images))).open()
        items = [source.item(number) for number in range(images)]

        def decode_some() -> float:
            """Of the different ones, as if of all."""
            some, began = min(DIFFERENT, images), time.perf_counter()
            for begin in range(0, some, BATCH):
                numbers = list(range(begin, min(begin + BATCH, some)))
                decode(Request(0, True, numbers, items[begin : begin + len(numbers)]), SIZE, 3)
            return (time.perf_counter() - began) * images / some

        count = workers or cores
        times = interleaved(
            {
                "decoding alone, one process": decode_some,
                "pixel": encoding(source, Path(scratch), PIXEL, count),
                "moments": encoding(source, Path(scratch), SHAPES, count),
            },
            rounds,
        )
    show(times, [], title=f"{images} pictures, {count} decoding processes on {cores} cores")
    alone, results = times["decoding alone, one process"], []
    for name, limit in (("pixel", ""), ("moments", ">= 0.9")):
        share = ratio([seconds / cores for seconds in alone], times[name])
        results.append(Result(f"encoding {name} at 256 px, rate / (decoding alone x {cores} cores)", *share, limit))
    show_results(results, record=record)


if __name__ == "__main__":
    run_app(main)
