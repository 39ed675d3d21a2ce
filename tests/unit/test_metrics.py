"""Scores against their definitions, written down plainly in float64; and that a planted error would be seen."""

from __future__ import annotations

import inspect
import itertools
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch

from ig_dist.errors import ConfigError
from ig_dist.evaluation import metrics
from ig_dist.evaluation.metrics import (
    frechet_distance,
    frechet_distance_adm,
    inception_score,
    inception_score_torch_fidelity,
    kernel_distance,
    label_agreement,
    precision_recall,
    train_classifier,
)
from ig_dist.features.features import Moments, streamed_moments

Array = np.ndarray[Any, Any]


def features(number: int, seed: int, dimensions: int = 24, shift: float = 0.0) -> Array:
    """Like an extractor's: correlated, not negative, float32."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(8, dimensions)) * 0.2
    own = random.normal(size=(number, dimensions)) * 0.2
    return np.abs(random.normal(size=(number, 8)) @ mixing + own + 0.1 + shift).astype(np.float32)


def moments(values: Array, batch: int = 64) -> Moments:
    return streamed_moments(values[i : i + batch] for i in range(0, len(values), batch))


# --- the definitions; each planted error is an argument that is never given in earnest


def plain_frechet(x: Array, y: Array, *, ddof: int = 1, root_of_sum: bool = False, mean_term: bool = True) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    c1, c2 = ((z - z.mean(0)).T @ (z - z.mean(0)) / (len(z) - ddof) for z in (x, y))
    root = scipy.linalg.sqrtm((c1 + c2) / 2 if root_of_sum else c1 @ c2).real
    distance = ((x.mean(0) - y.mean(0)) ** 2).sum() if mean_term else 0.0
    return float(distance + np.trace(c1) + np.trace(c2) - 2 * np.trace(root))


def plain_inception_score(
    logits: Array, *, block: int = 40, last: bool = True, order: Array | None = None, mean_of_logs: bool = False
) -> float:
    logits = logits.astype(np.float64)[slice(None) if order is None else order]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = []
    for i in range(0, len(p) if last else len(p) // block * block, block):
        part = p[i : i + block]
        kl = [sum(p_i[c] * (np.log(p_i[c]) - np.log(part.mean(0)[c])) for c in range(p.shape[1])) for p_i in part]
        scores.append(np.mean(kl))
    return float(np.exp(np.mean(scores)) if mean_of_logs else np.mean(np.exp(scores)))


def plain_precision_recall(
    samples: Array,
    reference: Array,
    *,
    k: int = 3,
    self_counted: bool = False,
    swapped: bool = False,
    others_radius: bool = False,
    rooted_radius: bool = False,
    open_balls: bool = False,
) -> tuple[float, float]:
    def squared(a: Array, b: Array) -> float:
        return float(((a.astype(np.float64) - b.astype(np.float64)) ** 2).sum())

    def radius(points: Array, i: int, neighbours: Array) -> float:
        apart = neighbours is not points or self_counted
        others = sorted(squared(points[i], neighbours[j]) for j in range(len(neighbours)) if apart or j != i)
        return others[k - 1] ** 0.5 if rooted_radius else others[k - 1]

    def share(points: Array, balls: Array) -> float:
        radii = [radius(balls, j, points if others_radius else balls) for j in range(len(balls))]
        compare = np.less if open_balls else np.less_equal
        return float(
            np.mean([any(compare(squared(p, b), r) for b, r in zip(balls, radii, strict=True)) for p in points])
        )

    both = share(samples, reference), share(reference, samples)
    return both[::-1] if swapped else both


def plain_kernel_distance(
    samples: Array,
    reference: Array,
    *,
    biased: bool = False,
    power: int = 3,
    constant: float = 1.0,
    scaled: bool = True,
    reference_first: bool = False,
    replace: bool = False,
    ddof: int = 0,
) -> tuple[float, float]:
    random, size, found = np.random.RandomState(2020), 30, []
    for _ in range(7):
        drawn = {}
        for name in ("reference", "samples") if reference_first else ("samples", "reference"):
            points = samples if name == "samples" else reference
            drawn[name] = points[random.choice(len(points), size, replace=replace)].astype(np.float64)
        x, y = drawn["samples"], drawn["reference"]

        def kernel(a: Array, b: Array) -> float:
            return float((a @ b / (len(a) if scaled else 1) + constant) ** power)

        pairs = [(i, j) for i in range(size) for j in range(size) if biased or i != j]
        own = sum(kernel(z[i], z[j]) for z in (x, y) for i, j in pairs) / len(pairs)
        crossed = sum(kernel(a, b) for a in x for b in y) / size**2
        found.append(own - 2 * crossed)
    return float(np.mean(found)), float(np.std(found, ddof=ddof))


X, Y = features(150, 1), features(90, 2, shift=0.05)
LOGITS = np.random.default_rng(3).normal(size=(150, 12)).astype(np.float32) * 2
LOGITS[np.arange(150), np.arange(150) % 12] += 4
GRID = np.arange(5, dtype=np.float32)[:, None]
BY_CLASS = np.argsort(LOGITS.argmax(1), kind="stable")


def split_score(logits: Array, *, splits: int = 10, shuffled: bool = True, seed: int = 2020, ddof: int = 0) -> Array:
    order = np.random.RandomState(seed).permutation(len(logits)) if shuffled else np.arange(len(logits))
    parts = np.array_split(logits[order], splits)
    scores = [plain_inception_score(part, block=len(part)) for part in parts]
    return np.array([np.mean(scores), np.std(scores, ddof=ddof)])


CASES: dict[str, tuple[Callable[[], Any], Callable[..., Any], list[dict[str, Any]]]] = {
    "fid": (
        lambda: frechet_distance(moments(X), moments(Y)),
        lambda **planted: plain_frechet(X, Y, **planted),
        [{"ddof": 0}, {"root_of_sum": True}, {"mean_term": False}],
    ),
    "fid by ADM's steps": (
        lambda: frechet_distance_adm(moments(X), moments(Y)),
        lambda **planted: plain_frechet(X, Y, **planted),
        [{"ddof": 0}, {"root_of_sum": True}, {"mean_term": False}],
    ),
    "inception score": (
        lambda: inception_score(np.array_split(LOGITS, 4), block=40),
        lambda **planted: plain_inception_score(LOGITS, **planted),
        [{"block": 41}, {"last": False}, {"order": BY_CLASS}, {"mean_of_logs": True}, {"block": 150}],
    ),
    "inception score of torch-fidelity": (
        lambda: inception_score_torch_fidelity(LOGITS),
        lambda **planted: split_score(LOGITS, **planted),
        [{"splits": 9}, {"shuffled": False}, {"seed": 2021}, {"ddof": 1}],
    ),
    "precision and recall": (
        lambda: precision_recall(X, Y, half=False),
        lambda **planted: plain_precision_recall(X, Y, **planted),
        [
            {"k": 2},
            {"k": 4},
            {"self_counted": True},
            {"swapped": True},
            {"others_radius": True},
            {"rooted_radius": True},
        ],
    ),
    "precision and recall on the rim": (
        lambda: precision_recall(GRID - 3, GRID),
        lambda **planted: plain_precision_recall(GRID - 3, GRID, **planted),
        [{"open_balls": True}, {"k": 2}],
    ),
    "kid": (
        lambda: kernel_distance(X, Y, subsets=7, subset_size=30),
        lambda **planted: plain_kernel_distance(X, Y, **planted),
        [
            {"biased": True},
            {"power": 2},
            {"constant": 0.0},
            {"scaled": False},
            {"reference_first": True},
            {"replace": True},
            {"ddof": 1},
        ],
    ),
}
PLANTED = [(name, error) for name, (_, _, errors) in CASES.items() for error in errors]


@pytest.mark.parametrize("score", CASES)
def test_a_score_is_its_definition(score: str) -> None:
    ours, definition, _ = CASES[score]
    np.testing.assert_allclose(ours(), definition(), rtol=1e-9)


@pytest.mark.parametrize(("score", "error"), PLANTED, ids=[f"{s}: {next(iter(e))}" for s, e in PLANTED])
def test_a_planted_error_is_seen(score: str, error: dict[str, Any]) -> None:
    ours, definition, _ = CASES[score]
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(ours(), definition(**error), rtol=1e-4)


def test_sfid_depends_on_the_order_of_the_numbers() -> None:
    """Mean and covariance in a reference file are those of one order (H, W, C); another one is another score."""
    x, y = (features(300, seed, dimensions=3 * 3 * 7) for seed in (4, 5))
    x = x + np.linspace(0, 0.5, x.shape[1], dtype=np.float32)
    y = y + np.linspace(0, 0.5, y.shape[1], dtype=np.float32)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(plain_frechet(x, y), rel=1e-9)
    channels_first = x.reshape(-1, 3, 3, 7).transpose(0, 3, 1, 2).reshape(len(x), -1)
    assert frechet_distance(moments(channels_first), moments(y)) > 2 * plain_frechet(x, y)


# --- moments


def test_moments_are_numpys_for_any_batches_and_the_same_bits_for_the_same() -> None:
    values = features(101, 6) + 1000  # a large mean is no harm
    hashes = set()
    for sizes in ([101], [1, 99, 1], [50, 0, 51]):
        got = streamed_moments(np.split(values, np.cumsum(sizes)[:-1]))
        assert got.count == 101 and got.mean.dtype == got.covariance.dtype == np.float64
        np.testing.assert_allclose(got.mean, values.astype(np.float64).mean(0), rtol=1e-13)
        np.testing.assert_allclose(got.covariance, np.cov(values.T.astype(np.float64)), atol=1e-9)
        assert np.array_equal(got.covariance, got.covariance.T)
        assert got.sha256 == streamed_moments(np.split(values, np.cumsum(sizes)[:-1])).sha256
        hashes.add(got.sha256)
    assert len(hashes) == 3  # rounding
    for few in ([], [values[:0]], [values[:1]]):
        with pytest.raises(ConfigError, match="at least two"):
            streamed_moments(few)


def test_moments_take_the_memory_of_two_covariances() -> None:
    dimensions, batch = 512, np.ones((64, 512), np.float32)
    tracemalloc.start()
    try:
        streamed_moments(itertools.repeat(batch, 20))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.2 * dimensions**2 * 8 + 3 * batch.size * 8


# --- Frechet distances


def test_distance_of_commuting_gaussians_is_the_closed_form() -> None:
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(6, 6)))[0]
    a, b = random.uniform(0, 2, 6), random.uniform(0, 2, 6)
    a[0] = b[0] = a[1] = 0  # singular, as with pixels that are always black
    m1, m2 = random.normal(size=(2, 6))
    expected = np.square(m1 - m2).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    first, second = Moments(9, m1, basis * a @ basis.T), Moments(9, m2, basis * b @ basis.T)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-12)
    nothing = Moments(9, m1, np.zeros((6, 6)))
    assert frechet_distance(nothing, second) == pytest.approx(np.square(m1 - m2).sum() + b.sum(), rel=1e-12)
    assert frechet_distance(nothing, nothing) == 0


def test_a_distance_is_right_where_covariances_are_of_low_rank() -> None:
    x, y = features(60, 7, dimensions=256), features(50, 8, dimensions=256)
    first, second = moments(x), moments(y)
    assert abs(frechet_distance(first, first)) < 1e-11
    # the covariances' factors are at hand: the centred features themselves
    a, b = ((z.astype(np.float64) - z.astype(np.float64).mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    means = np.square(first.mean - second.mean).sum()
    expected = means + np.square(a).sum() + np.square(b).sum() - 2 * np.linalg.norm(a @ b.T, "nuc")
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-12)


def test_adms_steps_agree_to_rounding_where_covariances_are_of_full_rank() -> None:
    first, second = moments(features(2000, 9, dimensions=128)), moments(features(1500, 10, dimensions=128, shift=0.02))
    assert frechet_distance_adm(first, second) == pytest.approx(frechet_distance(first, second), rel=1e-10)


def test_adms_steps_add_to_the_diagonals_or_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = moments(X), moments(Y)
    seen, real = [], scipy.linalg.sqrtm

    def fails_once(matrix: Array) -> Array:
        seen.append(matrix)
        return np.full_like(matrix, np.nan) if len(seen) == 1 else real(matrix)

    monkeypatch.setattr("scipy.linalg.sqrtm", fails_once)
    assert frechet_distance_adm(first, second) == pytest.approx(frechet_distance(first, second), abs=1e-3)
    offset = 1e-6 * np.eye(24)
    np.testing.assert_array_equal(seen[0], first.covariance @ second.covariance)
    np.testing.assert_array_equal(seen[1], (first.covariance + offset) @ (second.covariance + offset))
    monkeypatch.setattr("scipy.linalg.sqrtm", lambda matrix: matrix + 1j)
    with pytest.raises(ConfigError, match="complex numbers with 150 and 90 images"):
        frechet_distance_adm(first, second)


def test_a_distance_has_a_floor_rises_with_noise_and_is_biased_upwards_for_few() -> None:
    train, test = features(4000, 11), features(4000, 12)
    reference = moments(train)
    floor = frechet_distance(reference, moments(test))
    noise = np.random.default_rng(13).normal(size=test.shape)
    noisy = [frechet_distance(reference, moments(test + scale * noise)) for scale in (0.02, 0.05, 0.1, 0.2)]
    assert 0 < floor < noisy[0] < noisy[1] < noisy[2] < noisy[3]
    fewer = [frechet_distance(reference, moments(test[:number])) for number in (4000, 1000, 250, 60)]
    assert fewer[0] < fewer[1] < fewer[2] < fewer[3]


# --- inception score


def test_an_inception_score_does_not_depend_on_batches_but_on_order() -> None:
    whole = inception_score([LOGITS], block=50)
    for sizes in ([1] * 150, [70, 80], [0, 50, 50, 50], [149, 1]):
        parts = np.split(LOGITS, np.cumsum(sizes)[:-1])
        assert inception_score(iter(parts), block=50) == pytest.approx(whole, rel=1e-13)
    assert inception_score([LOGITS[BY_CLASS]], block=50) < 0.8 * whole
    assert inspect.signature(inception_score).parameters["block"].default == 5000


def test_an_inception_score_has_its_bounds_and_no_nan() -> None:
    classes = np.eye(10, dtype=np.float32)[np.arange(200) % 10]
    assert inception_score([classes * 1e4]) == pytest.approx(10)  # sure, and even: the number of classes
    assert inception_score([classes * 0]) == pytest.approx(1)
    assert inception_score([classes[:1] * 1e4] * 7) == pytest.approx(1)
    assert inception_score([classes + 1e6]) == pytest.approx(inception_score([classes]), rel=1e-6)
    for nothing in ([], [classes[:0]]):
        with pytest.raises(ConfigError, match="there are none"):
            inception_score(nothing)
    with pytest.raises(ConfigError, match="at least 10 images, there are 9"):
        inception_score_torch_fidelity(classes[:9])


# --- precision and recall


def adm_distances(u: Array, v: Array) -> Array:
    """ADM's block of distances, one rounding after another; sums are of float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        a, b = u.astype(np.float16), v.astype(np.float16)
        norms = [np.square(z).astype(np.float32).sum(axis=1).astype(np.float16) for z in (a, b)]
        products = (a.astype(np.float32) @ b.astype(np.float32).T).astype(np.float16)
        rounded = np.maximum(norms[0][:, None] - np.float16(2) * products + norms[1][None], np.float16(0))
    assert rounded.dtype == np.float16
    if np.isfinite(rounded).all():
        return rounded.astype(np.float32)
    norms = [np.square(z).sum(axis=1) for z in (u, v)]
    return np.maximum(norms[0][:, None] - 2 * u @ v.T + norms[1][None], 0)


