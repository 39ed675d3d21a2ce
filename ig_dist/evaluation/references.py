"""What samples are held against: real images, or a file with their statistics; and how such a file is made."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from ig_dist import __version__
from ig_dist.config.catalogue import METRICS, extractors_of
from ig_dist.errors import ConfigError
from ig_dist.evaluation.metrics import train_classifier
from ig_dist.features.extractors.extractor import EXTRACTORS, Extractor, get_extractor
from ig_dist.features.features import FeatureFiles, Moments, make_features, streamed_moments
from ig_dist.features.images import find_images, npz_images
from ig_dist.features.npz import NpzFile, Streamed, open_npz, write_npz
from ig_dist.run_dir import replace_text
from ig_dist.storage.files import open_url, read_file
from ig_dist.storage.urls import LOCAL
from ig_dist.terminal import console, is_first_process, is_main_process
from ig_dist.this_process import this_device, this_process

if TYPE_CHECKING:
    from sklearn.svm import SVC

MANIFOLD_IMAGES = 10_000
"""Reference images of precision and recall, as many as ADM's files hold; of more as many are taken evenly."""
MANY_IMAGES = 200_000  # from here on the user is told that a file of statistics is the better reference
KERNEL_IMAGES = CLASSIFIED_IMAGES = 50_000  # likewise of KID, and of label agreement

_DESCRIBED = ("pool", "spatial")  # features whose statistics a reference file holds

Feature = tuple[str, str]  # extractor and name of a feature


class _MadeBy(BaseModel):
    """Of what stands beside a reference file: the extractors with the hashes of their weights."""

    extractors: dict[str, str] = {}


def statistics_keys(feature: Feature) -> tuple[str, str]:
    """Names of mean and covariance in an npz: ADM's of Inception's, and ours of the others."""
    adm = {("inception", "pool"): "", ("inception", "spatial"): "_s"}
    suffix = adm[feature] if feature in adm else f"_{feature[0]}"
    return f"mu{suffix}", f"sigma{suffix}"


@dataclass
class Reference:
    """Real images, as far as scores ask of them. Each is computed when it is first asked for."""

    name: str
    statistics: Mapping[Feature, Moments] = field(default_factory=dict)  # those that stand in a file
    files: FeatureFiles | None = None  # of its images, where it has some

    def __post_init__(self) -> None:
        self.moments, self.rows, self.classifier = cache(self._moments), cache(self._rows), cache(self._classifier)

    def _moments(self, feature: Feature) -> Moments:
        """Mean and covariance over all of its images."""
        if feature in self.statistics:
            return self.statistics[feature]
        files = self._images(feature)
        return streamed_moments(files.rows(*feature, files.num))

    def _rows(self, feature: Feature, most: int) -> NDArray[np.float32]:
        """Features (N, D) of its images; of more than ``most`` as many, taken evenly."""
        files = self._images(feature)
        return files.chosen(*feature, evenly_taken(files.num, most))

    def labels(self, extractor: str) -> NDArray[np.int64]:
        """Class of each of its images, (N,)."""
        files = self._images((extractor, ""))
        if not files.has(extractor, "labels"):
            raise ConfigError(
                f"label_agreement needs classes, and {self.name} has none: give an index as the reference"
            )
        return np.concatenate(list(files.rows(extractor, "labels", files.num)))

    def _classifier(self, feature: Feature) -> tuple["SVC", int]:
        """A classifier of its images, and how many classes they have."""
        rows, labels = self.rows(feature, CLASSIFIED_IMAGES), self.labels(feature[0])
        labels = labels[evenly_taken(len(labels), CLASSIFIED_IMAGES)]
        return train_classifier(rows, labels), int(labels.max()) + 1

    def protocol(self, metrics: Sequence[str]) -> dict[str, Any]:
        """What stands beside a score: how many images, and their hash."""
        told: dict[str, Any] = {"reference": self.name}
        moments = [self.moments(METRICS[name][1:]) for name in metrics if METRICS[name].kind == "frechet"]
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


