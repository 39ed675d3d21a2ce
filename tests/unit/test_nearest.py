"""The nearest reference pictures of samples: planted copies are found, whatever is cut how."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from ig_dist.errors import ConfigError
from ig_dist.evaluation.evaluate import evaluate
from ig_dist.evaluation.nearest import NEIGHBOURS, nearest_pictures, picture_of
from ig_dist.evaluation.references import Reference, open_reference
from ig_dist.features.extractors.extractor import Extractor
from ig_dist.features.features import FeatureFiles, Moments
from tests.scoring import in_memory, noise, pixel, quadrants

REAL = noise(90, seed=1)


def reference(folder: Path, *extractors: Extractor, images: NDArray[np.uint8] = REAL) -> Reference:
    return Reference("real", files=FeatureFiles(in_memory(images, folder), list(extractors)))


def test_a_planted_copy_is_found_at_distance_zero(tmp_path: Path) -> None:
    samples = noise(40, seed=2)
    samples[3], samples[20] = REAL[77], REAL[0]
    files = FeatureFiles(in_memory(samples, tmp_path / "s"), [pixel()])
    found = nearest_pictures(files, reference(tmp_path / "r", pixel()), 40, tmp_path / "new" / "out.png")
    place = {int(sample): i for i, sample in enumerate(found.samples)}
    for sample, real in ((3, 77), (20, 0)):
        assert found.neighbours[place[sample], 0] == real and found.distances[place[sample], 0] == 0
    others = [i for sample, i in place.items() if sample not in (3, 20)]
    assert found.distances[others].min() > 0.5  # other noise is as far as real noise is
    assert Image.open(tmp_path / "new" / "out.png").size[0] > 1000


def test_neighbours_and_distances_are_those_of_all_pairs(tmp_path: Path) -> None:
    samples = noise(20, seed=2)
    files = FeatureFiles(in_memory(samples, tmp_path / "s"), [pixel()])
    found = nearest_pictures(files, reference(tmp_path / "r", pixel()), 5, tmp_path / "out.png")
    ours, theirs = (images.reshape(len(images), -1) / 127.5 - 1 for images in (samples, REAL))
    real = np.sqrt(((theirs[:, None] - theirs[None]) ** 2).sum(axis=2)) + np.diag(np.full(len(REAL), np.inf))
    for i, sample in enumerate(found.samples):
        away = np.sqrt(((ours[sample] - theirs) ** 2).sum(axis=1))
        assert found.neighbours[i].tolist() == np.argsort(away)[:NEIGHBOURS].tolist()
        assert found.distances[i] == pytest.approx(np.sort(away)[:NEIGHBOURS] / np.median(real.min(axis=1)), rel=1e-6)


def test_the_surest_samples_are_taken_or_the_first_of_each_class(tmp_path: Path) -> None:
    samples, extractor = noise(40, seed=3), quadrants()
    files = FeatureFiles(in_memory(samples, tmp_path / "s"), [pixel(), extractor])
    found = nearest_pictures(files, reference(tmp_path / "r", extractor, pixel()), 4, tmp_path / "out.png")
    sure = torch.softmax(extractor(samples)["logits"].double(), dim=1).amax(dim=1)
    assert found.samples.tolist() == torch.argsort(-sure)[:4].tolist()
    labelled = in_memory(samples, tmp_path / "l", labels=[0, 0, 0, 2, 1, 2] + [0] * 34)
    files = FeatureFiles(labelled, [pixel()])
    found = nearest_pictures(files, reference(tmp_path / "r", pixel()), 6, tmp_path / "out.png")
    assert found.samples.tolist() == [0, 4, 3, 1, 5, 2]
    unknown = FeatureFiles(in_memory(samples, tmp_path / "u"), [pixel()])
    found = nearest_pictures(unknown, reference(tmp_path / "r", pixel()), 60, tmp_path / "out.png", num=10)
    assert found.samples.tolist() == list(range(10))


def test_a_reference_without_pictures_is_refused_in_one_line(tmp_path: Path) -> None:
    files = FeatureFiles(in_memory(noise(20), tmp_path / "s"), [pixel()])
    statistics = Reference("statistics.npz", {("pixel", "pool"): Moments(10, np.zeros(16), np.eye(16))})
    with pytest.raises(ConfigError, match="statistics only: give --reference"):
        nearest_pictures(files, statistics, 4, tmp_path / "out.png")
    with pytest.raises(ConfigError, match="no features of pixel"):
        nearest_pictures(files, reference(tmp_path / "q", quadrants()), 4, tmp_path / "out.png")
    with pytest.raises(ConfigError, match="more than 3 real pictures"):
        nearest_pictures(files, reference(tmp_path / "f", pixel(), images=REAL[:3]), 4, tmp_path / "out.png")
    with pytest.raises(ConfigError, match="have 64 pixel values, the samples 16"):
        nearest_pictures(files, reference(tmp_path / "o", pixel(), images=noise(9, side=8)), 4, tmp_path / "out.png")


def test_pictures_are_read_also_where_scores_need_statistics_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IG_DIST_CACHE", str(tmp_path / "cache"))
    np.savez(tmp_path / "both.npz", arr_0=REAL, mu_pixel=np.zeros(16), sigma_pixel=np.eye(16))
    np.savez(tmp_path / "statistics.npz", mu_pixel=np.zeros(16), sigma_pixel=np.eye(16))

    def opened(name: str, *, pictures: bool) -> Reference:
        return open_reference(str(tmp_path / name), ["fd_pixel"], lambda name: pixel(), pictures=pictures)

    read = opened("both.npz", pictures=True)
    assert read.files is not None and read.files.images.num == 90
    assert opened("both.npz", pictures=False).files is None
    assert read.moments(("pixel", "pool")).mean.tolist() == [0] * 16  # scores are held against what the file says
    with pytest.raises(ConfigError, match="statistics only: give --reference"):
        opened("statistics.npz", pictures=True)


def test_it_is_an_option_of_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IG_DIST_CACHE", str(tmp_path / "cache"))
    np.savez(tmp_path / "mine.npz", arr_0=noise(30, seed=5))
    np.savez(tmp_path / "real.npz", arr_0=REAL)
    done = evaluate(str(tmp_path / "mine.npz"), reference=str(tmp_path / "real.npz"), metrics=["fd_pixel"], nearest=3)
    assert done is not None and (tmp_path / "mine_nearest.png").is_file()


def test_where_the_picture_goes(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert picture_of(f"{tmp_path}/samples/abc", "abc", tmp_path) == tmp_path / "samples" / "abc_nearest.png"
    assert picture_of(str(tmp_path / "x.npz")) == tmp_path / "x_nearest.png"
    assert picture_of(f"{tmp_path}/folder/") == tmp_path / "folder_nearest.png"
    assert picture_of("s3://bucket/samples/abc", "abc", tmp_path / "gone") == Path("abc_nearest.png")
