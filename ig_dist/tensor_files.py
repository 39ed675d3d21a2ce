"""Tensors in files of other programs: safetensors, and PyTorch's pickles as far as they hold nothing that runs."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ig_dist.errors import ConfigError


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ConfigError: it is not there, cannot be read, or is damaged.
    """
    try:
        return safetensors.torch.load_file(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}: download or save it again") from None
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{path} is damaged ({error}): download or save it again") from None


def read_torch_file(path: Path) -> Any:
    """What a file in PyTorch's format holds, if that is tensors, numbers, text and containers of them.

    The settings of a training, which many checkpoints carry as an ``argparse.Namespace``, are such a container.

    Raises:
        ConfigError: it cannot be read, or holds more than that.
    """
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # of pickle dialects, about files that are refused anyway
            torch.serialization.safe_globals([argparse.Namespace]),
        ):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file can make it raise anything; its own messages are pages
        raise ConfigError(
            f"{path} is damaged, or holds more than tensors and is not read because that could run code:"
            " where you trust it, save its state_dict alone, as .safetensors"
        ) from None