def evenly_taken(num: int, most: int) -> NDArray[np.int64]:
    """Of ``num`` numbers ``most`` that lie evenly, or all."""
    taken = min(num, most)
    return np.arange(taken) * num // taken


def open_reference(
    src: str,
    metrics: Sequence[str],
    extractor: Callable[[str], Extractor],
    *,
    tokenizer: str = "",
    image_size: int | None = None,
    side: int | None = None,
    pictures: bool = False,
) -> Reference:
    """Read a reference, and make what features of its images are missing, by any number of processes.

    Args:
        src: an npz of statistics as ADM's or as `ig-dist reference` makes, or images, see ``find_images``.
        metrics: what it is for.
        extractor: gives an extractor by its name.
        tokenizer: as ``image_size`` of ``find_images``.
        image_size: see there.
        side: of the samples; a reference of pictures of another one is refused.
        pictures: it must have pictures, also where scores need its statistics only.

    Raises:
        ConfigError: nothing there, or it lacks what a score needs.
    """
    statistics: dict[Feature, Moments] = {}
    lacking = [name for name in metrics if METRICS[name].kind != "inception_score"]
    if src.endswith(".npz"):
        file = open_npz(src, "--reference", images=False)
        if "arr_0" in file.members:
            _check_side(src, file.member("arr_0").shape[1:3], side)
        statistics = _statistics(file, lacking, extractor)
        lacking = [name for name in lacking if METRICS[name].kind != "frechet" or METRICS[name][1:] not in statistics]
        if not (lacking or pictures):
            return Reference(src, statistics)
        if "arr_0" not in file.members:
            if not lacking:
                raise without_pictures(src)
            metric = METRICS[lacking[0]]
            keys = f", and no {' and '.join(statistics_keys(metric[1:]))}" if metric.kind == "frechet" else ""
            raise ConfigError(
                f"{src} has no images (arr_0){keys}, which {lacking[0]} needs: it has {', '.join(file.members)}"
            )
        images = npz_images(open_npz(src, "--reference"))
    else:
        images = find_images(src, image_size=image_size, tokenizer=tokenizer)
        if side is not None:
            _check_side(src, images.read(range(1)).images.shape[1:3], side)
    files = FeatureFiles(images, [extractor(name) for name in extractors_of(metrics if pictures else lacking)])
    if images.num > MANY_IMAGES and files.missing(0) and is_first_process():
        console.print(
            f"{src} has {images.num:,} images, whose features are made now and kept in {images.features_url}:"
            f" `ig-dist reference {src} --out FILE.npz` makes a file of their statistics, once for all"
        )
    make_features(files, what="reference features")
    return Reference(images.name, statistics, files)


def without_pictures(src: str) -> ConfigError:
    """What is raised where real pictures are to be shown."""
    return ConfigError(
        f"--nearest needs real pictures, and {src} has statistics only: give --reference an index, a folder or an npz"
        " with arr_0"
    )


def _statistics(file: NpzFile, metrics: Sequence[str], extractor: Callable[[str], Extractor]) -> dict[Feature, Moments]:
    """What a file says of the features of these scores."""
    found: dict[Feature, Moments] = {}
    made_by = _MadeBy()
    with contextlib.suppress(OSError, ValidationError):  # ADM's files have none
        made_by = _MadeBy.model_validate_json(read_file(LOCAL, str(Path(file.url).with_suffix(".json"))))
    for name in metrics:
        metric, feature = METRICS[name], METRICS[name][1:]
        mean, covariance = statistics_keys(feature)
        if metric.kind != "frechet" or not {mean, covariance} <= file.members.keys():
            continue
        ours = extractor(metric.extractor).sha256
        if (theirs := made_by.extractors.get(metric.extractor, ours)) != ours:
            raise ConfigError(
                f"{file.url}: its {metric.extractor} features are of weights {theirs[:16]}, those here are {ours[:16]}:"
                f" use the same weights (evaluate.weights.{metric.extractor}), or make it again"
            )
        first, second = file.member(mean), file.member(covariance)
        if len(first.shape) != 1 or second.shape != 2 * first.shape:
            raise ConfigError(
                f"{file.url}: {mean} has the shape {first.shape} and {covariance} {second.shape}: they are no mean (D,)"
                " and covariance (D, D)"
            )
        if {first.dtype.kind, second.dtype.kind} - set("fiu"):
            raise ConfigError(f"{file.url}: {mean} and {covariance} are no numbers: make it again")
        numbers = (file.array(key).astype(np.float64) for key in (mean, covariance))
        found[feature] = Moments(_count(file), *numbers)
    return found


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


