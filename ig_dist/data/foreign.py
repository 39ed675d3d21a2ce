"""Shards that were made elsewhere: what is in them, told from their samples and held against what is said of them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from ig_dist.data.index import KeyInfo, LatentInfo, SampleTable, ShardInfo, Statistics
from ig_dist.data.shard_files import FileReader, FoundShards, ShardContent, in_pieces, read_shard
from ig_dist.data.shards import locate_array, split_name
from ig_dist.data.statistics import ChannelSums, raw_statistics
from ig_dist.data.table import Spool
from ig_dist.data.tar import DamagedTar, read_tar
from ig_dist.errors import ConfigError, DataError
from ig_dist.storage.background import in_parallel
from ig_dist.storage.faults import Patience, unreadable
from ig_dist.storage.urls import full_url, is_local
from ig_dist.terminal.progress import progress

if TYPE_CHECKING:
    from ig_dist.autoencoders.tokenizers import Tokenizer

_LOOKED_AT = 1000  # files of the first shard among which a latent must come
_MOST_CLASSES = 100_000  # that are believed unless their number is given


def first_sample(shards: FoundShards, keys: KeyInfo, patience: Patience) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """Type and shape of the first latent, and whether its sample has one of the mirrored image.

    Raises:
        ConfigError: no such latent.
        DataError: the shard is damaged, or the storage fails.
    """
    name, size = next(iter(shards.sizes.items()))
    path = f"{shards.folder}/{name}"
    url = full_url(shards.fs, path)
    found, sample, suffixes, kinds = None, "", set[str](), set[str]()
    try:
        for number, member in enumerate(read_tar(in_pieces(FileReader(shards.fs, path, size, patience)))):
            key, suffix = split_name(member.name)
            if number == _LOOKED_AT or (found and key != sample):
                break
            suffixes = suffixes | {suffix} if key == sample else {suffix}
            sample = key
            kinds.add(suffix[1:] or member.name)
            if suffix == f".{keys.latent}":
                found = locate_array(member)
    except OSError as error:
        raise unreadable(shards.fs, path, error) from None
    except (ConfigError, DamagedTar) as error:
        raise _with_place(url, error) from None
    if found is None:
        raise ConfigError(
            f"{url} has no latents under --latent-key {keys.latent}: its files are of the kinds"
            f" {', '.join(sorted(kinds)[:8]) or '(none)'}; name that of the latents"
        )
    return found.dtype, found.shape, f".{keys.flip}" in suffixes


def describe(
    dtype: np.dtype[Any], shape: tuple[int, ...], flips: bool, kind: str | None, tokenizer: Tokenizer | None
) -> LatentInfo:
    """The latents, not normalised, as told from the first one.

    Raises:
        ConfigError: of a kind that cannot be trained on, or not the tokenizer's.
    """
    if dtype not in (np.float16, np.float32) or not dtype.isnative:
        raise ConfigError(f"the latents are {dtype}, not float16 or float32: convert them to float16")
    if len(shape) != 3 or min(shape) < 1:
        raise ConfigError(f"the latents have shape {shape}, not (C, H, W) or (2C, H, W): write them without other axes")
    channels = tokenizer and tokenizer.latent_channels
    if kind is None:
        if tokenizer is None or (tokenizer.stochastic and shape[0] not in (channels, 2 * (channels or 0))):
            raise ConfigError(
                f"--kind is needed: `sample` if the {shape[0]} channels are one latent, `moments` if they are mean"
                " and std"
            )
        kind = "moments" if tokenizer.stochastic and shape[0] != channels else "sample"
    if kind not in ("sample", "moments"):
        raise ConfigError(f"--kind {kind!r}: use `sample` or `moments` (mean and std stacked)")
    if kind == "moments" and shape[0] % 2:
        raise ConfigError(f"--kind moments: {shape[0]} channels are not as many means as stds: use --kind sample")
    model_shape = (shape[0] // 2 if kind == "moments" else shape[0], shape[1], shape[2])
    if channels and model_shape[0] != channels:
        raise ConfigError(
            f"the shards hold {kind} of {model_shape[0]} channels, tokenizer {tokenizer and tokenizer.name} makes"
            f" {channels}: choose another --kind or --tokenizer"
        )
    count = model_shape[0]
    return LatentInfo.model_validate(
        {"kind": kind, "shape": model_shape, "dtype": dtype.name, "flips": flips}
        | {"shift": [0.0] * count, "scale": [1.0] * count}
    )


def read_shards(
    shards: FoundShards, latent: LatentInfo, keys: KeyInfo, workers: int, patience: Patience
) -> tuple[list[ShardInfo], Statistics, SampleTable]:
    """Read every shard, once. What is held of each is a line; the rows are in a file beside them, or a temporary one.

    Returns:
        What the index says of each, statistics of the latents as stored, and the rows.

    Raises:
        ConfigError: samples that do not fit the options.
        DataError: damaged shards or latents, or the storage fails.
    """
    names, lock, ready = list(shards.sizes), threading.Lock(), dict[int, ShardContent]()
    done, sums = list[ShardInfo](), list[ChannelSums]()
    spool = Spool(shards.folder if is_local(shards.fs) else None)
    with progress("index", sum(shards.sizes.values()), "bytes") as advance:

        def read(number: int) -> None:
            name = names[number]
            path = f"{shards.folder}/{name}"
            try:
                content = read_shard(shards.fs, path, shards.sizes[name], latent, keys, patience, advance)
            except OSError as error:
                raise unreadable(shards.fs, path, error) from None
            _refuse(full_url(shards.fs, path), content)
            with lock:
                ready[number] = content
                while len(done) in ready:  # in the order of the shards
                    name, content = names[len(done)], ready.pop(len(done))
                    count = len(content.rows)
                    done.append(ShardInfo(name=name, bytes=shards.sizes[name], samples=count, sha256=content.sha256))
                    sums.append(content.sums)
                    spool.add(content.rows.columns)

        in_parallel(read, range(len(names)), workers, patience.stop)
    return done, raw_statistics(sums), SampleTable(**spool.columns)


def _refuse(url: str, content: ShardContent) -> None:
    """Raise for what no shard of an index may hold."""
    if content.problem:
        raise _with_place(url, content.problem)
    if not content.rows:
        raise ConfigError(f"{url} holds no sample: leave it out of --shards")
    if bad := content.sums.not_finite:
        raise DataError(
            f"{url}: the latent of sample {bad[0]} has NaN or infinity ({len(bad)} in all): make them again"
        )
    if bad := content.sums.negative_std:
        raise ConfigError(
            f"{url}: sample {bad[0]} has a negative std ({len(bad)} in all), so these are not mean and std"
            " (log-variances?): use another --kind, or convert the shards"
        )


def _with_place(url: str, error: ConfigError | DamagedTar) -> ConfigError | DataError:
    if isinstance(error, DamagedTar):
        return DataError(f"{url}: {error}: {error.remedy}")
    return ConfigError(f"{url}: {error}: mend the shard, or the options that describe it")


def choose_classes(
    shards: list[ShardInfo], table: SampleTable, names: list[str] | None, number: int | None
) -> list[str]:
    """Names of the classes that the labels count.

    Raises:
        ConfigError: a label that is none of them.
    """
    if names is not None and number not in (None, len(names)):
        raise ConfigError(f"--class-names has {len(names)} lines, --num-classes is {number}: leave one of them out")
    highest = max(int(labels.max()) for labels in table.labels())
    if names is None and number is None and highest >= _MOST_CLASSES:
        raise ConfigError(f"the highest label is {highest}: give --num-classes if that is right")
    count = len(names) if names is not None else highest + 1 if number is None else number
    first = 0
    for shard in shards:
        labels, first = table.label[first : first + shard.samples], first + shard.samples
        bad = np.flatnonzero((labels < 0) | (labels >= count))
        if len(bad):
            raise ConfigError(
                f"{shard.name}: sample {bad[0]} has label {labels[bad[0]]}, the classes are 0 to {count - 1}: give"
                " another --num-classes or --class-names, or mend the shards (labels count from 0)"
            )
    return names if names is not None else [str(label) for label in range(count)]
