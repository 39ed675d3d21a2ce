"""Tars of pictures, read in place: ImageNet's tar of class tars, and WebDataset shards.

The headers are listed once; a picture is then a range of bytes of its tar.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from ig_dist.data.classes import class_words, imagenet_classes
from ig_dist.data.processes import end_with_parent, helpers
from ig_dist.data.sources.source import ByteRange, Listed, Source, listed_source
from ig_dist.errors import ConfigError

PICTURES = {"jpg", "jpeg", "png", "webp", "gif", "bmp"}
LABEL = "cls"
_CLASS_TAR = re.compile(r"(?:.*/)?(n\d{8})\.tar")
_MAX_CLASSES = 1_000_000
_MAX_PROCESSES = 16
_MOST_LABEL = 100  # bytes of a number as text
MANY_BYTES = 2 << 30  # of tars: less is listed before processes have started

_Result = TypeVar("_Result")


class TarFile(NamedTuple):
    """A local tar, or a part of one that is a tar itself."""

    path: str
    name: str
    """What the user knows it by."""
    offset: int = 0
    size: int | None = None


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


def tar_source(
    tars: Sequence[TarFile],
    what: str,
    *,
    name: str | None = None,
    names: list[str] | None = None,
    whole: bool = True,
    on_progress: Callable[[int], None] = lambda listed: None,
) -> tuple[str, Source]:
    """The source in tars, and its kind in words: class tars, a tar of them, or WebDataset shards.

    Args:
        tars: in their order.
        what: begins the source's name.
        name: the source's whole name, where it is known from elsewhere.
        names: words for the classes of shards, by label.
        whole: these are all tars: every class must have images.
        on_progress: called with the number of tars that are listed.

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
        listed, classes = list_class_tars(class_tars, on_progress)
        share = (
            f" ({len(classes)} of {len(imagenet_classes())} classes)" if set(classes) <= set(imagenet_classes()) else ""
        )
        return f"tar of class tars{share}", listed_source(what, listed, classes, class_words(classes), name=name)
    listed = list_shards(tars, on_progress)
    classes = number_classes([image.label for image in listed], names, whole=whole)
    source = listed_source(what, listed, classes, names or class_words(classes), name=name)
    return "WebDataset shards", source


def list_class_tars(tars: Sequence[TarFile], on_progress: Callable[[int], None]) -> tuple[list[Listed], list[str]]:
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
    for label, files in enumerate(_of_each(_sorted_members, [by_class[synset] for synset in classes], on_progress)):
        tar, synset = by_class[classes[label]], classes[label]
        if not files:
            raise ConfigError(f"--source: {tar.path}: {synset}.tar is empty: fetch it again")
        listed += [
            Listed(f"{synset}/{file.name.removeprefix('./')}", label, ByteRange(tar.path, file.offset, file.size))
            for file in files
        ]
    return listed, classes


def list_shards(tars: Sequence[TarFile], on_progress: Callable[[int], None] = lambda listed: None) -> list[Listed]:
    """The pictures of WebDataset shards, in the order of the tars. Of a sample, picture and ``.cls`` count.

    Raises:
        ConfigError: a picture without a class, or with two; no pictures at all; a label that is no number.
    """
    listed = [image for images in _of_each(_list_shard, tars, on_progress) for image in images]
    if not listed:
        raise ConfigError(
            f"--source: {tars[0].name} holds no pictures: expected class tars (n01440764.tar), or WebDataset samples"
            f" ({', '.join(f'.{kind}' for kind in sorted(PICTURES))} beside .{LABEL})"
        )
    return listed


def _list_shard(tar: TarFile) -> list[Listed]:
    pictures: dict[str, _Member] = {}
    labels: dict[str, _Member] = {}
    for member in members(tar):
        # WebDataset's rule: a sample's key ends at the first dot of the file's own name
        folder, slash, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        key, suffix = f"{folder}{slash}{stem}", suffix.lower()
        part = pictures if suffix in PICTURES else labels if suffix == LABEL else None
        if part is not None and part.setdefault(key, member) is not member:
            raise ConfigError(f"--source: sample {key} of {tar.name} has two of .{suffix}: keys must differ")
    lonely = next((key for key in pictures if key not in labels), None)
    if lonely is not None:
        raise ConfigError(f"--source: sample {lonely} of {tar.name} has no .{LABEL}: each picture needs its class")
    listed = []
    with Path(tar.path).open("rb") as file:
        for key, picture in pictures.items():
            file.seek(labels[key].offset)
            label = _label(file.read(min(labels[key].size, _MOST_LABEL)), f"{key}.{LABEL} of {tar.name}")
            where = ByteRange(tar.path, picture.offset, picture.size)
            listed.append(Listed(f"{tar.name}/{picture.name}", label, where))
    return listed


def _of_each(
    function: Callable[[TarFile], _Result], tars: Sequence[TarFile], on_progress: Callable[[int], None]
) -> Iterator[_Result]:
    """Of each tar in order. A header takes 20 microseconds, or a round trip to a file server: many go to processes."""
    size = sum(Path(tar.path).stat().st_size if tar.size is None else tar.size for tar in tars)
    with ExitStack() as stack:
        results: Iterator[_Result] = map(function, tars)
        if size > MANY_BYTES:
            cores = min(_MAX_PROCESSES, len(os.sched_getaffinity(0)))
            pool = ProcessPoolExecutor(cores, mp_context=helpers(), initializer=end_with_parent)
            results = stack.enter_context(pool).map(function, tars)
        for number, result in enumerate(results):
            on_progress(number + 1)
            yield result


def number_classes(labels: Sequence[int], names: list[str] | None, *, whole: bool = True) -> list[str]:
    """The classes of labels that are numbers: the numbers.

    Args:
        labels: of the images.
        names: of all classes, where known.
        whole: these are all images: every class must have some.

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


def members(tar: TarFile) -> Iterator[_Member]:
    """The regular files in a tar; offsets are those in the file that holds it.

    Raises:
        ConfigError: no tar, a compressed one, or one that ends early.
    """
    path = Path(tar.path)
    try:
        with path.open("rb") as file:
            file_end = file.seek(0, io.SEEK_END)
            end = file_end if tar.size is None else min(tar.offset + tar.size, file_end)
            file.seek(tar.offset)
            with tarfile.open(fileobj=file, mode="r:") as opened:
                for member in opened:
                    if member.size < 0:  # the library would go back, and read the same for ever
                        raise tarfile.ReadError(f"{member.name!r} has a negative size")
                    if member.offset_data + member.size > end:
                        raise ConfigError(f"--source: {tar.name} ends in the middle of {member.name}: fetch it again")
                    if member.isreg() and not member.issparse():
                        yield _Member(member.name, member.offset_data, member.size)
                file.seek(opened.offset)  # the library takes a damaged header for the end
                if opened.offset < end and any(file.read(tarfile.BLOCKSIZE)):
                    raise tarfile.ReadError(f"the header at byte {opened.offset} is damaged")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        kind = (
            "is compressed: unpack it to a plain .tar" if _is_compressed(path) else f"is not a readable tar ({error})"
        )
        raise ConfigError(f"--source: {tar.name} {kind}") from None
    except OSError as error:
        raise ConfigError(f"--source: {tar.path} cannot be read ({error.strerror}): make it readable") from None


def _sorted_members(tar: TarFile) -> list[_Member]:
    return sorted(members(tar))


def _label(data: bytes, where: str) -> int:
    with suppress(ValueError):
        if len(data) < _MOST_LABEL:
            return int(data)
    raise ConfigError(f"--source: {where} holds {data[:20]!r}, not a class number: mend the label")


def _is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5")
