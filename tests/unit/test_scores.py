"""Scores with their protocol, and the references that they are held against."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ig_dist.config.catalogue import METRICS, best_row, better, check_metrics, check_weights
from ig_dist.errors import ConfigError
from ig_dist.evaluation import references
from ig_dist.evaluation.metrics import (
    frechet_distance,
    frechet_distance_adm,
    inception_score,
    inception_score_torch_fidelity,
    kernel_distance,
    precision_recall,
)
from ig_dist.evaluation.references import Reference, make_reference, open_reference, statistics_keys
from ig_dist.evaluation.scores import Scores, write_result
from ig_dist.features.extractors.extractor import Extractor, get_extractor
from ig_dist.features.extractors.inception import Inception
from ig_dist.features.features import FeatureFiles, HeldFeatures, Moments, make_features, streamed_moments
from ig_dist.features.npz import open_npz
from tests.scoring import EFFICIENTNET, extract, in_memory, noise, pixel, quadrants, require_efficientnet

ADM = ["fid", "sfid", "inception_score", "precision", "recall"]
REAL, SAMPLES = noise(90, seed=1), noise(60, seed=2) // 2 + 30


def held(images: NDArray[np.uint8], *extractors: Extractor, labels: list[int] | None = None) -> HeldFeatures:
    chosen = {extractor.name.partition("-")[0]: extractor for extractor in extractors or (quadrants(),)}
    tensors = {(key, name): v for key, e in chosen.items() for name, v in extract(e, images).items()}
    if labels is not None:
        tensors |= {(key, "labels"): np.array(labels) for key in chosen}  # type: ignore[misc]
    return HeldFeatures("samples of a test", len(images), chosen, tensors)


def files_of(
    images: NDArray[np.uint8], folder: Path, *extractors: Extractor, labels: list[int] | None = None
) -> FeatureFiles:
    files = FeatureFiles(in_memory(images, folder, labels=labels), extractors or [quadrants()])
    make_features(files)
    return files


def moments(values: NDArray[Any]) -> Moments:
    return Moments(len(values), values.mean(0, dtype=np.float64), np.cov(values.astype(np.float64).T))


OURS, THEIRS = extract(quadrants(), SAMPLES), extract(quadrants(), REAL)


# --- scores


def test_each_score_is_its_function_of_its_feature_with_the_rules_of_its_protocol(tmp_path: Path) -> None:
    reference = Reference("real", files=files_of(REAL, tmp_path))
    expected: dict[str, dict[str, float]] = {}
    for protocol, half in (("adm", True), ("torch-fidelity", False)):
        distance = frechet_distance_adm if half else frechet_distance
        near = precision_recall(OURS["pool"], THEIRS["pool"], half=half)
        split = inception_score_torch_fidelity(OURS["logits"])
        expected[protocol] = {
            "fid": distance(moments(THEIRS["pool"]), moments(OURS["pool"])),
            "sfid": distance(moments(THEIRS["spatial"]), moments(OURS["spatial"])),
            "inception_score": inception_score([OURS["logits"]]) if half else split.mean,
            "precision": near.precision,
            "recall": near.recall,
        }
        result = Scores(held(SAMPLES), reference, None, protocol).score(ADM)  # type: ignore[arg-type]
        assert list(result["scores"]) == ADM and result["scores"] == pytest.approx(expected[protocol], rel=1e-9)
        assert result.get("spread") == (None if half else {"inception_score": split.std})
        told = result["protocol"]
        assert told["evaluator"] == protocol and told["frechet_rule"].endswith("N - 1")
        assert told["precision_rule"].startswith(f"k = 3, distances in {'float16' if half else 'float32'}")
        assert told["inception_score_rule"].startswith("blocks of 5,000" if half else "10 splits, shuffled")
    assert expected["adm"]["inception_score"] != pytest.approx(expected["torch-fidelity"]["inception_score"], rel=1e-3)
    assert 0 < expected["adm"]["precision"] < 1 and expected["adm"]["fid"] > 0


def test_the_protocol_names_all_that_a_score_depends_on(tmp_path: Path) -> None:
    real = files_of(REAL, tmp_path, quadrants(), pixel())
    result = Scores(held(SAMPLES, quadrants(), pixel()), Reference("real pictures", files=real)).score(
        [*ADM, "fd_pixel"]
    )
    told = result["protocol"]
    assert told["num"] == 60 and told["reference"] == "real pictures"
    assert told["extractor"] == "inception, pixel"
    assert told["extractor_sha256"] == f"{'0' * 64}, {pixel().sha256}"
    assert told["preprocessing"] == f"means of quarters, and corners; {pixel().preprocessing}"
    assert told["reference_images"] == told["reference_pictures"] == 90
    hashes = [real_moments.sha256 for real_moments in (
        streamed_moments(real.rows("inception", "pool", 90)),
        streamed_moments(real.rows("inception", "spatial", 90)),
        streamed_moments(real.rows("pixel", "pool", 90)),
    )]  # fmt: skip
    assert told["reference_sha256"].split(", ") == hashes
    assert told["reference_pictures_sha256"] == real.images_sha256(90)

    alone = Scores(held(SAMPLES), Reference("none")).score(["inception_score"])["protocol"]
    assert not {"reference_images", "reference_pictures", "reference_sha256"} & alone.keys()
    distances = Scores(held(SAMPLES), Reference("real", files=real)).score(["fid"])["protocol"]
    assert "reference_pictures" not in distances and distances["reference_images"] == 90
    file = tmp_path / "deep/folder/result.json"
    write_result(result, file)
    assert json.loads(file.read_text()) == result


def test_other_weights_than_the_published_ones_are_in_the_scores_name(tmp_path: Path) -> None:
    other = quadrants("inception-12ab34cd", "12ab34cd" + "0" * 56)
    reference = Reference("real", files=files_of(REAL, tmp_path, other, pixel()))
    result = Scores(held(SAMPLES, other, pixel()), reference).score(["fid", "precision", "fd_pixel"])
    assert list(result["scores"]) == ["fid@inception-12ab34cd", "precision@inception-12ab34cd", "fd_pixel"]
    assert result["protocol"]["extractor_sha256"].startswith("12ab34cd0000")


def test_only_the_first_images_are_scored(tmp_path: Path) -> None:
    reference = Reference("real", files=files_of(REAL, tmp_path))
    few = Scores(held(SAMPLES[:25]), reference).score(ADM)
    assert Scores(held(SAMPLES), reference, 25).score(ADM) == few and few["protocol"]["num"] == 25
    in_units = Scores(files_of(SAMPLES, tmp_path / "s"), reference, 25).score(ADM)  # sums of other pieces
    assert in_units["scores"] == pytest.approx(few["scores"], rel=1e-9)
    assert Scores(held(SAMPLES[:25]), reference, 1000).score(ADM)["protocol"]["num"] == 25


def test_what_scores_share_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, ours = noise(1100, seed=3), noise(1200, seed=4)
    files, calls = files_of(real, tmp_path), Counter[str]()
    monkeypatch.setattr(FeatureFiles, "read", counting(FeatureFiles.read, calls))
    manifold = counting(precision_recall, calls)
    monkeypatch.setattr("ig_dist.evaluation.scores.scored.precision_recall", manifold)
    monkeypatch.setattr("ig_dist.evaluation.scores.scored.kernel_distance", partial(kernel_distance, subsets=3))
    features, reads = held(ours), list[tuple[str, str]]()
    rows = features.rows

    def counted_rows(extractor: str, tensor: str, num: int) -> Iterator[NDArray[Any]]:
        reads.append((extractor, tensor))
        return rows(extractor, tensor, num)

    monkeypatch.setattr(features, "rows", counted_rows)
    scores = Scores(features, Reference("real", files=files))
    first = scores.score(["precision"])["scores"]
    second = scores.score(["recall", "kid", "precision"])
    assert second["scores"]["precision"] == first["precision"]
    assert reads == [("inception", "pool")] and calls["precision_recall"] == 1
    assert calls["read"] == 2 * files.images.num_units  # for distances between points, and KID's most images
    kid = kernel_distance(features.tensors["inception", "pool"], extract(quadrants(), real)["pool"], subsets=3)
    assert (second["scores"]["kid"], second["spread"]["kid"]) == pytest.approx(kid, rel=1e-12)


def counting(function: Callable[..., Any], calls: Counter[str]) -> Callable[..., Any]:
    def counted(*arguments: Any, **named: Any) -> Any:
        calls[function.__name__] += 1
        return function(*arguments, **named)

    return counted


def test_few_images_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = Reference("real", files=files_of(REAL, tmp_path, quadrants(), pixel()))
    files = held(SAMPLES, quadrants(), pixel())
    Scores(files, reference).score(["fid"])
    assert capsys.readouterr().err == ""
    values = Scores(files, reference, 16).score(["fd_pixel"])["scores"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 16 images for 16 pixel pool features") and "make more" in line
    assert values["fd_pixel"] > 0
    Scores(files, reference).score(["inception_score"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: inception_score of 60 images, whose blocks have 5,000")
    assert np.isfinite(Scores(files, reference, 3).score(["fid"])["scores"]["fid"])  # singular: no complex numbers
    with pytest.raises(ConfigError, match="subsets of 1000, and there are 60 samples"):
        Scores(files, Reference("real", files=files_of(noise(1000), tmp_path / "more"))).score(["kid"])
    with pytest.raises(ConfigError, match="at least two images"):
        Scores(files, reference, 1).score(["fid"])


def test_labels_that_do_not_fit(tmp_path: Path) -> None:
    labels = [i % 3 for i in range(90)]
    reference = Reference("real", files=files_of(REAL, tmp_path, pixel(), labels=labels))

    def agreement(asked: list[int] | None) -> float:
        return float(Scores(held(SAMPLES, pixel(), labels=asked), reference).score(["label_agreement"])["scores"][
            "label_agreement"
        ])  # fmt: skip

    assert 0 <= agreement([0] * 60) <= 1
    for asked, named in (([0] * 59 + [3], "class 3"), ([-1] + [1] * 59, "class -1")):
        with pytest.raises(ConfigError, match=rf"{named}, the reference 0 to 2"):
            agreement(asked)
    with pytest.raises(ConfigError, match="samples of a test does not say which classes were asked for"):
        agreement(None)
    unlabelled = Reference("real", files=files_of(REAL, tmp_path / "unlabelled", pixel()))
    with pytest.raises(ConfigError, match="label_agreement needs classes, and real has none"):
        Scores(held(SAMPLES, pixel(), labels=[0] * 60), unlabelled).score(["label_agreement"])


def test_a_classifier_of_many_pictures_has_each_ones_own_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and labels are taken by the same rule: classes that the pixels tell exactly are learnt exactly."""
    labels = [i % 7 % 2 for i in range(90)]
    images = np.full((90, 4, 4, 1), 30, np.uint8) + 180 * np.array(labels, np.uint8)[:, None, None, None]
    reference = Reference("real", files=files_of(images, tmp_path, pixel(), labels=labels))
    monkeypatch.setattr(references, "CLASSIFIED_IMAGES", 25)
    classifier, classes = reference.classifier(("pixel", "pool"))
    assert classes == 2 and classifier.shape_fit_ == (25, 16)
    assert classifier.predict(extract(pixel(), images)["pool"]).tolist() == labels


