"""Names of classes: the 1,000 of ImageNet in words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path


@cache
def imagenet_classes() -> dict[str, str]:
    """Synset to words, sorted by synset: entry i is class i of ILSVRC2012 (``n01440764``: "tench, Tinca tinca")."""
    lines = Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="ascii").splitlines()
    return dict(line.split(" ", 1) for line in lines)


def class_words(classes: Sequence[str]) -> list[str] | None:
    """Words for ImageNet's classes, given as synsets (some or all of them) or as the numbers 0 to 999; else None."""
    words = imagenet_classes()
    if all(name in words for name in classes):
        return [words[name] for name in classes]
    if list(classes) == [str(number) for number in range(len(words))]:
        return list(words.values())
    return None
