"""Making a file of statistics of real images, in ADM's format, with provenance beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ig_dist import __version__
from ig_dist.errors import ConfigError
from ig_dist.evaluation.extractors.extractor import EXTRACTORS, get_extractor
from ig_dist.evaluation.features import FeatureFiles, make_features
from ig_dist.evaluation.images import find_images
from ig_dist.evaluation.moments import streamed_moments
from ig_dist.evaluation.npz_writing import Streamed, write_npz
from ig_dist.evaluation.references import MANIFOLD_IMAGES, statistics_keys
from ig_dist.run_dir import replace_text
from ig_dist.storage.files import open_url
from ig_dist.terminal import is_main_process
from ig_dist.this_process import this_device, this_process

STATISTICS_OF = ("pool", "spatial")


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
    command goes on, and a process that is alone removes the folder at the end.

    Args:
        src: images, see ``find_images``.
        out: the npz.
        extractors: whose features.
        image_size: see ``find_images``.
        weights: of extractors, by their names.
        tokenizer: of an index, see ``index_images``.

    Returns:
        What was made, in words; None from all processes but the first.

    Raises:
        ConfigError: nothing there, an unknown extractor, or ``out`` is no npz.
    """
    check_arguments(out, extractors)
    device = this_device()
    chosen = [get_extractor(name, weights=(weights or {}).get(name, ""), device=device) for name in extractors]
    images = find_images(src, image_size=image_size, tokenizer=tokenizer)
    parts = Path(f"{out}.parts")
    files = FeatureFiles(replace(images, features_url=str(parts)), chosen)
    make_features(files, what="reference features")
    if not is_main_process():
        return None
    arrays: dict[str, NDArray[Any]] = {"num": np.array(images.num)}
    for name, extractor in files.extractors.items():
        for feature in STATISTICS_OF:
            if feature in extractor.dimensions:
                moments = streamed_moments(files.rows(name, feature, images.num))
                mean, covariance = statistics_keys((name, feature))
                arrays |= {mean: moments.mean, covariance: moments.covariance}
    taken = min(images.num, MANIFOLD_IMAGES)
    chosen_rows = [i * images.num // taken for i in range(taken)]

    def pictures() -> Iterator[NDArray[np.uint8]]:
        return (images.read(range(row, row + 1)).images for row in chosen_rows)

    shape = images.read(range(1)).images.shape[1:]
    streams = {"arr_0": Streamed((taken, *shape), "uint8", pictures)}
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
    replace_text(out.with_suffix(".json"), json.dumps(provenance, indent=1) + "\n")
    said = out.with_suffix(".json")
    told = f"{out}: {', '.join(arrays)} of {images.num:,} images, and {taken:,} of them; {said} says of what"
    if this_process().world_size > 1:  # another one may be about to read what is there, or would make it again
        return f"{told}; remove {parts} once all processes have ended"
    shutil.rmtree(parts, ignore_errors=True)
    return told


def check_arguments(out: Path, extractors: Sequence[str]) -> None:
    """Refuse what can be known to be wrong before any picture is read.

    Raises:
        ConfigError: ``out`` is no npz, or an unknown extractor.
    """
    if out.suffix != ".npz":
        raise ConfigError(f"--out {out}: give the name of an npz, e.g. {out.with_suffix('.npz')}")
    unknown = next((name for name in extractors if name not in EXTRACTORS), None)
    if unknown is not None:
        raise ConfigError(f"--extractors {unknown!r}: use some of {', '.join(EXTRACTORS)}")