def make_reference(
    src: str,
    out: Path,
    *,
    extractors: Sequence[str] = ("inception",),
    image_size: int | None = None,
    weights: Mapping[str, str] | None = None,
    tokenizer: str = "",
) -> str | None:
    """Write mean and covariance of the features of all images, and 10,000 of the images, taken evenly.

    The features are made in units under ``OUT.parts``, by any number of processes; after an interruption the same
    command goes on, and a process that is alone removes the folder at the end. ``weights`` are places, by the names of
    extractors; for ``src``, ``image_size`` and ``tokenizer`` see ``find_images``.

    Returns:
        What was made, in words; None from all processes but the first.

    Raises:
        ConfigError: nothing there, an unknown extractor, or ``out`` is no npz.
    """
    check_arguments(out, extractors)
    places, device = weights or {}, this_device()
    chosen = [get_extractor(name, weights=places.get(name, ""), device=device) for name in extractors]
    images, parts = find_images(src, image_size=image_size, tokenizer=tokenizer), Path(f"{out}.parts")
    files = FeatureFiles(replace(images, features_url=str(parts)), chosen)
    make_features(files, what="reference features")
    if not is_main_process():
        return None
    arrays: dict[str, NDArray[Any]] = {"num": np.array(images.num)}
    for name, extractor in files.extractors.items():
        for feature in _DESCRIBED:
            if feature in extractor.dimensions:
                moments = streamed_moments(files.rows(name, feature, images.num))
                mean, covariance = statistics_keys((name, feature))
                arrays |= {mean: moments.mean, covariance: moments.covariance}
    shown = evenly_taken(images.num, MANIFOLD_IMAGES)

    def pictures() -> Iterator[NDArray[np.uint8]]:
        return (images.read(range(row, row + 1)).images for row in shown.tolist())

    shape = images.read(range(1)).images.shape[1:]
    streams = {"arr_0": Streamed((len(shown), *shape), "uint8", pictures)}
    streams |= {name: Streamed(a.shape, a.dtype.name, lambda a=a: [a]) for name, a in arrays.items()}  # type: ignore[misc]
    fs, path = open_url(str(out), "--out")
    write_npz(fs, path, streams)
    provenance = {
        "source": src,
        "images": images.name,
        "num": images.num,
        "images_sha256": files.images_sha256(images.num),
        "extractors": {name: extractor.sha256 for name, extractor in files.extractors.items()},
        "preprocessing": {name: extractor.preprocessing for name, extractor in files.extractors.items()},
        "image_size": image_size,
        "made": f"{datetime.now(UTC):%Y-%m-%d}",
        "ig_dist": __version__,
    }
    said = out.with_suffix(".json")
    replace_text(said, json.dumps(provenance, indent=1) + "\n")
    told = f"{out}: {', '.join(arrays)} of {images.num:,} images, and {len(shown):,} of them; {said} says of what"
    if this_process().world_size > 1:  # another one may be about to read what is there, or would make it again
        return f"{told}; remove {parts} once all processes have ended"
    shutil.rmtree(parts, ignore_errors=True)
    return told


def check_arguments(out: Path, extractors: Sequence[str]) -> None:
    """Refuse what can be known to be wrong before any picture is read."""
    if out.suffix != ".npz":
        raise ConfigError(f"--out {out}: give the name of an npz, e.g. {out.with_suffix('.npz')}")
    for name in extractors:
        if name not in EXTRACTORS:
            raise ConfigError(f"--extractors {name!r}: use some of {', '.join(EXTRACTORS)}")