def adm_precision_recall(samples: Array, reference: Array, block: int) -> tuple[float, float]:
    def blocks(a: Array, b: Array) -> Array:
        rows = [np.split(a, range(block, len(a), block)), np.split(b, range(block, len(b), block))]
        return np.block([[adm_distances(u, v) for v in rows[1]] for u in rows[0]])

    radii = [np.partition(blocks(z, z), range(4), axis=1)[:, 3] for z in (reference, samples)]
    crossed = blocks(reference, samples)
    precise, recalled = (crossed <= radii[0][:, None]).any(axis=0), (crossed <= radii[1]).any(axis=1)
    return float(precise.mean()), float(recalled.mean())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(metrics, "ADM_BLOCK", 64)
    monkeypatch.setattr(metrics, "_ROWS_AT_ONCE", 10)
    return 64


@pytest.mark.parametrize("large", [[], [3], [3, 70, 71, 141]], ids=["none", "one block row", "more"])
def test_the_half_rule_is_adms_block_by_block(small_blocks: int, large: list[int]) -> None:
    samples, reference = features(150, 14, dimensions=200), features(130, 15, dimensions=200)
    samples[large] *= 120  # its norm is beyond float16: whole blocks are made in float32 then
    if large:
        assert np.square(samples[large]).sum(axis=1).min() > 65504
    ours = precision_recall(samples, reference)
    assert ours == adm_precision_recall(samples, reference, small_blocks)


