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
import tempfile
from types import FrameType
from typing import Annotated

import typer

from ig_dist.errors import ConfigError
from ig_dist.terminal import console, is_first_process


def say(text: str) -> None:
    """Print once, however many processes there are."""
    if is_first_process():
        console.print(text, markup=False)


def encode(
    source: Annotated[
        str,
        typer.Option(
            help="Images: `digits`, `fashion-mnist`, ILSVRC2012_img_train.tar, the folder from Kaggle, a folder of"
            " class folders or of IDX files, WebDataset tars, or parquet files (path, 'glob*' or URL).",
        ),
    ],
    dest: Annotated[str, typer.Option(help="Folder for shards and index: a path or any fsspec URL.")],
    tokenizer: Annotated[
        str, typer.Option(help="`pixel`, sd-vae-ft-ema, sd-vae-ft-mse, va-vae-f16d32, or the path of weights.")
    ] = "pixel",
    image_size: Annotated[
        int | None, typer.Option(help="Side of the square images cut from pictures. Default with a VAE: 256.")
    ] = None,
    flips: Annotated[bool, typer.Option("--flips", help="Store the latents of the mirrored images too.")] = False,
    store: Annotated[
        str | None,
        typer.Option(help="`moments` (posterior mean and std) or `sample` (one draw). Default with a VAE: moments."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Arithmetic of the encoder: fp32, bf16, fp16. Default: bf16 on a GPU.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the global shuffle and of posterior draws.")] = 0,
    samples_per_shard: Annotated[
        int | None, typer.Option(min=1, help="Files in each shard but the last. Default: about 256 MB.")
    ] = None,
    max_rejected: Annotated[float, typer.Option(help="Fraction of the files that may be no pictures.")] = 0.01,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode. Default: the cores, 16 at most.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that the tokenizer encodes at a time.")] = 64,
    worker: Annotated[
        str | None, typer.Option(metavar="i/W", help="This is the i-th of W. Default: as torchrun or SLURM says.")
    ] = None,
    spool: Annotated[
        str | None,
        typer.Option(help="Folder for copies of remote tars and of parquet. Default: a temporary one."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will take; write nothing.")] = False,
    processes: Annotated[
        int, typer.Option("--processes", "--gpus", min=1, help="With --dry-run: hours for so many.")
    ] = 1,
) -> None:
    """Encode images into WebDataset shards of latents, with an index. Run it again, or on more machines, at will."""
    from ig_dist.data.sources import find_source, native_format, refuse_missing
    from ig_dist.encoding import prepare
    from ig_dist.encoding.display import summary
    from ig_dist.encoding.dry_run import estimate
    from ig_dist.encoding.encode import Job, existing_settings, finished_index
    from ig_dist.encoding.encode import encode as make_shards
    from ig_dist.encoding.records import Dest, refuse_others
    from ig_dist.encoding.settings import Settings, default_samples_per_shard, sample_tar_bytes
    from ig_dist.encoding.walk import this_worker
    from ig_dist.latents.tokenizers import get_tokenizer
    from ig_dist.storage.faults import Patience

    signal.signal(signal.SIGTERM, stop)
    # what is wrong with the options is said before any picture is read
    if not 0 <= max_rejected <= 1:
        raise ConfigError(f"--max-rejected {max_rejected:g} is not a fraction: use 0 to 1")
    refuse_missing(source)
    patience = Patience()
    folder = Dest(dest, patience)
    me = this_worker(worker)
    device = prepare.choose_device(me)
    arithmetic = prepare.choose_precision(precision, tokenizer, device)
    encoder = get_tokenizer(tokenizer, device=device, precision=arithmetic)
    native = native_format(source)
    size = prepare.choose_image_size(source, native, image_size, encoder)
    what = prepare.choose_store(store, encoder)
    prepare.refuse_dest_in_source(source, dest)
    existing = existing_settings(folder)

    found = find_source(source, spool, patience)
    say(f"{source}: {found.kind}")
    settings = Settings(
        source=found.name if native else f"{found.name}, {size} x {size}",
        tokenizer=encoder.name,
        tokenizer_sha256=encoder.sha256,
        precision=arithmetic,
        image_size=size,
        image_channels=native.channels if native else 3,
        store=what,
        flips=flips,
        seed=seed,
        samples_per_shard=samples_per_shard or (existing.samples_per_shard if existing else 1),
    )
    if existing is not None:
        refuse_others(folder, existing, settings)
        index = finished_index(folder, settings)
        if index is not None:
            shards = len(index.info.shards)
            say(f"{dest} is complete: {index.num_samples} samples in {shards} shards, nothing to do")
            return
    shape = prepare.latent_shape(encoder, settings)
    sample_bytes = sample_tar_bytes(shape, settings)
    with tempfile.TemporaryDirectory() as scratch:
        images, share = found.open_part(scratch) if dry_run and found.open_part else (found.open(), 1.0)
        total = round(len(images.labels) / share)
        if samples_per_shard is None and existing is None:
            settings = settings.model_copy(update={"samples_per_shard": default_samples_per_shard(total, sample_bytes)})
        decoders = prepare.choose_decoders(workers, me, total)
        if dry_run:
            for line in estimate(
                images, share, settings, encoder, device, batch_size, sample_bytes, decoders, processes
            ):
                say(line)
            return
    prepare.refuse_full_disk(folder, total * sample_bytes)
    index = make_shards(
        Job(
            source=images,
            where=source,
            dest=folder,
            settings=settings,
            tokenizer=encoder,
            device=device,
            shape=shape,
            worker=me,
            decoders=decoders,
            batch_size=batch_size,
            max_rejected=max_rejected,
        )
    )
    for line in summary(index):
        say(line)


def stop(number: int, frame: FrameType | None) -> None:
    """A signal ends this process; the shard that is being written is still finished, where the storage takes it."""
    print(
        f"stopped: {signal.Signals(number).name}; finished shards stay, run the same command again",
        file=sys.stderr,
        flush=True,
    )
    raise SystemExit(75)