# --- references


def write_adm(file: Path, *without: str, **changes: Any) -> Path:
    arrays = {
        "mu": THEIRS["pool"].mean(0, dtype=np.float64),
        "sigma": np.cov(THEIRS["pool"].astype(np.float64).T),
        "mu_s": THEIRS["spatial"].mean(0, dtype=np.float64),
        "sigma_s": np.cov(THEIRS["spatial"].astype(np.float64).T),
        "arr_0": REAL[::3],
        **changes,
    }
    np.savez(file, **{name: values for name, values in arrays.items() if name not in without})
    return file


def opened(file: Path, metrics: list[str], extractor: Extractor | None = None, **options: Any) -> Reference:
    made = extractor or quadrants()
    return open_reference(str(file), metrics, lambda name: {"inception": made, "pixel": pixel()}[name], **options)


def test_a_file_like_adms_is_read_as_it_is(tmp_path: Path) -> None:
    """Statistics are the whole set's, precision and recall are of the images in the file."""
    reference = opened(write_adm(tmp_path / "x.npz"), ADM)
    result = Scores(held(SAMPLES), reference).score(ADM)
    near = precision_recall(OURS["pool"], THEIRS["pool"][::3])
    assert result["scores"]["precision"] == near.precision and result["scores"]["recall"] == near.recall
    for name, feature in (("fid", "pool"), ("sfid", "spatial")):
        expected = frechet_distance(moments(THEIRS[feature]), moments(OURS[feature]))
        assert result["scores"][name] == pytest.approx(expected, rel=1e-8)
    told = result["protocol"]
    assert told["reference_images"] == "not said by the file" and told["reference_pictures"] == 30
    assert statistics_keys(("inception", "spatial")) == ("mu_s", "sigma_s")
    assert statistics_keys(("dinov2", "pool")) == ("mu_dinov2", "sigma_dinov2")

    # where no score wants its images, they need not be there, nor be read
    for metrics in (["fid", "sfid"], ["inception_score", "fid"], ["inception_score"]):
        assert opened(write_adm(tmp_path / "y.npz", "arr_0"), metrics).files is None


