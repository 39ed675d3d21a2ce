"""What the checks and the measurements of ``benchmarks/gpu.py`` share: where they run, and their training step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from benchmarks.synthetic import build_step, synthetic_info
from ig_dist.config import Config
from ig_dist.config.file import load_config
from ig_dist.models.presets import forward_flops
from ig_dist.parallel.dist import Dist

Found = dict[str, float | int | str]
"""Figures by what they are of."""

TINY = ("model.depth=3", "model.hidden_size=32", "model.num_heads=2", "model.aux_depth=1", "model.preset=null")


class Case(NamedTuple):
    """Where a check runs, and on what."""

    device: torch.device
    golden: Path
    """Folder of the recorded numbers."""
    folder: Path
    """Scratch space that the checks of one report share."""
    reference: Path | None = None
    """Folder of the published code, where it is at hand."""

    @property
    def small(self) -> bool:
        """Whether this is the form for a CPU."""
        return self.device.type != "cuda"

    @property
    def dist(self) -> Dist:
        """This process, alone."""
        return Dist(0, 1, 0, 1, self.device)


class NotHereError(Exception):
    """The check means nothing on this machine, or what it tries is not installed."""


def needs_a_gpu(case: Case) -> None:
    """Raise NotHereError on a CPU."""
    if case.small:
        raise NotHereError("needs a GPU")


@contextlib.contextmanager
def small_compiler() -> Iterator[None]:
    """torch.compile for graphs and guards only: its C++ compiler would take longer than all else on a CPU."""
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="eager")):
        yield


def step_config(case: Case, name: str, batch_size: int, *, compiled: bool) -> Config:
    """A published config, on synthetic latents; of a tiny model on a CPU."""
    given = {
        "data.index": "synthetic",
        "data.streams": 1,
        "data.posterior": "draw",
        "data.flip": "false",
        "train.global_batch_size": batch_size,
        "train.compile": compiled,
    }
    tiny = [*TINY, f"model.patch_size={1 if 'lightning' in name else 2}"] if case.small else []
    return load_config(name, [*tiny, *(f"{key}={value}" for key, value in given.items())])


def step_of(case: Case, config: Config) -> Callable[[], None]:
    """``build_step`` for the latents of a published config."""
    shape = config.model.in_channels or 4, config.model.input_size or 32
    return build_step(config, synthetic_info(*shape, 1000), case.dist)


def flops_of(config: Config) -> int:
    """FLOPs of a forward pass of one image of a published config."""
    channels, side = config.model.in_channels or 4, config.model.input_size or 32
    return forward_flops(config.with_data((channels, side, side), 1000).model.to_dit())
