"""Features are part of a set of images: for unit k and an extractor one file, made once, read by every score.

No locks, as with units: a feature file is a function of (images, extractor), written whole, so two workers that make
the same one write the same bytes. Its header says which images and which extractor it belongs to, with a hash of each
tensor and one of all that it says: what is stale or damaged is made again and counted. ``streamed_moments`` sums up
features of any number of images.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from ig_dist.errors import ConfigError, DataError
from ig_dist.features.extractors.extractor import Extractor
from ig_dist.features.images import UNIT_SIZE, ImageSet
from ig_dist.plans.samples import Pictures, write_file
from ig_dist.storage.files import open_url, read_range
from ig_dist.terminal.progress import progress
from ig_dist.this_process import this_process

FORMAT = "ig-dist-features/1"
_KEY = "features"  # one key: safetensors writes several in an order that changes from call to call
_HEADER_BYTES = 4096  # read at first; holds the whole header but of an odd file
_DTYPES = {"F32": "float32", "F64": "float64", "I64": "int64"}  # safetensors' names
_TRIES = 5  # of a file that other processes may find damaged too, and remove


def feature_name(number: int, extractor: str) -> str:
    """Name of the file with a unit's features."""
    return f"unit_{number:05d}.{extractor}.safetensors"


def _sha256(values: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def _sha256_of(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@dataclass
class HeldFeatures:
    """Features in memory, of images that are not kept; read as those of ``FeatureFiles``."""

    name: str
    num: int
    extractors: Mapping[str, Extractor]
    tensors: Mapping[tuple[str, str], NDArray[Any]]  # by extractor and name; ``labels`` and ``work`` by every extractor
    unfit: set[tuple[int, str]] = field(default_factory=set)

    def has(self, extractor: str, tensor: str) -> bool:
        """Whether there is such a tensor."""
        return (extractor, tensor) in self.tensors

    def rows(self, extractor: str, tensor: str, num: int) -> Iterator[NDArray[Any]]:
        """A tensor of the first ``num`` images, piece by piece."""
        values = self.tensors[extractor, tensor][:num]
        return (values[start : start + UNIT_SIZE] for start in range(0, len(values), UNIT_SIZE))


class FeatureFiles:
    """The feature files of a set of images, by extractors."""

    def __init__(self, images: ImageSet, extractors: Sequence[Extractor]) -> None:
        self.images = images
        self.extractors: Mapping[str, Extractor] = {
            extractor.name.partition("-")[0]: extractor for extractor in extractors
        }
        """By their names without the hash that marks other weights than the published ones."""
        self.unfit: set[tuple[int, str]] = set()
        """Files that belonged to other images or another extractor, or were damaged, and were made again."""
        self.name, self.num = images.name, images.num
        self._fs, self._path = open_url(images.features_url, "features")

    def missing(self, number: int) -> list[Extractor]:
        """The extractors whose features of a unit are not there, or belong to something else."""
        return [extractor for extractor in self.extractors.values() if self._header(number, extractor) is None]

    def make(self, number: int) -> None:
        """Make what is missing of a unit."""
        if missing := self.missing(number):
            pictures = self.images.read(self.images.unit(number))
            for extractor in missing:
                self.write(number, extractor, pictures, extractor(pictures.images))

    def write(
        self, number: int, extractor: Extractor, pictures: Pictures, features: Mapping[str, Tensor | NDArray[Any]]
    ) -> None:
        """Write the features of a unit, with its labels and work, and what they belong to."""
        tensors = {key: torch.as_tensor(value).cpu().numpy() for key, value in features.items()}
        tensors |= {name: values for name in ("labels", "work") if (values := getattr(pictures, name)) is not None}
        named = {dtype: name for name, dtype in _DTYPES.items()}
        told = {
            **self._belongs(number, extractor),
            "images_sha256": _sha256(pictures.images),
            "tensors": {name: [named[v.dtype.name], [*v.shape], _sha256(v)] for name, v in tensors.items()},
        }
        told["sha256"] = _sha256_of(told)
        data = safetensors.numpy.save(tensors, metadata={_KEY: json.dumps(told, sort_keys=True)})
        write_file(self._fs, self._file(number, extractor.name), data)

    def read(self, number: int, extractor: str, tensor: str) -> NDArray[Any] | None:
        """One tensor of a unit's features, verified; None where the set has no such thing (labels, work)."""
        chosen = self.extractors[extractor]
        file = self._file(number, chosen.name)
        for _ in range(_TRIES):
            with contextlib.suppress(FileNotFoundError):  # another process found it damaged
                if told := self._header(number, chosen):
                    if tensor not in told["tensors"]:
                        return None
                    dtype, shape, sha256, first, last = told["tensors"][tensor]
                    data = read_range(self._fs, file, first, last)
                    if hashlib.sha256(data).hexdigest() == sha256:
                        return np.frombuffer(data, _DTYPES[dtype]).reshape(shape)
                    self.unfit.add((number, chosen.name))
                    self._fs.rm_file(file)
            self.make(number)
        raise DataError(f"{file} does not stay as it is written: mend the storage")

    def has(self, extractor: str, tensor: str) -> bool:
        """Whether there is such a tensor; labels and work are not known of all images."""
        return self.read(0, extractor, tensor) is not None

    def rows(self, extractor: str, tensor: str, num: int) -> Iterator[NDArray[Any]]:
        """A tensor of the first ``num`` images, unit by unit."""
        for number in range(-(-num // self.images.unit_size)):
            values = self.read(number, extractor, tensor)
            assert values is not None
            yield values[: num - number * self.images.unit_size]

    def chosen(self, extractor: str, tensor: str, numbers: NDArray[np.int64]) -> NDArray[Any]:
        """A tensor of these images, in their order; each unit is read once."""
        size = self.images.unit_size
        parts, order = list[NDArray[Any]](), np.argsort(numbers // size, kind="stable")
        for unit in np.unique(numbers // size):
            values = self.read(int(unit), extractor, tensor)
            assert values is not None
            parts.append(values[numbers[numbers // size == unit] % size])
        found = np.concatenate(parts)
        found[order] = found.copy()
        return found

    def images_sha256(self, num: int) -> str:
        """Hash over the hashes of the units of the first ``num`` images."""
        extractor, digest = next(iter(self.extractors.values())), hashlib.sha256()
        for number in range(-(-num // self.images.unit_size)):
            told = self._header(number, extractor)
            assert told is not None
            digest.update(bytes.fromhex(told["images_sha256"]))
        return digest.hexdigest()

    def _file(self, number: int, extractor: str) -> str:
        return f"{self._path}/{feature_name(number, extractor)}"

    def _belongs(self, number: int, extractor: Extractor) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "images": self.images.identity,
            "unit": [number, self.images.unit_size],
            "extractor": extractor.name,
            "extractor_sha256": extractor.sha256,
        }

    def _header(self, number: int, extractor: Extractor) -> dict[str, Any] | None:
        """What a unit's file says of itself, with each tensor's place in it (type, shape, hash, first and last byte).

        None: it is not there, or is unfit and counted as such.
        """
        path = self._file(number, extractor.name)
        try:
            size = self._fs.size(path)
            head = bytes(read_range(self._fs, path, 0, min(size, _HEADER_BYTES)))
            begin = 8 + int.from_bytes(head[:8], "little")
            if len(head) < begin <= size:
                head = bytes(read_range(self._fs, path, 0, begin))
            entries = json.loads(head[8:begin])
            told: dict[str, Any] = json.loads(entries.pop("__metadata__")[_KEY])
            sha256 = told.pop("sha256")
            listed = {name: [entry["dtype"], entry["shape"]] for name, entry in entries.items()}
            offsets = {name: entry["data_offsets"] for name, entry in entries.items()}
            fits = (
                sha256 == _sha256_of(told)
                and all(told[key] == value for key, value in self._belongs(number, extractor).items())
                and listed == {name: entry[:2] for name, entry in told["tensors"].items()}
                and all(0 <= first <= last for first, last in offsets.values())
                and size == begin + max(last for _, last in offsets.values())
            )
        except FileNotFoundError:
            return None
        except (ValueError, LookupError, TypeError, AttributeError):
            fits = False
        if not fits:
            self.unfit.add((number, extractor.name))
            return None
        for name, (first, last) in offsets.items():
            told["tensors"][name] += begin + first, begin + last
        return told


Features = FeatureFiles | HeldFeatures  # what scores read


def make_features(files: FeatureFiles, *, num: int | None = None, what: str = "features") -> None:
    """Make the features of every unit that lacks them, from this process's own place on; any number may be at work.

    ``num``: only the units of the first so many images. ``what`` names it in the progress.
    """
    images, (worker, workers) = files.images, this_process()[:2]
    units = -(-min(num or images.num, images.num) // images.unit_size)
    first, sizes = worker * units // workers, [len(images.unit(number)) for number in range(units)]
    lacking = [number for number in (*range(first, units), *range(first)) if files.missing(number)]
    if not lacking:
        return
    with progress(what, sum(sizes), "images", sum(sizes) - sum(sizes[number] for number in lacking)) as advance:
        for number in lacking:
            files.make(number)  # unless another worker has made it meanwhile
            advance(sizes[number])


@dataclass(frozen=True)
class Moments:
    """Number, mean and covariance of features; covariance with N - 1, as the published FID code has it."""

    count: int
    mean: NDArray[np.float64]  # (D,)
    covariance: NDArray[np.float64]  # (D, D)

    @property
    def sha256(self) -> str:
        """Hash of the three."""
        return hashlib.sha256(b"%d" % self.count + self.mean.tobytes() + self.covariance.tobytes()).hexdigest()


def streamed_moments(batches: Iterable[NDArray[Any]]) -> Moments:
    """Moments of all features (n, D), batch by batch (Chan, Golub and LeVeque 1979: no cancellation).

    It needs the memory of two covariances and of one batch. The result is a function of the batches in their order,
    to the bit; batches that are cut otherwise change its rounding.
    """
    count, mean, scatter, product = 0, np.zeros(0), np.zeros((0, 0)), np.zeros((0, 0))
    for batch in batches:
        if not (size := len(batch)):
            continue
        if not count:
            dimensions = batch.shape[1]
            mean, scatter, product = np.zeros(dimensions), *np.zeros((2, dimensions, dimensions))
        # the rows about their own mean; and one more, whose square is what the two means' difference adds
        centred = np.empty((size + 1, len(mean)))
        centred[:size] = batch
        batch_mean = centred[:size].mean(axis=0)
        centred[:size] -= batch_mean
        total = count + size
        centred[size] = (batch_mean - mean) * (count * size / total) ** 0.5
        scatter += np.matmul(centred.T, centred, out=product)  # of a matrix and itself: half the work, and symmetric
        mean += (batch_mean - mean) * (size / total)
        count = total
    if count < 2:
        raise ConfigError(f"a Frechet distance needs at least two images, there are {count}: use a larger sample.num")
    scatter /= count - 1
    return Moments(count, mean, scatter)
