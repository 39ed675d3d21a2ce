"""Encode images into WebDataset shards of latents, with an index.

    ig-dist encode --source digits --dest runs/digits-data --tokenizer pixel
    ig-dist encode --source pictures --dest runs/pictures-data --tokenizer pixel --image-size 16
    torchrun --nproc-per-node 8 -m ig_dist.cli encode --source ILSVRC2012_img_train.tar \
        --dest s3://bucket/imagenet-256 --tokenizer sd-vae-ft-ema

Images are shuffled globally by the seed; shard k is made of places k S to (k + 1) S of that order. Any number of
processes may run the same command, on one machine or many: each makes shards that are missing. A shard is written
whole or not at all, the index last: after an interruption run the same command again.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Annotated

import typer


def encode(
    source: Annotated[
        str,
        typer.Option(
            metavar="SRC",
            help="Images: `digits`, `fashion-mnist`, ILSVRC2012_img_train.tar, the folder from Kaggle, a folder of"
            " class folders or of IDX files, WebDataset tars, or parquet files (path, 'glob*' or URL).",
        ),
    ],
    dest: Annotated[str, typer.Option(metavar="URL", help="Folder for shards and index: a path or any fsspec URL.")],
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="`pixel`, sd-vae-ft-ema, sd-vae-ft-mse, va-vae-f16d32, or the path of weights."
        ),
    ] = "pixel",
    image_size: Annotated[
        int | None,
        typer.Option(metavar="N", help="Side of the square images cut from pictures. Default with a VAE: 256."),
    ] = None,
    flips: Annotated[bool, typer.Option("--flips", help="Store the latents of the mirrored images too.")] = False,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="`moments` (posterior mean and std) or `sample` (one draw). Default with a VAE: moments.",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Arithmetic of the encoder: fp32, bf16, fp16. Default: bf16 on a GPU."),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="SEED", min=0, help="Seed of the global shuffle and of posterior draws.")
    ] = 0,
    samples_per_shard: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Files in each shard but the last. Default: about 256 MB.")
    ] = None,
    max_rejected: Annotated[
        float, typer.Option(metavar="X", help="Fraction of the files that may be no pictures.")
    ] = 0.01,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Processes that decode. Default: the cores, 16 at most.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Images that the tokenizer encodes at a time. Default: 64, on a CPU 16."),
    ] = None,
    worker: Annotated[
        str | None, typer.Option(metavar="i/W", help="This is the i-th of W. Default: as torchrun or SLURM says.")
    ] = None,
    spool: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Folder for copies of remote tars and of parquet. Default: a temporary one."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will take; write nothing.")] = False,
    processes: Annotated[
        int, typer.Option("--processes", "--gpus", metavar="N", min=1, help="With --dry-run: hours for so many.")
    ] = 1,
) -> None:
    """Encode images into WebDataset shards of latents, with an index. Run it again, or on more machines, at will."""
    from ig_dist.encoding.run import encode as run_encoding

    signal.signal(signal.SIGTERM, stop)
    run_encoding(
        source,
        dest,
        tokenizer,
        image_size=image_size,
        flips=flips,
        store=store,
        precision=precision,
        seed=seed,
        samples_per_shard=samples_per_shard,
        max_rejected=max_rejected,
        workers=workers,
        batch_size=batch_size,
        worker=worker,
        spool=spool,
        dry_run=dry_run,
        processes=processes,
    )


def stop(number: int, frame: FrameType | None) -> None:
    """A signal ends this process; the shard that is being written is still finished, where the storage takes it."""
    print(
        f"stopped: {signal.Signals(number).name}; finished shards stay, run the same command again",
        file=sys.stderr,
        flush=True,
    )
    raise SystemExit(75)
