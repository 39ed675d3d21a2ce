"""What samples are held against: real images, or a file with their statistics."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ig_dist.errors import ConfigError
from ig_dist.evaluation.catalogue import METRICS, extractors_of
from ig_dist.evaluation.extractors.extractor import Extractor
from ig_dist.evaluation.features import FeatureFiles, make_features
from ig_dist.evaluation.images import find_images, npz_images
from ig_dist.evaluation.metrics import train_classifier
from ig_dist.evaluation.moments import Moments, streamed_moments
from ig_dist.evaluation.npz import NpzFile, open_npz
from ig_dist.storage.files import read_file
from ig_dist.storage.urls import LOCAL
from ig_dist.terminal import console, is_first_process

if TYPE_CHECKING:
    from sklearn.svm import SVC

MANIFOLD_IMAGES = 10_000
"""Reference images of precision and recall, as many as ADM's files hold; of more as many are taken evenly."""
MANY_IMAGES = 200_000
"""From here on the user is told that a file of statistics is the better reference."""
KERNEL_IMAGES = CLASSIFIED_IMAGES = 50_000
"""Likewise of KID, and of label agreement."""

Feature = tuple[str, str]
"""Extractor and name of a feature."""


def statistics_keys(feature: Feature) -> tuple[str, str]:
    """Names of mean and covariance in an npz: ADM's of Inception's, and ours of the others."""
    adm = {("inception", "pool"): "", ("inception", "spatial"): "_s"}
    suffix = adm[feature] if feature in adm else f"_{feature[0]}"
    return f"mu{suffix}", f"sigma{suffix}"


