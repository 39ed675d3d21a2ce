"""The body of ``ig-dist encode`` and of ``ig_dist.encode``: from what is asked for to finished shards."""

import os
import shlex
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import cast, get_args

import torch
from rich.filesize import decimal

from ig_dist.autoencoders import tokenizers
from ig_dist.autoencoders.tokenizers import Precision, Tokenizer
from ig_dist.data.index import ShardIndex
from ig_dist.data.sources import Native, find_source, is_name, native_format, refuse_missing
from ig_dist.encoding.encode import Job, estimate, existing_settings, finished_index
from ig_dist.encoding.encode import encode as make_shards
from ig_dist.encoding.records import Dest, refuse_others
from ig_dist.encoding.settings import Settings, Store, default_samples_per_shard, sample_tar_bytes
from ig_dist.errors import ConfigError
from ig_dist.storage.faults import Patience
from ig_dist.storage.urls import is_local
from ig_dist.terminal import console, is_first_process
from ig_dist.this_process import Process, this_device, this_process

MAX_DECODERS = 16
FEW_IMAGES = 2000  # decoded sooner than processes start
VAE_IMAGE_SIZE = 256
BATCH_SIZE = {"cuda": 64, "cpu": 16}  # what a CPU works on should stay in its cache
_LISTED_CHANNELS = 8  # more are summed up


def encode(
    source: str | Path,
    dest: str | Path,
    tokenizer: str = "pixel",
    *,
    image_size: int | None = None,
    flips: bool = False,
    store: str | None = None,
    precision: str | None = None,
    seed: int = 0,
    samples_per_shard: int | None = None,
    max_rejected: float = 0.01,
    workers: int | None = None,
    batch_size: int | None = None,
    worker: str | None = None,
    spool: str | None = None,
    dry_run: bool = False,
    processes: int = 1,
) -> str:
    """Encode images into WebDataset shards of latents, with an index; what exists is not made again.

    Args:
        source: ``digits``, ``fashion-mnist``, a folder of class folders or of IDX files, ILSVRC2012_img_train.tar, the
            folder from Kaggle, WebDataset tars, or parquet files (path, glob or URL).
        dest: folder for shards and index: a path or any fsspec URL.
        tokenizer: ``pixel``, sd-vae-ft-ema, sd-vae-ft-mse, va-vae-f16d32, or the path of weights.
        image_size: side of the square images cut from pictures; None with a VAE: 256.
        flips: store the latents of the mirrored images too.
        store: ``moments`` (posterior mean and std) or ``sample`` (one draw); None with a VAE: moments.
        precision: arithmetic of the encoder: fp32, bf16 or fp16; None: bf16 on a GPU.
        seed: of the global shuffle and of posterior draws.
        samples_per_shard: files in each shard but the last; None: about 256 MB.
        max_rejected: fraction of the files that may be no pictures.
        workers: processes that decode; None: the cores, 16 at most.
        batch_size: images that the tokenizer encodes at a time; None: 64, on a CPU 16.
        worker: "i/W": this is the i-th of W; None: as torchrun or SLURM says.
        spool: folder for copies of remote tars and of parquet; None: a temporary one.
        dry_run: say what it will take; write nothing.
        processes: with dry_run: hours for so many.

    Returns:
        The folder of shards and index, for ``data.index``.

    Raises:
        ConfigError: the source, or what is asked of it, does not fit.
        DataError: the source or the storage fails.
    """
    source, dest = str(source), str(dest)
    # what is wrong with the options is said before any picture is read
    if not 0 <= max_rejected <= 1:
        raise ConfigError(f"--max-rejected {max_rejected:g} is not a fraction: use 0 to 1")
    refuse_missing(source)
    patience = Patience()
    folder = Dest(dest, patience)
    me = this_process(worker, arrays=True)
    device = this_device(me)
    batch_size = batch_size or BATCH_SIZE[device.type]
    arithmetic = choose_precision(precision, tokenizer, device)
    encoder = tokenizers.get_tokenizer(tokenizer, device=device, precision=arithmetic)
    native = native_format(source)
    size = choose_image_size(source, native, image_size, encoder)
    what = choose_store(store, encoder)
    refuse_dest_in_source(source, dest)
    existing = existing_settings(folder)

    found = find_source(source, spool, patience)
    _say(f"{source}: {found.kind}")
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
            _say(f"{dest} is complete: {index.num_samples} samples in {shards} shards, nothing to do")
            return dest
    shape = encoder.latent_shape(size, settings.image_channels)
    sample_bytes = sample_tar_bytes(shape, settings)
    with tempfile.TemporaryDirectory() as scratch:
        images, share = found.open_part(scratch) if dry_run and found.open_part else (found.open(), 1.0)
        total = round(len(images.labels) / share)
        if samples_per_shard is None and existing is None:
            settings = settings.model_copy(update={"samples_per_shard": default_samples_per_shard(total, sample_bytes)})
        job = Job(
            source=images,
            where=source,
            dest=folder,
            settings=settings,
            tokenizer=encoder,
            device=device,
            shape=shape,
            worker=me,
            decoders=choose_decoders(workers, me, total),
            batch_size=batch_size,
            max_rejected=max_rejected,
        )
        if dry_run:
            _say(*estimate(job, share, sample_bytes, processes))
            return dest
    refuse_full_disk(folder, total * sample_bytes)
    _say(*_summary(make_shards(job)))
    return dest