def test_statistics_come_from_the_images_where_the_file_has_none(tmp_path: Path) -> None:
    reference = opened(write_adm(tmp_path / "x.npz", "mu_s"), ["fid", "sfid"])
    scores = Scores(held(SAMPLES), reference).score(["fid", "sfid"])["scores"]
    assert scores["fid"] == pytest.approx(frechet_distance(moments(THEIRS["pool"]), moments(OURS["pool"])), rel=1e-8)
    third = moments(THEIRS["spatial"][::3])
    assert scores["sfid"] == pytest.approx(frechet_distance(third, moments(OURS["spatial"])), rel=1e-8)


@pytest.mark.parametrize(
    ("metrics", "without", "changes", "message"),
    [
        (["fid", "sfid"], ["arr_0", "mu_s"], {}, "has no images .arr_0., and no mu_s and sigma_s, which sfid needs"),
        (["precision"], ["arr_0"], {}, "has no images .arr_0., which precision needs: it has mu, sigma, mu_s, sigma_s"),
        (["fid"], [], {"mu": np.zeros((2, 4))}, r"mu has the shape \(2, 4\) and sigma \(4, 4\)"),
        (["fid"], [], {"sigma": np.zeros(4)}, r"sigma \(4,\): they are no mean"),
        (["precision"], [], {"arr_0": REAL.astype(float)}, "arr_0 of .* is float64, pictures are uint8"),
        (["fid"], [], {"arr_0": noise(9, side=6)}, "has pictures of 6 x 6, the samples are 4 x 4: give a reference"),
        (["fid"], [], {"arr_0": REAL[:, :3]}, "has pictures of 4 x 3, the samples are 4 x 4"),
    ],
)
def test_a_file_that_lacks_what_a_score_needs(
    metrics: list[str], without: list[str], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = write_adm(tmp_path / "x.npz", *without, **changes)
    with pytest.raises(ConfigError, match=message) as error:
        opened(file, metrics, side=4)
    assert str(file) in str(error.value)


def test_a_reference_of_other_dimensions_or_pictures(tmp_path: Path) -> None:
    larger = Reference("larger", files=files_of(noise(50, side=6), tmp_path / "a", pixel()))
    with pytest.raises(ConfigError, match="larger has 36 pixel pool values an image, the samples 16: give a reference"):
        Scores(held(SAMPLES, pixel()), larger).score(["fd_pixel"])
    np.savez(tmp_path / "x.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ConfigError, match="has 2048 inception pool values an image, the samples 4"):
        Scores(held(SAMPLES), opened(tmp_path / "x.npz", ["fid"], side=4)).score(["fid"])
    np.savez(tmp_path / "pictures.npz", noise(5, side=6))
    with pytest.raises(ConfigError, match="pictures of 6 x 6, the samples are 4 x 4"):
        opened(tmp_path / "pictures.npz", ["fd_pixel"], side=4)
    with pytest.raises(ConfigError, match="has neither images .arr_0. nor statistics of inception pool features"):
        Scores(held(SAMPLES), Reference("nothing")).score(["fid"])


def test_of_many_images_as_many_as_wanted_lie_evenly(tmp_path: Path) -> None:
    reference = Reference("real", files=files_of(REAL, tmp_path))
    for most in (7, 16, 89):
        chosen = [i * 90 // most for i in range(most)]
        assert np.array_equal(reference.rows(("inception", "pool"), most), THEIRS["pool"][chosen])
    assert np.array_equal(reference.rows(("inception", "pool"), 90), THEIRS["pool"])
    assert np.array_equal(reference.rows(("inception", "pool"), 10_000), THEIRS["pool"])


# --- making one


def test_a_made_reference_has_numpys_statistics_and_images_taken_evenly(tmp_path: Path) -> None:
    many = noise(12_345, side=2)
    np.savez(tmp_path / "many.npz", arr_0=many)
    said = make_reference(str(tmp_path / "many.npz"), tmp_path / "ref.npz", extractors=["pixel"])
    assert said is not None and "12,345 images, and 10,000 of them" in said
    with np.load(tmp_path / "ref.npz") as arrays:
        assert sorted(arrays) == ["arr_0", "mu_pixel", "num", "sigma_pixel"]
        features = many.reshape(len(many), -1) / 127.5 - 1
        np.testing.assert_allclose(arrays["mu_pixel"], features.mean(0), atol=1e-7)  # of float32 features
        np.testing.assert_allclose(arrays["sigma_pixel"], np.cov(features.T), atol=1e-7)
        assert np.array_equal(arrays["arr_0"], many[np.arange(10_000) * 12_345 // 10_000]) and arrays["num"] == 12_345
    assert open_npz(str(tmp_path / "ref.npz")).member("arr_0").stored
    told = json.loads((tmp_path / "ref.json").read_text())
    assert told["num"] == 12_345 and told["extractors"] == {"pixel": pixel().sha256}
    assert told["source"] == str(tmp_path / "many.npz") and len(told["images_sha256"]) == 64
    assert sorted(file.name for file in tmp_path.iterdir()) == ["many.npz", "ref.json", "ref.npz"]

    samples = held(many[::5], pixel())
    made, raw = (
        Scores(samples, opened(tmp_path / name, ["fd_pixel"], side=2)).score(["fd_pixel"])
        for name in ("ref.npz", "many.npz")
    )
    assert made["scores"] == pytest.approx(raw["scores"], abs=1e-12)
    for key in ("reference_images", "reference_sha256"):
        assert made["protocol"][key] == raw["protocol"][key]
    assert made["protocol"]["reference_images"] == 12_345

    told["extractors"]["pixel"] = "f" * 64
    (tmp_path / "ref.json").write_text(json.dumps(told))
    with pytest.raises(ConfigError, match=r"pixel features are of weights ffffffffffffffff, those here are"):
        opened(tmp_path / "ref.npz", ["fd_pixel"])


def test_a_reference_of_real_features(tmp_path: Path) -> None:
    require_efficientnet()
    images = noise(6, side=9, channels=3)
    np.savez(tmp_path / "x.npz", images)
    make_reference(str(tmp_path / "x.npz"), tmp_path / "ref.npz", extractors=[EFFICIENTNET, "pixel"])
    features = extract(get_extractor(EFFICIENTNET), images)["pool"].astype(np.float64)
    with np.load(tmp_path / "ref.npz") as arrays:
        assert arrays[f"sigma_{EFFICIENTNET}"].shape == (1280, 1280) and arrays["sigma_pixel"].shape == (243, 243)
        np.testing.assert_allclose(arrays[f"mu_{EFFICIENTNET}"], features.mean(0), rtol=1e-12)
        np.testing.assert_allclose(arrays[f"sigma_{EFFICIENTNET}"], np.cov(features.T), atol=1e-12)


def test_what_a_reference_cannot_be_made_of(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", REAL)
    source = str(tmp_path / "x.npz")
    with pytest.raises(ConfigError, match=r"give the name of an npz, e\.g\. .*ref\.npz"):
        make_reference(source, tmp_path / "ref.bin", extractors=["pixel"])
    with pytest.raises(ConfigError, match="--extractors 'pixl': use some of pixel, inception"):
        make_reference(source, tmp_path / "ref.npz", extractors=["pixl"])
    with pytest.raises(ConfigError, match="does not exist"):
        make_reference(str(tmp_path / "nowhere"), tmp_path / "ref.npz", extractors=["pixel"])
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]


def test_a_real_inception_of_random_weights(tmp_path: Path) -> None:
    """With the network's own dimensions: keys are ADM's, scores bear the weights' hash, and its own hash is refused."""
    torch.manual_seed(0)
    file = tmp_path / "weights.pth"
    torch.save(Inception().state_dict(), file)
    with pytest.raises(ConfigError, match="its sha256 is .*, it should be 6726825d0af5f729"):
        get_extractor("inception", weights=str(file))
    inception = get_extractor("inception", weights=str(file), allow_other=True)
    ours = FeatureFiles(in_memory(noise(4, side=8, channels=3), tmp_path / "ours"), [inception])
    result = Scores(ours, Reference("none")).score(["inception_score"])
    assert list(result["scores"]) == [f"inception_score@inception-{inception.sha256[:8]}"]
    assert 1 <= result["scores"][f"inception_score@{inception.name}"] < 4
    assert [ours.read(0, "inception", name).shape for name in ("pool", "spatial", "logits")] == [  # type: ignore[union-attr]
        (4, 2048), (4, 2023), (4, 1008)
    ]  # fmt: skip
    assert [path.name for path in (tmp_path / "ours").iterdir()] == [f"unit_00000.{inception.name}.safetensors"]


# --- their names


def test_names_and_which_way_is_better() -> None:
    assert check_metrics(["fid", "kid", "fid"], "x") == ["fid", "kid"]
    with pytest.raises(ConfigError, match="--metrics: unknown score 'fdi'; did you mean 'fid'"):
        check_metrics(["fdi"], "--metrics")
    with pytest.raises(ConfigError, match="evaluate.metrics is empty: name at least one of fid, sfid"):
        check_metrics([], "evaluate.metrics")
    assert [name for name in METRICS if better(name) < 0] == [
        "fid", "sfid", "kid", "fd_dinov2", "fd_efficientnet", "fd_pixel"
    ]  # fmt: skip
    for name, metric in METRICS.items():  # a distance on other features than Inception's is never called FID
        assert (metric.extractor == "inception") == (name in {*ADM, "kid"})
    with pytest.raises(ConfigError, match="--weights: 'pixel' is no extractor with weights: use inception, dinov2"):
        check_weights({"pixel": "x"}, "--weights")


def test_the_best_row_is_one_of_the_most_images() -> None:
    rows = [{"num": n, "scores": {"fid": f, "recall": f}} for n, f in ((100, 0.1), (200, 3.0), (200, 2.0), (200, 5.0))]
    assert best_row(rows, "fid") is rows[2] and best_row(rows, "recall") is rows[3]


def test_an_extractor_of_other_weights_in_the_same_place_is_another(tmp_path: Path) -> None:
    files = files_of(SAMPLES, tmp_path)
    other = replace(quadrants(), sha256="1" * 64)
    again = FeatureFiles(files.images, [other])
    reference = Reference("real", files=files_of(REAL, tmp_path / "real", other))
    told = Scores(again, reference).score(["fid", "precision"])["protocol"]
    assert told["features_made_again"] == 4 and told["extractor_sha256"] == "1" * 64
