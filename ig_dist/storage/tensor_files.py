"""Tensors in files of other programs: safetensors, and PyTorch's pickles as far as they hold nothing that runs."""

import argparse
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ig_dist.errors import ConfigError

_SHARED = 4  # times that a number may stand in tensors: as a weight, in its average, in an optimizer


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a ConfigError says why it cannot be read."""
    _refuse_pipes(path)
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
    _refuse_pipes(path)
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # of pickle dialects, about files that are refused anyway
            torch.serialization.safe_globals([argparse.Namespace]),
        ):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file can make it raise anything; its own messages are pages
        raise ConfigError(
            f"{path} is damaged, or holds more than tensors and is not read because that could run code:"
            " where you trust it, save its state_dict alone, as .safetensors"
        ) from None
    if not _as_large_as_said(found, path.stat().st_size):
        raise ConfigError(f"{path} has tensors whose numbers are not in it: save the state_dict again, as .safetensors")
    return found


def _refuse_pipes(path: Path) -> None:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ConfigError(f"{path} is no file: download or save it again")


def _as_large_as_said(found: Any, size: int) -> bool:
    """Whether all tensors are plain numbers that the file holds: one repeated a billion times is named in 100 bytes."""
    left, seen, total = [found], set[int](), 0
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_nested or value.device.type != "cpu":
                return False
            count = value.numel() * value.element_size()
            total += count
            if count > value.untyped_storage().nbytes() or total > _SHARED * size:
                return False
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            left += [*value.values()] if isinstance(value, dict) else value
    return True
