"""Classes by number, by their name in the index, and by their words."""

from __future__ import annotations

import pytest

from ig_dist.data.classes import find_classes, imagenet_classes
from ig_dist.errors import ConfigError

NAMES, WORDS = list(imagenet_classes()), list(imagenet_classes().values())


def test_a_class_has_a_number_a_name_and_words() -> None:
    asked = [207, "207", "n02099601", "golden retriever", "Golden_Retriever", " golden-retriever "]
    assert find_classes(asked, NAMES, WORDS) == [207] * 6
    assert find_classes(["tinca tinca", "tench, Tinca tinca", 0], NAMES, WORDS) == [0, 0, 0]
    assert find_classes(["dog", "Cat"], ["cat", "dog"], None) == [1, 0]
    assert find_classes(["2", "2020", 1], ["2019", "2020", "x"], None) == [2, 1, 1]
    assert find_classes([], NAMES, WORDS) == []


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("golden_retreiver", "no class 'golden_retreiver'; the nearest are 'golden retriever' (207)"),
        ("crane", "class 'crane' is one of 134 and 517: give its number"),
        (1000, "no class '1000': give a number from 0 to 999"),
        (-1, "no class '-1'"),
    ],
)
def test_an_unknown_class_gets_the_nearest_names(asked: int | str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        find_classes([asked], NAMES, WORDS)
    assert said in str(refused.value)
