"""Names of classes: the 1,000 of ImageNet in words, and classes by number, name or words."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ig_dist.errors import ConfigError, nearest


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


def find_classes(asked: Sequence[int | str], names: Sequence[str], words: Sequence[str] | None) -> list[int]:
    """Numbers of classes.

    Args:
        asked: of each its number, its name in the index (``n02099601``) or one of its words (``golden_retriever``);
            upper case, hyphens and underscores make no difference. Digits are a number where there is such a class.
        names: of all classes, as the index has them.
        words: of each class, separated by commas ("tench, Tinca tinca"); None: not known.

    Raises:
        ConfigError: no such class, or more than one.
    """
    found: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        alike = [name] if words is None else [name, words[number], *words[number].split(",")]
        for text in dict.fromkeys(map(_plain, alike)):
            found.setdefault(text, []).append(number)

    def number_of(one: int | str) -> int:
        text = str(one).strip()
        if text.isdecimal() and int(text) < len(names):
            return int(text)
        numbers = found.get(_plain(text), [])
        if len(numbers) == 1:
            return numbers[0]
        if numbers:
            raise ConfigError(f"class {text!r} is one of {' and '.join(map(str, numbers))}: give its number")
        near = nearest(_plain(text), found, n=3, least=0.5) if not text.isdecimal() else []
        hint = "; the nearest are " + ", ".join(f"{name!r} ({found[name][0]})" for name in near) if near else ""
        raise ConfigError(f"there is no class {text!r}{hint}: give a number from 0 to {len(names) - 1}, or a name")

    return [number_of(one) for one in asked]


def _plain(text: str) -> str:
    return " ".join(text.replace("_", " ").replace("-", " ").lower().split())
