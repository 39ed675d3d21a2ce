"""The nearest reference pictures of samples, to look at: a check against memorisation."""

from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ig_dist.errors import ConfigError
from ig_dist.evaluation.references import Reference, evenly_taken, without_pictures
from ig_dist.features.features import FeatureFiles
from ig_dist.plans.samples import is_run
from ig_dist.sampling.pictures import pictures_in_rows
from ig_dist.storage.writable import why_unwritable
from ig_dist.terminal import console

NEIGHBOURS = 3
REAL_QUERIES = 256  # reference pictures whose own nearest ones give the scale, taken evenly
SUSPICIOUS = 0.3  # labels below it are red: far nearer than real pictures are to each other

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]


class Nearest(NamedTuple):
    """Samples and the reference pictures that are nearest to each."""

    samples: Numbers  # (C,)
    neighbours: Numbers  # (C, NEIGHBOURS), the nearest first
    distances: Floats  # (C, NEIGHBOURS), over the median distance of a reference picture to its nearest other one


def nearest_pictures(
    files: FeatureFiles, reference: Reference, columns: int, file: Path, num: int | None = None
) -> Nearest:
    """Draw the samples that the extractor is most sure of above the reference pictures that are nearest in features.

    Features are read unit by unit; distances are Euclidean, in ``pool`` features. Of an extractor without logits the
    first samples of each class are taken. ``num``: of the first so many samples only.
    """
    if reference.files is None:
        raise without_pictures(reference.name)
    real, num = reference.files, min(num or files.num, files.num)
    if real.num <= NEIGHBOURS:
        raise ConfigError(f"--nearest needs more than {NEIGHBOURS} real pictures, {real.name} has {real.num}")
    shared = [name for name in files.extractors if name in real.extractors]
    if not shared:
        raise ConfigError(f"--nearest: {real.name} has no features of {', '.join(files.extractors)}")
    name = max(shared, key=lambda name: "logits" in files.extractors[name].dimensions)
    chosen = _most_sure(files, name, min(columns, num), num)
    ours = files.chosen(name, "pool", chosen)
    theirs = real.chosen(name, "pool", evenly_taken(real.num, REAL_QUERIES))
    if ours.shape[1] != theirs.shape[1]:
        raise ConfigError(
            f"--nearest: pictures of {reference.name} have {theirs.shape[1]} {name} values, the samples"
            f" {ours.shape[1]}: give a reference of pictures like those that the model was trained on"
        )
    squared, numbers = _search(np.concatenate([ours, theirs]).astype(np.float64), real, name)
    between = np.sqrt(squared[len(chosen) :, 1])  # the nearest one is the real picture itself, or a copy of it
    scale = float(np.median(between)) or 1.0  # 0: every real picture is there twice
    found = Nearest(chosen, numbers[: len(chosen)], np.sqrt(squared[: len(chosen)]) / scale)
    file.parent.mkdir(parents=True, exist_ok=True)
    _draw(found, files, real, name).save(file)
    console.print(
        f"nearest real pictures of {len(chosen)} samples: {file} (the nearest one: {found.distances.min():.2f} of the"
        " median between real pictures; far below 1 smells of memorisation)"
    )
    return found


def picture_of(src: str, plan: str | None = None, run: Path | None = None) -> Path:
    """Where the picture goes: beside the others of a plan's run, or beside the images; of remote ones here."""
    if plan is not None and run is not None and is_run(run) and not why_unwritable(run / "samples"):
        return run / "samples" / f"{plan}_nearest.png"
    name = f"{PurePosixPath(src.rstrip('/')).name.removesuffix('.npz')}_nearest.png"
    return Path(name) if "://" in src else Path(src).absolute().parent / name


def _most_sure(files: FeatureFiles, name: str, columns: int, num: int) -> Numbers:
    """Numbers of the samples with the highest probability of any class; without logits of the first of each class."""
    if "logits" in files.extractors[name].dimensions:
        parts = (logits.astype(np.float64) for logits in files.rows(name, "logits", num))
        sure = np.concatenate([1 / np.exp(p - p.max(axis=1, keepdims=True)).sum(axis=1) for p in parts])
        return np.argsort(-sure, kind="stable")[:columns]
    if not files.has(name, "labels"):
        return np.arange(columns)
    labels = np.concatenate(list(files.rows(name, "labels", num)))
    by_class = np.argsort(labels, kind="stable")
    turn = np.empty(num, np.int64)  # how many of its class come before it
    turn[by_class] = np.arange(num) - np.searchsorted(labels[by_class], labels[by_class])
    return np.lexsort((labels, turn))[:columns]


def _search(queries: Floats, real: FeatureFiles, name: str) -> tuple[Floats, Numbers]:
    """Squared distances and numbers of the reference pictures nearest to features (Q, D), each (Q, NEIGHBOURS)."""
    best = np.full((len(queries), NEIGHBOURS), np.inf)
    where = np.full((len(queries), NEIGHBOURS), -1)
    norms, start = (queries**2).sum(axis=1), 0
    for values in real.rows(name, "pool", real.num):
        rows = values.astype(np.float64)
        squared = norms[:, None] + (rows**2).sum(axis=1)[None] - 2.0 * queries @ rows.T
        numbers = np.broadcast_to(np.arange(start, start + len(rows)), squared.shape)
        squared, numbers = np.concatenate([best, squared], axis=1), np.concatenate([where, numbers], axis=1)
        order = np.argsort(squared, axis=1, kind="stable")[:, :NEIGHBOURS]
        best, where = np.take_along_axis(squared, order, axis=1), np.take_along_axis(numbers, order, axis=1)
        start += len(rows)
    rounding = 1e-12 * norms[:, None]  # of a difference of large numbers: a copy is at distance 0
    return np.where(best <= rounding, 0.0, best), where


def _draw(found: Nearest, files: FeatureFiles, real: FeatureFiles, name: str) -> Image.Image:
    rows = [("sample", files.images.chosen(found.samples), [str(sample) for sample in found.samples])]
    for k, distances in enumerate(found.distances.T):
        pictures = real.images.chosen(found.neighbours[:, k])
        rows.append(("" if k else "nearest", pictures, [f"{distance:.2f}" for distance in distances]))
    red = {f"{distance:.2f}" for distance in found.distances.flat if distance < SUSPICIOUS}
    title = (
        f"samples above the nearest real pictures in {name} features; 1 = as far as a real picture's nearest other one"
    )
    return pictures_in_rows(rows, title, red)
