"""Units: the pieces of a plan that one worker makes and writes whole, one file each.

No locks: a unit's bytes are a function of (plan, unit), so two workers that make the same one write the same file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from ig_dist.errors import DataError
from ig_dist.export import ExportInfo
from ig_dist.plans.plan import Plan
from ig_dist.storage.files import open_url, read_file, write_whole
from ig_dist.storage.urls import full_url

Work = NDArray[np.int64]  # (N, 3): velocity evaluations, and forward passes of the model and of the second one


class Unit(NamedTuple):
    """What one file holds."""

    images: NDArray[np.uint8]  # (N, H, W, channels)
    labels: NDArray[np.int64]  # (N,)
    work: Work


@dataclass(frozen=True)
class Samples:
    """Where the images of a plan are, and all that a score's protocol needs."""

    plan: Plan
    info: ExportInfo
    url: str
    uint8_rule: str  # how decoded values became uint8
    tokenizer: str = ""  # where the tokenizer was found; empty: under its name in the index
    weak: ExportInfo | None = None  # of the second model, where guidance has an auto term


def unit_name(number: int) -> str:
    """Name of the file with a unit's images."""
    return f"unit_{number:05d}.safetensors"


def write_unit(url: str, number: int, unit: Unit) -> None:
    """Write a unit, see ``write_file``."""
    fs, path = open_url(url, "sample.url")
    write_file(fs, f"{path}/{unit_name(number)}", safetensors.numpy.save(unit._asdict()))


def write_file(fs: Any, path: str, data: bytes) -> None:
    """Write a file, whole or not at all."""
    with _written(fs, path):
        write_whole(fs, path, data)


def make_folder(fs: Any, path: str) -> None:
    """Make a folder and those above it; raises as ``write_file``."""
    with _written(fs, path):
        fs.makedirs(path, exist_ok=True)


@contextlib.contextmanager
def _written(fs: Any, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{full_url(fs, path)} cannot be written ({error.strerror or error}): make room or choose another place,"
            " then run the same command again; what is there is kept"
        ) from None


def read_unit(plan: Plan, url: str, number: int) -> Unit:
    """One unit."""
    fs, path = open_url(url, "sample.url")
    file = f"{path}/{unit_name(number)}"
    try:
        unit = safetensors.numpy.load(read_file(fs, file))
        whole = Unit(unit["images"], unit["labels"], unit["work"])
    except FileNotFoundError:
        raise DataError(
            f"{url}: the images of unit {number} of {plan.num_units} are not there: run the same sampling again (with"
            " sample.keep_images=true, where they were dropped)"
        ) from None
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError):
        raise DataError(f"{full_url(fs, file)} is damaged: delete it and run the same sampling again") from None
    if not _fits(whole, len(plan.unit(number)), plan.num_classes):
        raise DataError(f"{full_url(fs, file)} is of another plan: delete it and run the same sampling again")
    return whole


def _fits(unit: Unit, num: int, num_classes: int) -> bool:
    """Whether these are arrays of a unit of so many images."""
    kinds = [(values.dtype, values.shape[:1], values.ndim) for values in unit]
    expected = [(np.dtype(dtype), (num,), ndim) for dtype, ndim in (("u1", 4), ("i8", 1), ("i8", 2))]
    labels = unit.labels
    return kinds == expected and not len(labels[(labels < 0) | (labels >= num_classes)])


def existing(fs: Any, path: str) -> set[str]:
    """Names of the files in a plan's folder, whoever wrote them."""
    fs.invalidate_cache()
    return {PurePosixPath(name).name for name in fs.ls(path, detail=False)} if fs.exists(path) else set()