def test_a_block_whose_norms_fit_float16_and_whose_distances_do_not_is_made_in_float32(small_blocks: int) -> None:
    samples, reference = features(140, 16, dimensions=200), features(70, 17, dimensions=200)
    for points, sign in ((samples, 1), (reference, -1)):  # far apart: the distance is four norms
        points *= 0.9 * (30_000 / np.square(points).sum(axis=1).max()) ** 0.5
        points *= sign
    assert np.isfinite(np.square(samples.astype(np.float16)).astype(np.float32).sum(axis=1).astype(np.float16)).all()
    u, v = (metrics._points(points[:64], True, "cpu") for points in (reference, samples))
    assert not metrics._is_finite(u, v) and metrics._is_finite(u, u)
    assert precision_recall(samples, reference) == adm_precision_recall(samples, reference, small_blocks) == (0, 0)


def test_blocks_do_not_matter_without_the_half_rule(small_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, reference = features(150, 18), features(130, 19, shift=0.05)
    blocked = precision_recall(samples, reference, half=False)
    monkeypatch.setattr(metrics, "ADM_BLOCK", 10_000)
    assert precision_recall(samples, reference, half=False) == blocked


def test_the_half_rule_moves_the_third_digit() -> None:
    # norms of some hundreds, as Inception's have, where float16 has steps of a quarter
    samples, reference = (features(1500, seed, dimensions=2048) * 0.8 for seed in (20, 21))
    assert 200 < np.square(samples).sum(axis=1).mean() < 700
    half, single = precision_recall(samples, reference), precision_recall(samples, reference, half=False)
    differences = np.abs(np.subtract(half, single))
    assert 0 < differences.max() < 0.03


def test_precision_and_recall_know_which_is_which() -> None:
    reference = features(400, 22)
    narrow = np.repeat(reference[:40], 10, axis=0) + np.float32(1e-4) * features(400, 23)  # few modes, all real
    precision, recall = precision_recall(narrow, reference)
    assert precision > 0.99 and recall < 0.3
    assert precision_recall(reference, narrow) == (recall, precision)
    assert precision_recall(reference, reference) == (1, 1)
    assert precision_recall(reference + 100, reference) == (0, 0)
    with pytest.raises(ConfigError, match="more than 3 samples, there are 3"):
        precision_recall(reference[:3], reference)
    with pytest.raises(ConfigError, match="more than 3 reference images, there are 2"):
        precision_recall(reference, reference[:2])


def test_precision_and_recall_leave_the_process_precision_alone() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        precision_recall(X, Y)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


# --- kernel distance


def test_kid_has_torch_fidelitys_defaults_and_says_what_it_lacks() -> None:
    defaults = {name: p.default for name, p in inspect.signature(kernel_distance).parameters.items()}
    assert (defaults["subsets"], defaults["subset_size"], defaults["seed"]) == (100, 1000, 2020)
    with pytest.raises(ConfigError, match="subsets of 1000, and there are 150 samples"):
        kernel_distance(X, features(1000, 24))
    with pytest.raises(ConfigError, match="there are 999 reference images"):
        kernel_distance(features(1000, 24), features(999, 24))


def test_kid_is_unbiased() -> None:
    same = kernel_distance(features(2000, 25), features(2000, 26), subset_size=200)
    other = kernel_distance(features(2000, 25), features(2000, 26, shift=0.1), subset_size=200)
    assert abs(same.mean) < 0.3 * same.std + 1e-4 and other.mean > 20 * abs(same.mean)


# --- label agreement


def test_label_agreement_is_the_share_that_is_seen_as_asked_for() -> None:
    random = np.random.default_rng(27)
    labels = np.arange(600) % 3
    pictures = (random.normal(size=(600, 16)) * 0.1 + labels[:, None]).astype(np.float32)
    classifier = train_classifier(pictures[:300], labels[:300])
    assert label_agreement(pictures[300:], labels[300:], classifier) == 1
    wrong = labels.copy()
    wrong[300:330] = (wrong[300:330] + 1) % 3
    assert label_agreement(pictures[300:], wrong[300:], classifier) == pytest.approx(0.9)
    with pytest.raises(ConfigError, match="at least two classes"):
        train_classifier(pictures, np.zeros(600, int))


def test_a_classifier_of_many_pictures_takes_some_of_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CLASSIFIER_ROWS", 100)
    taken: list[Array] = []

    class Fake:
        def __init__(self, **options: Any) -> None:
            assert options == {"C": 10, "gamma": "scale"}

        def fit(self, rows: Array, labels: Array) -> None:
            assert rows.dtype == np.float64 and np.array_equal(rows[:, 0] % 10, labels)
            taken.append(rows[:, 0])

    monkeypatch.setattr("sklearn.svm.SVC", Fake)
    numbers = np.arange(600, dtype=np.float32)[:, None]
    for _ in range(2):
        train_classifier(numbers, np.arange(600) % 10)  # every sixth would be of five classes only
    assert np.array_equal(taken[0], taken[1]) and len(set(taken[0])) == 100
    assert np.bincount(taken[0].astype(int) % 10).tolist() == [10] * 10
    train_classifier(numbers[:99], np.arange(99) % 10)
    assert np.array_equal(taken[2], np.arange(99))
    assert metrics.CLASSIFIER.startswith("scikit-learn SVC(C=10, gamma='scale')") and "10,000" in metrics.CLASSIFIER