def choose_precision(precision: str | None, tokenizer: str, device: torch.device) -> Precision:
    """The arithmetic of the encoder: bf16 on a GPU, fp32 elsewhere and where nothing is computed."""
    if precision is None:
        return "bf16" if device.type == "cuda" and tokenizer != "pixel" else "fp32"
    if precision not in get_args(Precision):
        raise ConfigError(f"--precision {precision!r} is unknown: use {', '.join(get_args(Precision))}")
    return cast(Precision, precision)


def choose_store(store: str | None, tokenizer: Tokenizer) -> Store:
    """What is stored: the moments of a posterior where there is one."""
    if store is None:
        return "moments" if tokenizer.stochastic else "sample"
    if store not in get_args(Store):
        raise ConfigError(f"--store {store!r} is unknown: use {' or '.join(get_args(Store))}")
    if store == "moments" and not tokenizer.stochastic:
        raise ConfigError(f"--store moments needs a posterior, {tokenizer.name} has none: leave it out")
    return cast(Store, store)


def choose_image_size(source: str, native: Native | None, image_size: int | None, tokenizer: Tokenizer) -> int:
    """The side of the square images: of a source of pixels its own, else as the user gives it."""
    if native is not None:
        size = native.size
        if image_size is not None:
            raise ConfigError(f"--image-size is for pictures, {source} has {size} x {size} pixels: leave it out")
        if tokenizer.image_channels not in (None, native.channels):
            raise ConfigError(f"--tokenizer {tokenizer.name} takes colour images, {source} is grey: use pixel")
        if size % tokenizer.downsample:
            raise ConfigError(
                f"--tokenizer {tokenizer.name} needs multiples of {tokenizer.downsample}, {source} has {size}"
            )
        return size
    if tokenizer.image_channels not in (None, 3):
        raise ConfigError(f"--tokenizer {tokenizer.name} takes no colour images: use another, e.g. sd-vae-ft-ema")
    if image_size is None and tokenizer.downsample > 1:
        image_size = VAE_IMAGE_SIZE
    if image_size is None:
        raise ConfigError(f"--source {source} needs --image-size, the side of the square images, e.g. --image-size 16")
    if image_size < 1:
        raise ConfigError(f"--image-size {image_size} is not positive: use e.g. --image-size 16")
    if image_size % tokenizer.downsample:
        near = max(1, round(image_size / tokenizer.downsample)) * tokenizer.downsample
        raise ConfigError(
            f"--image-size {image_size} is not a multiple of {tokenizer.downsample}, as {tokenizer.name} needs:"
            f" use e.g. --image-size {near}"
        )
    return image_size


def choose_decoders(workers: int | None, worker: Process, images: int) -> int:
    """Processes that decode: this worker's share of the cores, 16 at most; none for few images."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) // worker.local_world_size
    return 0 if images < FEW_IMAGES else max(1, min(MAX_DECODERS, cores))


def refuse_dest_in_source(source: str, dest: str) -> None:
    """Shards must not lie where they would count as part of the source."""
    if is_name(source):
        return
    folder = source if "://" in source or Path(source).is_dir() else str(Path(source).parent)
    if "://" in folder or "://" in dest:
        inside = f"{dest.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")
    elif Path(source).is_dir():
        inside = Path(dest).resolve().is_relative_to(Path(folder).resolve())
    else:  # a glob takes in its own folder only
        inside = Path(dest).resolve() == Path(folder).resolve()
    if inside:
        raise ConfigError(f"--dest {dest} lies in --source {folder}, where shards would count as pictures: move it out")


def refuse_full_disk(dest: Dest, needed: int) -> None:
    """Say before the first image what would come after hours."""
    if not is_local(dest.fs):
        return
    folder = next(path for path in (Path(dest.path), *Path(dest.path).parents) if path.exists())
    free = shutil.disk_usage(folder).free + sum(dest.sizes().values())
    if needed > free:
        raise ConfigError(
            f"--dest {dest.url} needs about {decimal(needed)}, {decimal(free)} are free: choose another disk"
        )


def _summary(index: ShardIndex) -> list[str]:
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


def _say(*lines: str) -> None:
    """Print once, however many processes there are."""
    if is_first_process():
        for line in lines:
            console.print(line)