@dataclass
class Reference:
    """Real images, as far as scores ask of them. Each is computed when it is first asked for."""

    name: str
    statistics: Mapping[Feature, Moments] = field(default_factory=dict)
    """Those that stand in a file."""
    files: FeatureFiles | None = None
    """Of its images, where it has some."""

    def __post_init__(self) -> None:
        self._moments: dict[Feature, Moments] = dict(self.statistics)
        self._rows: dict[tuple[Feature, int], NDArray[Any]] = {}
        self._classifiers: dict[Feature, tuple[SVC, int]] = {}

    def moments(self, feature: Feature) -> Moments:
        """Mean and covariance over all of its images."""
        if feature not in self._moments:
            files = self._images(feature)
            self._moments[feature] = streamed_moments(files.rows(*feature, files.images.num))
        return self._moments[feature]

    def rows(self, feature: Feature, most: int) -> NDArray[np.float32]:
        """Features (N, D) of its images; of more than ``most`` as many, taken evenly."""
        key = (feature, most)
        if key not in self._rows:
            files = self._images(feature)
            self._rows[key] = np.concatenate(
                list(_even(files.rows(*feature, files.images.num), files.images.num, most))
            )
        return self._rows[key]

    def labels(self, extractor: str) -> NDArray[np.int64]:
        """Class of each of its images, (N,).

        Raises:
            ConfigError: they are not known.
        """
        files = self._images((extractor, ""))
        found = [files.read(number, extractor, "labels") for number in range(files.images.num_units)]
        known = [labels for labels in found if labels is not None]
        if len(known) < len(found):
            raise ConfigError(
                f"label_agreement needs classes, and {self.name} has none: give an index as the reference"
            )
        return np.concatenate(known)

    def classifier(self, feature: Feature) -> tuple[SVC, int]:
        """A classifier of its images, and how many classes they have."""
        if feature not in self._classifiers:
            rows, labels = self.rows(feature, CLASSIFIED_IMAGES), self.labels(feature[0])
            if len(labels) > len(rows):
                labels = labels[np.arange(len(rows)) * len(labels) // len(rows)]
            self._classifiers[feature] = (train_classifier(rows, labels), int(labels.max()) + 1)
        return self._classifiers[feature]

    def protocol(self, metrics: Sequence[str]) -> dict[str, Any]:
        """What stands beside a score: how many images, and their hash."""
        told: dict[str, Any] = {"reference": self.name}
        moments = [self._moments[METRICS[name][1:]] for name in metrics if METRICS[name].kind == "frechet"]
        if moments:
            counts = {found.count for found in moments}
            told["reference_images"] = max(counts) or "not said by the file"
            told["reference_sha256"] = ", ".join(dict.fromkeys(found.sha256 for found in moments))
        if self.files is not None and any(METRICS[name].kind not in ("frechet", "inception_score") for name in metrics):
            told["reference_pictures"] = self.files.images.num
            told["reference_pictures_sha256"] = self.files.images_sha256(self.files.images.num)
        return told

    def _images(self, feature: Feature) -> FeatureFiles:
        if self.files is None:
            raise ConfigError(f"{self.name} has neither images (arr_0) nor statistics of {' '.join(feature)} features")
        return self.files


def _even(batches: Iterator[NDArray[Any]], num: int, most: int) -> Iterator[NDArray[Any]]:
    """Of ``num`` rows in batches ``most`` that lie evenly, or all."""
    chosen = np.arange(num) if num <= most else np.arange(most) * num // most
    start = 0
    for batch in batches:
        yield batch[chosen[(chosen >= start) & (chosen < start + len(batch))] - start]
        start += len(batch)


def open_reference(
    src: str,
    metrics: Sequence[str],
    extractor: Callable[[str], Extractor],
    *,
    tokenizer: str = "",
    image_size: int | None = None,
    side: int | None = None,
) -> Reference:
    """Read a reference, and make what features of its images are missing, by any number of processes.

    Args:
        src: an npz of statistics as ADM's or as `ig-dist reference` makes, or images, see ``find_images``.
        metrics: what it is for.
        extractor: gives an extractor by its name.
        tokenizer: of an index, see ``index_images``.
        image_size: see ``find_images``.
        side: of the samples; a reference of pictures of another one is refused.

    Raises:
        ConfigError: nothing there, or it lacks what a score needs.
    """
    statistics: dict[Feature, Moments] = {}
    compared = [name for name in metrics if METRICS[name].kind != "inception_score"]
    if src.endswith(".npz"):
        file = open_npz(src, "--reference", images=False)
        if "arr_0" in file.members:
            _check_side(src, file.member("arr_0").shape[1:3], side)
        made_by = _provenance(src)
        for name in compared:
            metric, feature = METRICS[name], METRICS[name][1:]
            mean, covariance = statistics_keys(feature)
            if metric.kind != "frechet" or mean not in file.members or covariance not in file.members:
                continue
            ours = extractor(metric.extractor).sha256
            if made_by.get(metric.extractor, ours) != ours:
                raise ConfigError(
                    f"{src}: its {metric.extractor} features are of weights"
                    f" {made_by[metric.extractor][:16]}, those here are {ours[:16]}: use the"
                    f" same weights (evaluate.weights.{metric.extractor}), or make it again"
                )
            shapes = file.member(mean).shape, file.member(covariance).shape
            if len(shapes[0]) != 1 or shapes[1] != 2 * shapes[0]:
                raise ConfigError(
                    f"{src}: {mean} has the shape {shapes[0]} and {covariance} {shapes[1]}: they are no mean (D,) and"
                    " covariance (D, D)"
                )
            if {file.member(key).dtype.kind for key in (mean, covariance)} - set("fiu"):
                raise ConfigError(f"{src}: {mean} and {covariance} are no numbers: make it again")
            statistics[feature] = Moments(
                _count(file), file.array(mean).astype(np.float64), file.array(covariance).astype(np.float64)
            )
        lacking = [name for name in compared if METRICS[name][1:] not in statistics or METRICS[name].kind != "frechet"]
        if not lacking:
            return Reference(src, statistics)
        if "arr_0" not in file.members:
            metric = METRICS[lacking[0]]
            keys = f", and no {' and '.join(statistics_keys(metric[1:]))}" if metric.kind == "frechet" else ""
            raise ConfigError(
                f"{src} has no images (arr_0){keys}, which {lacking[0]} needs: it has {', '.join(file.members)}"
            )
        images = npz_images(open_npz(src, "--reference"))
    else:
        lacking = compared
        images = find_images(src, image_size=image_size, tokenizer=tokenizer)
        if side is not None:
            _check_side(src, images.read(range(1)).images.shape[1:3], side)
    files = FeatureFiles(images, [extractor(name) for name in extractors_of(lacking)])
    if images.num > MANY_IMAGES and files.missing(0) and is_first_process():
        console.print(
            f"{src} has {images.num:,} images, whose features are made now and kept in {images.features_url}:"
            f" `ig-dist reference {src} --out FILE.npz` makes a file of their statistics, once for all"
        )
    make_features(files, what="reference features")
    return Reference(images.name, statistics, files)


def _check_side(src: str, shape: tuple[int, ...], side: int | None) -> None:
    if side is not None and shape != (side, side):
        raise ConfigError(
            f"{src} has pictures of {' x '.join(map(str, reversed(shape)))}, the samples are {side} x {side}: give a"
            " reference of that size (evaluate.reference)"
        )


def _count(file: NpzFile) -> int:
    """Images that statistics are of; 0: not said."""
    if "num" not in file.members:
        return 0
    told = file.member("num")
    if told.dtype.kind not in "iu" or told.shape not in ((), (1,)):
        raise ConfigError(f"{file.url}: num is {told.dtype} of shape {told.shape}, it is to be a number of images")
    return int(file.array("num").item())


@cache
def _provenance(src: str) -> dict[str, str]:
    """The extractors, by name with their hash, that `ig-dist reference` wrote beside an npz; empty: nothing."""
    file = Path(src).with_suffix(".json")
    try:
        found = json.loads(read_file(LOCAL, str(file)))["extractors"]
        return {str(name): str(sha256) for name, sha256 in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
