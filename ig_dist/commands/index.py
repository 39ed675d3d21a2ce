"""Index WebDataset shards of latents that were made elsewhere, so that they can be trained on where they are.

Every shard is read once, front to back. Nothing is written but the index, beside the shards; what does not fit ends
the command before that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

from ig_dist.commands.options import WORKERS, Workers, flag, option
from ig_dist.errors import ConfigError
from ig_dist.terminal import console

if TYPE_CHECKING:
    from ig_dist.autoencoders.tokenizers import Tokenizer
    from ig_dist.data.index import LatentInfo, SampleTable, Statistics

SHA256 = "--tokenizer-sha256"
TOLD = {
    SHA256: f"{SHA256} (where the weights are, `ig-dist index --hash --tokenizer WEIGHTS` prints it)",
    "--shift": "--shift (SD-VAE: 0; VA-VAE: statistics)",
    "--scale": "--scale (SD-VAE: 0.18215; VA-VAE: statistics)",
    "--image-size": "--image-size (the side of the images, e.g. 256)",
    "--kind": "--kind (`sample`, or `moments`: mean and std stacked)",
}
"""What a tokenizer tells of the shards, and is needed where its weights are not."""


Scaling = dict[str, list[float] | None]
"""Shift and scale: the model sees (latent - shift) * scale. A number for all channels or one for each; None: by the
statistics."""


def check_channels(wanted: Scaling, channels: int, said: str | None = None) -> None:
    """Raise ConfigError unless there is one number for all channels, or one for each; ``said``: the option."""
    for name, numbers in wanted.items():
        if numbers and len(numbers) not in (1, channels):
            option = said or f"--{name}"
            raise ConfigError(f"{option} has {len(numbers)} numbers, the latents have {channels} channels")


def scaled(latent: LatentInfo, wanted: Scaling, raw: Statistics) -> LatentInfo:
    """The latents with their shift and scale; ``raw`` are the statistics of what is stored."""
    by_statistics = {"shift": raw.mean, "scale": [1 / std if std > 0 else 1.0 for std in raw.std]}
    each = {name: numbers and numbers * (latent.shape[0] // len(numbers)) for name, numbers in wanted.items()}
    return latent.model_copy(update={name: each[name] or by_statistics[name] for name in by_statistics})


def known_tokenizer(name: str, sha256: str | None, others: Mapping[str, object]) -> Tokenizer | None:
    """The tokenizer; None: it is not on this machine, and its hash and all ``others`` that it would tell are given.

    Raises:
        ConfigError: it is not here, nor all of these, or it has another hash.
    """
    from ig_dist.autoencoders.tokenizers import get_tokenizer

    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ConfigError(f"--tokenizer-sha256 {sha256!r} is no sha256: give its 64 digits 0-9a-f")
    try:
        tokenizer = get_tokenizer(name)
    except ConfigError as error:
        needed = [TOLD[option] for option, given in {SHA256: sha256, **others}.items() if given is None]
        if needed:
            instead = f"without its weights index needs {', '.join(needed)}"
            raise ConfigError(f"{error}; or {instead}" if sha256 is None else f"{name}: {instead}") from None
        console.print(f"tokenizer {name} is not on this machine: its name and hash are taken as given")
        return None
    if sha256 not in (None, tokenizer.sha256):
        raise ConfigError(
            f"--tokenizer-sha256 {sha256} is not that of {tokenizer.name} on this machine ({tokenizer.sha256}):"
            " leave it out, or name the tokenizer that made the shards"
        )
    return tokenizer


def coefficients(option: str, text: str | None, by_tokenizer: float | None) -> list[float] | None:
    """What ``--shift`` or ``--scale`` says, or else the tokenizer."""
    if text == "statistics" or (text is None and by_tokenizer is None):
        return None
    try:
        numbers = [float(part) for part in str(by_tokenizer if text is None else text).split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)) or (option == "--scale" and 0 in numbers):
        raise ConfigError(f"{option} {text!r}: give a number, one per channel separated by commas, or `statistics`")
    return numbers


def read_class_names(url: str) -> tuple[list[str], list[str] | None]:
    """Names of the classes, one a line, and their words: from the same lines, or those of ImageNet's synsets."""
    from ig_dist.data.classes import class_words
    from ig_dist.storage.files import open_url, read_file

    fs, path = open_url(url, "--class-names", web=True)
    try:
        lines = [line.strip() for line in read_file(fs, path).decode("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--class-names {url} cannot be read ({error}): give a text file, a class a line") from None
    if not lines:
        raise ConfigError(f"--class-names {url} is empty: write a class a line")
    pairs = [re.fullmatch(r"(n\d{8})[\s:,]+(.+)", line) for line in lines]
    if lines and all(pairs):
        return [pair[1] for pair in pairs if pair], [pair[2] for pair in pairs if pair]
    return lines, class_words(lines)


def index(
    tokenizer: Annotated[str, option("NAME", "The tokenizer that made the latents: name, or path of its weights.")],
    shards: Annotated[
        str | None, option("URL", "Needed: the tars' folder, or a glob or brace expression of them in one.")
    ] = None,
    tokenizer_sha256: Annotated[
        str | None, option("HEX", "Its hash, where its weights are not on this machine; see --hash.")
    ] = None,
    print_hash: Annotated[bool, flag("--hash", "Only print the tokenizer's hash, where its weights are.")] = False,
    latent_key: Annotated[str, option("NAME", "What follows a sample's key and a dot.")] = "latent.npy",
    flip_key: Annotated[
        str | None, option("NAME", "The same of the mirrored image. Default: latent_flip.npy if there; '': none.")
    ] = None,
    label_key: Annotated[str, option("NAME", "The same of the class number, a text.")] = "cls",
    kind: Annotated[
        str | None, option("KIND", "`sample`, or `moments`: mean and std stacked. Default: by the tokenizer.")
    ] = None,
    shift: Annotated[
        str | None, option("X", "The model sees (latent - shift) * scale: number(s), or `statistics`.")
    ] = None,
    scale: Annotated[str | None, option("X", "See --shift. Default of both: the tokenizer's.")] = None,
    latent_stats: Annotated[
        Path | None, option("FILE", "Instead of both: LightningDiT's latents_stats.pt, with mean and std.")
    ] = None,
    image_size: Annotated[int | None, option("N", "Side of the images. Default: by the tokenizer.", min=1)] = None,
    class_names: Annotated[
        str | None, option("FILE", "A name per line, or synset and words; line i is class i.")
    ] = None,
    num_classes: Annotated[int | None, option("N", "Default: the highest label and 1.", min=1)] = None,
    source: Annotated[str | None, option("NAME", "What the data are called. Default: the folder.")] = None,
    workers: Workers = WORKERS,
    force: Annotated[bool, flag("--force", "Replace an index that is there.")] = False,
    renormalise: Annotated[
        bool, flag("--renormalise", "Only give an index that is there other --latent-stats, or --shift and --scale.")
    ] = False,
) -> None:
    """Index WebDataset shards of latents that were made elsewhere."""
    from ig_dist.autoencoders.ldm import read_latent_stats
    from ig_dist.autoencoders.tokenizers import get_tokenizer
    from ig_dist.data.foreign import choose_classes, describe, first_sample, read_shards
    from ig_dist.data.index import TABLE_NAME, KeyInfo, write_index
    from ig_dist.data.shard_files import find_shards
    from ig_dist.data.statistics import normalised
    from ig_dist.storage.faults import Patience
    from ig_dist.storage.files import list_sizes
    from ig_dist.storage.urls import full_url

    if print_hash:
        print(get_tokenizer(tokenizer).sha256)
        return
    if shards is None:
        raise ConfigError("index needs --shards: the folder, a glob or a brace expression of the tars")
    if renormalise and latent_stats is None and None in (shift, scale):
        raise ConfigError("--renormalise needs --latent-stats FILE, or both --shift and --scale")
    if latent_stats is not None and (shift, scale) != (None, None):
        raise ConfigError("--latent-stats says what --shift and --scale say: leave them out")
    others = {"--shift": shift or latent_stats, "--scale": scale or latent_stats, "--image-size": image_size}
    encoder = None if renormalise else known_tokenizer(tokenizer, tokenizer_sha256, {**others, "--kind": kind})
    told = None if encoder is None else encoder.scale
    shifts = coefficients("--shift", shift, None if told is None else 0.0)
    wanted: Scaling = {"shift": shifts, "scale": coefficients("--scale", scale, told)}
    said = None if latent_stats is None else "--latent-stats"
    if latent_stats is not None:
        wanted = read_latent_stats(latent_stats)._asdict()
    if renormalise:
        return change_normalisation(shards, wanted, said)
    names, words = (None, None) if class_names is None else read_class_names(class_names)
    keys = KeyInfo(latent=latent_key, flip=flip_key or "latent_flip.npy", label=label_key)
    if len({keys.latent, keys.flip, keys.label}) < 3:
        raise ConfigError("--latent-key, --flip-key and --label-key must differ: each names another file of a sample")
    found = find_shards(shards)
    folder = full_url(found.fs, found.folder)
    if "index.json" in list_sizes(found.fs, found.folder) and not force:
        raise ConfigError(f"{folder}/index.json is there: use --force to replace it, and {TABLE_NAME} with it")

    patience = Patience()
    dtype, shape, has_flip = first_sample(found, keys, patience)
    latent = describe(dtype, shape, bool(flip_key) or (has_flip and flip_key is None), kind, encoder)
    check_channels(wanted, latent.shape[0], said)
    side = image_size or (latent.shape[1] * encoder.downsample if encoder else 0)
    if encoder and side // encoder.downsample != latent.shape[1]:
        raise ConfigError(
            f"--image-size {side}: tokenizer {encoder.name} makes latents of side {latent.shape[1]} from images of side"
            f" {latent.shape[1] * encoder.downsample}: leave it out"
        )
    described, raw, table = read_shards(found, latent, keys, workers, patience)
    classes = choose_classes(described, table, names, num_classes)
    latent = scaled(latent, wanted, raw)
    info = {
        "source": source or PurePosixPath(found.folder).name,
        "seed": 0,
        "tokenizer": {
            "name": encoder.name if encoder else tokenizer,
            "sha256": encoder.sha256 if encoder else tokenizer_sha256,
            "image_size": side,
            "image_channels": (encoder.image_channels or latent.shape[0]) if encoder else 3,
        },
        "latent": latent,
        "keys": keys,
        "foreign": True,
        "classes": classes,
        "class_names": words,
        "statistics": normalised(raw, latent),
        "shards": described,
    }
    with writing_to(folder):
        write_index(folder, info, table)
    print_summary(folder, info, table)


def change_normalisation(url: str, wanted: Scaling, said: str | None) -> None:
    """Give an index that is there another shift and scale; no shard is read, and nothing else is changed."""
    from ig_dist.data.index import read_index_file, write_index_file
    from ig_dist.data.statistics import as_stored, normalised

    folder, info, sha256 = read_index_file(url, "--shards")
    check_channels(wanted, info.latent.shape[0], said)
    kept = f"index.{sha256[:12]}.json"
    raw = as_stored(info.statistics, info.latent)
    latent = scaled(info.latent, wanted, raw)
    seen = normalised(raw, latent)
    with writing_to(folder):
        write_index_file(folder, info, name=kept)  # to the byte: runs know it by its hash
        write_index_file(folder, info.model_copy(update={"latent": latent, "statistics": seen}))
    console.print(f"as the model sees them now, {seen_by_the_model(seen)}")
    console.print(
        f"written: {folder}/index.json; runs that were trained on the one before need that: it is kept as {kept},"
        " copy it back over index.json for them"
    )


@contextmanager
def writing_to(folder: str) -> Iterator[None]:
    """An index that cannot be written is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"the index cannot be written to {folder} ({error}): the folder must be writable") from None


def seen_by_the_model(seen: Statistics) -> str:
    """A line about normalised latents."""
    mean, std = (f"{min(values):.3f} to {max(values):.3f}" for values in (seen.mean, seen.std))
    return f"per channel: mean {mean}, std {std}"


def print_summary(folder: str, info: dict[str, Any], table: SampleTable) -> None:
    """Say what was indexed, and what to type next."""
    latent, counts = info["latent"], table.class_counts(len(info["classes"]))
    empty = f", {(counts == 0).sum()} of them without a sample" if not counts.all() else ""
    what = ("moments" if latent.kind == "moments" else "latents") + ", and those of the mirrored images" * latent.flips
    console.print(
        f"{len(table)} samples of {len(counts)} classes ({counts.min()} to {counts.max()} a class{empty}) in"
        f" {len(info['shards'])} shards of {latent.dtype} {'x'.join(map(str, latent.shape))} {what}"
    )
    console.print(f"as the model sees them, {seen_by_the_model(info['statistics'])}")
    console.print(f"written: {folder}/index.json; check it with: ig-dist verify {folder}")
