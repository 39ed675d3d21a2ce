"""The checks that a conversion of published weights ends with: names, shapes, bits and numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ig_dist.convert.formats import FORMATS, FROM_NOISE, Format, to_ours, to_published
from ig_dist.errors import ConfigError, listed, nearest
from ig_dist.models.dit import DiT, DiTConfig, load_model
from ig_dist.rng import Purpose, normal


def known_format(text: str) -> Format:
    """A format by its name.

    Raises:
        ConfigError: no such format, with the nearest.
    """
    for name in FORMATS:
        if name == text:
            return name
    near = nearest(text, FORMATS)[0]
    raise ConfigError(f"--format {text!r}: did you mean {near!r}? There are {', '.join(FORMATS)}")


def check_names(theirs: Mapping[str, Tensor], config: DiTConfig, published: Format, source: Path) -> None:
    """Raise ConfigError, with a list, unless published weights have the names and shapes of such a model."""
    with torch.device("meta"):
        expected = to_published(DiT(config).state_dict(), published)
    missing = [name for name in expected if name not in theirs]
    unexpected = [name for name in theirs if name not in expected]
    if missing or unexpected:
        lists = [f"{kind} {listed(names, 6)}" for kind, names in (("lacks", missing), ("has", unexpected)) if names]
        raise ConfigError(f"{source} does not fit a model of {published}: it {' and '.join(lists)}")
    for name, tensor in theirs.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, such a model has {tuple(expected[name].shape)}"
            raise ConfigError(f"{source} does not fit a model of {published}: {name} is {shapes}")


def check_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: Path) -> None:
    """Raise ConfigError unless converting back has given what was converted, to the bit."""
    for name in found.keys() | expected.keys():
        same = name in found and name in expected
        if not same or not torch.equal(found[name].view(torch.int32), expected[name].view(torch.int32)):
            raise ConfigError(f"{source}: {name} does not come back as it was: check memory and disk, convert again")


@torch.no_grad()
def check_numbers(
    theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], config: DiTConfig, published: Format, source: Path
) -> float:
    """Our velocities against those of the untouched weights, in their own direction of time.

    Raises:
        ConfigError: they differ, or are not finite.
    """
    ids = torch.arange(2)
    x = normal(0, Purpose.NOISE, ids, (config.in_channels, config.input_size, config.input_size))
    t, labels = torch.tensor([0.25, 0.75]), ids % config.num_classes
    untouched, _ = to_ours(theirs, "ig-sit")  # a format that turns nothing
    untouched = {name: tensor for name, tensor in untouched.items() if name in ours}
    reverse = published in FROM_NOISE
    plain = load_model(dataclasses.replace(config, time_input="t"), untouched)
    expected = plain(x, 1 - t if reverse else t, labels)
    found = load_model(config, ours)(x, t, labels)
    difference = 0.0
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:
            continue
        if not one.isfinite().all():
            raise ConfigError(f"{source}: the model's velocity is not finite: the weights are damaged")
        largest = float((one + other if reverse else one - other).abs().max())
        difference = max(difference, largest)
        if largest > 1e-5 * max(1.0, float(other.abs().max())):
            raise ConfigError(f"{source}: the converted model differs by {largest:g}: this conversion is wrong")
    return difference
