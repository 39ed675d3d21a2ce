"""Tars of pictures, read in place: ImageNet's tar of class tars, and WebDataset shards.

The headers are listed once; a picture is then a range of bytes of its tar.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from ig_dist.data.classes import class_words, imagenet_classes
from ig_dist.data.shards import class_number, split_name
from ig_dist.data.sources.source import ByteRange, Listed, Source, listed_source
from ig_dist.data.tar import DamagedTar, Member, read_tar
from ig_dist.errors import ConfigError
from ig_dist.terminal.progress import bar

PICTURES = {"jpg", "jpeg", "png", "webp", "gif", "bmp"}
LABEL = "cls"
_CLASS_TAR = re.compile(r"(?:.*/)?(n\d{8})\.tar")
_MAX_CLASSES = 1_000_000
_MOST_LABEL = 100  # bytes of a number as text
_THREADS = 16  # each header is a round trip to the disk, or to a file server

_Result = TypeVar("_Result")


class TarFile(NamedTuple):
    """A local tar, or a part of one that is a tar itself."""

    path: str
    name: str  # what the user knows it by
    offset: int = 0
    size: int | None = None


def tar_source(
    tars: Sequence[TarFile], what: str, *, name: str | None = None, names: list[str] | None = None, whole: bool = True
) -> tuple[str, Source]:
    """The source in tars, and its kind in words: class tars, a tar of them, or WebDataset shards.

    Args:
        tars: in their order.
        what: begins the source's name.
        name: the whole name, where it is known from elsewhere.
        names: words for the classes of shards, by label.
        whole: these are all tars: every class must have images.

    Raises:
        ConfigError: none of the three, or damaged.
    """
    class_tars = [tar for tar in tars if _CLASS_TAR.fullmatch(tar.name)]
    first = next(members(tars[0]), None)
    if first is not None and len(tars) == 1 and _CLASS_TAR.fullmatch(first.name):
        inner = (member for member in members(tars[0]) if _CLASS_TAR.fullmatch(member.name))
        class_tars = [TarFile(tars[0].path, member.name, member.offset, member.size) for member in inner]
    elif class_tars and len(class_tars) < len(tars):
        other = next(tar.name for tar in tars if tar not in class_tars)
        raise ConfigError(f"--source: {other} lies among class tars ({class_tars[0].name}): remove one of them")
    if class_tars:
        listed, classes = list_class_tars(class_tars)
        known = imagenet_classes()
        share = f" ({len(classes)} of {len(known)} classes)" if set(classes) <= set(known) else ""
        kind = f"tar of class tars{share}"
    else:
        listed, kind = [image for images in _of_each(_list_shard, tars) for image in images], "WebDataset shards"
        if not listed:
            raise ConfigError(
                f"--source: {tars[0].name} holds no pictures: expected class tars (n01440764.tar), or WebDataset"
                f" samples ({', '.join(f'.{kind}' for kind in sorted(PICTURES))} beside .{LABEL})"
            )
        classes = number_classes([image.label for image in listed], names, whole=whole)
    return kind, listed_source(what, listed, classes, names or class_words(classes), name=name)


def list_class_tars(tars: Sequence[TarFile]) -> tuple[list[Listed], list[str]]:
    """All files of class tars, in the order of the sorted synsets, and the synsets.

    Raises:
        ConfigError: an empty class tar, or two of one class.
    """
    by_class: dict[str, TarFile] = {}
    for tar in tars:
        synset = _CLASS_TAR.fullmatch(tar.name)[1]  # type: ignore[index]  # chosen by this pattern
        if synset in by_class:
            raise ConfigError(f"--source: two tars of class {synset} ({by_class[synset].path}, {tar.path}): remove one")
        by_class[synset] = tar
    listed: list[Listed] = []
    classes = sorted(by_class)
    for label, files in enumerate(_of_each(_sorted_members, [by_class[synset] for synset in classes])):
        tar, synset = by_class[classes[label]], classes[label]
        if not files:
            raise ConfigError(f"--source: {tar.path}: {synset}.tar is empty: fetch it again")
        listed += [
            Listed(f"{synset}/{file.name.removeprefix('./')}", label, ByteRange(tar.path, file.offset, file.size))
            for file in files
        ]
    return listed, classes


def _list_shard(tar: TarFile) -> list[Listed]:
    """The pictures of a WebDataset shard with their ``.cls``, in the order of the tar.

    Raises:
        ConfigError: a picture without a class, or with two; a label that is no number.
    """
    pictures, labels = dict[str, Member](), dict[str, Member]()
    for member in members(tar):
        key, suffix = split_name(member.name)
        suffix = suffix.removeprefix(".")
        part = pictures if suffix in PICTURES else labels if suffix == LABEL else None
        if part is not None and part.setdefault(key, member) is not member:
            raise ConfigError(f"--source: sample {key} of {tar.name} has two of .{suffix}: keys must differ")
    lonely = next((key for key in pictures if key not in labels), None)
    if lonely is not None:
        raise ConfigError(f"--source: sample {lonely} of {tar.name} has no .{LABEL}: each picture needs its class")
    listed = []
    for key, picture in pictures.items():
        label = class_number(labels[key].data, f"--source: {key}.{LABEL} of {tar.name}", ": mend the label")
        listed.append(Listed(f"{tar.name}/{picture.name}", label, ByteRange(tar.path, picture.offset, picture.size)))
    return listed


def _of_each(function: Callable[[TarFile], _Result], tars: Sequence[TarFile]) -> Iterator[_Result]:
    """Of each tar, in order."""
    with ThreadPoolExecutor(_THREADS) as pool, bar("list tars", len(tars)) as shown:
        for result in pool.map(function, tars):
            shown.advance(shown.task_ids[0])
            yield result


def number_classes(labels: Sequence[int], names: list[str] | None, *, whole: bool = True) -> list[str]:
    """The classes of labels that are numbers: the numbers. ``whole``: these are all images, every class must have some.

    Raises:
        ConfigError: a label without images, or beyond the names.
    """
    highest, lowest = max(labels), min(labels)
    if lowest < 0 or highest >= (len(names) if names else _MAX_CLASSES):
        known = f"0 to {len(names) - 1}, as the source names its classes" if names else f"0 to {_MAX_CLASSES - 1}"
        raise ConfigError(f"--source: label {lowest if lowest < 0 else highest} is not in {known}: mend the labels")
    classes = len(names) if names else highest + 1
    empty = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
    if len(empty) and whole:
        raise ConfigError(
            f"--source: {len(empty)} of {classes} classes have no image (the first: {empty[0]}): labels must count"
            " from 0 without gaps; add the missing shards or renumber them"
        )
    return [str(number) for number in range(classes)]


def members(tar: TarFile) -> Iterator[Member]:
    """The regular files in a tar, with data that may be a label; offsets are those in the file that holds it.

    Raises:
        ConfigError: no tar, a compressed one, or one that ends early.
    """
    try:
        with Path(tar.path).open("rb") as file:
            end = file.seek(0, io.SEEK_END)
            end = end if tar.size is None else min(tar.offset + tar.size, end)
            file.seek(tar.offset)
            yield from read_tar(file, tar.offset, end, most=_MOST_LABEL)
    except DamagedTar as error:
        raise ConfigError(f"--source: {tar.name} is not a readable tar ({error}): {error.remedy}") from None
    except OSError as error:
        raise ConfigError(f"--source: {tar.path} cannot be read ({error.strerror}): make it readable") from None


def _sorted_members(tar: TarFile) -> list[Member]:
    return sorted(members(tar))
