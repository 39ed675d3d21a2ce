"""The scores that people publish, as functions of features; which features a score wants is for who calls them.

Two evaluators are followed to the digit: OpenAI's for ADM (guided-diffusion, evaluations/evaluator.py) and
torch-fidelity. Features come as float32 arrays (N, D) and are float64 from there on, but for distances between points.
"""

import contextlib
import itertools
import sys
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ig_dist.arithmetic import switches
from ig_dist.errors import ConfigError
from ig_dist.features.features import Moments

if TYPE_CHECKING:
    from sklearn.svm import SVC

Features = NDArray[np.floating[Any]]  # (N, D)

SEED = 2020  # torch-fidelity's, of all that it draws

ADM_BLOCK = 10_000  # rows and columns of the distances that ADM has in one piece
_ROWS_AT_ONCE = 400  # of them in memory here, against a whole block

CLASSIFIER_ROWS = 10_000
CLASSIFIER = (
    "scikit-learn SVC(C=10, gamma='scale') on pixels / 127.5 - 1, trained on the reference"
    f" (above {CLASSIFIER_ROWS:,} pictures on as many, taken evenly from every class)"
)


class MeanStd(NamedTuple):
    """A score that is a mean over subsets, and the standard deviation over them."""

    mean: float
    std: float


class PrecisionRecall(NamedTuple):
    """Share of samples that look real, and share of real pictures that could be samples."""

    precision: float
    recall: float


def frechet_distance(first: Moments, second: Moments) -> float:
    """Squared Frechet distance of two Gaussians, |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^1/2.

    Dowson and Landau 1982; on Inception's features Heusel et al. 2017 (FID), on its spatial ones Nash et al. 2021
    (sFID). The last trace is the sum of the singular values of R1' R2 with C = R R': no root is taken of what rounding
    left of an eigenvalue that is 0, so singular covariances (N <= D, a pixel that is always black) do no harm.
    """
    cross = np.linalg.svd(_root(first.covariance).T @ _root(second.covariance), compute_uv=False)
    mean_term = np.square(first.mean - second.mean).sum()
    return float(mean_term + np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross.sum())


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """R (D, rank) with C = R R', the rank as ``numpy.linalg.matrix_rank`` has it."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    root: NDArray[np.float64] = vectors[:, kept] * np.sqrt(values[kept])
    return root


def frechet_distance_adm(first: Moments, second: Moments) -> float:
    """The same by ADM's steps: a root of C1 C2 by Schur's method, 1e-6 on both diagonals where that fails.

    What differs still is that ADM has its own samples' mean in float32.
    """
    import scipy.linalg  # type: ignore[import-untyped]

    def root(matrix: NDArray[np.float64]) -> NDArray[Any]:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):  # it says there what is handled here
            warnings.simplefilter("ignore")
            result: NDArray[Any] = scipy.linalg.sqrtm(matrix)
        return result

    cross = root(first.covariance @ second.covariance)
    if not np.isfinite(cross).all():
        offset = 1e-6 * np.eye(len(first.mean))
        cross = root((first.covariance + offset) @ (second.covariance + offset))
    if not np.allclose(np.diagonal(cross).imag, 0, atol=1e-3):
        raise ConfigError(
            f"ADM's way to a Frechet distance ends in complex numbers with {first.count} and {second.count} images in"
            f" {len(first.mean)} dimensions: use more images (sample.num)"
        )
    difference = first.mean - second.mean
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return float(difference @ difference + traces - 2 * np.trace(cross.real))


def inception_score(logits: Iterable[Features], block: int = 5000) -> float:
    """Inception score (Salimans et al. 2016) of logits (n, classes), batch by batch, as ADM has it.

    Over blocks of consecutive images, the last one as short as it comes: exp of the mean divergence of an image's
    class probabilities from the block's mean ones; then the mean over blocks. Images that are sorted by class ruin it.
    ADM has the probabilities and all sums in float32.
    """
    blocks = list[tuple[int, float, NDArray[np.float64]]]()  # images, sum of p log p, sum of p
    for batch in logits:
        while len(batch):
            full = not blocks or blocks[-1][0] == block
            count, entropy, total = (0, 0.0, np.zeros(())) if full else blocks.pop()
            rows, batch = batch[: block - count], batch[block - count :]
            negative_entropies, probabilities = _entropies(rows)
            blocks.append((count + len(rows), entropy + negative_entropies, total + probabilities))
    if not blocks:
        raise ConfigError("an inception score needs images, there are none")
    scores = []
    for count, entropy, total in blocks:  # sum p (log p - log q), q the mean of p: q's part depends on the mean alone
        mean = total[total > 0] / count
        scores.append(np.exp(entropy / count - mean @ np.log(mean)))
    return float(np.mean(scores))


def inception_score_torch_fidelity(logits: Features, splits: int = 10, seed: int = SEED) -> MeanStd:
    """Inception score of logits (N, classes), shuffled and cut into ``splits``, as torch-fidelity has it."""
    number = len(logits)
    if number < splits:
        raise ConfigError(f"torch-fidelity's inception score needs at least {splits} images, there are {number}")
    order = np.random.RandomState(seed).permutation(number)
    cuts = [i * number // splits for i in range(splits + 1)]
    scores = [inception_score([logits[order[a:b]]], block=b - a) for a, b in itertools.pairwise(cuts)]
    return MeanStd(float(np.mean(scores)), float(np.std(scores)))


def _entropies(logits: Features) -> tuple[float, NDArray[np.float64]]:
    """Of class probabilities p (n, classes): sum of p log p, and sum over images of p."""
    scaled = logits.astype(np.float64)
    scaled -= scaled.max(axis=1, keepdims=True)
    probabilities = np.exp(scaled)
    norms = probabilities.sum(axis=1, keepdims=True)
    probabilities /= norms
    scaled -= np.log(norms)  # log p, also where p is 0
    return float(np.vdot(probabilities, scaled)), probabilities.sum(axis=0)


def precision_recall(
    samples: Features,
    reference: Features,
    k: int = 3,
    *,
    half: bool = True,
    device: torch.device | str = "cpu",
) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019), as ADM has them, of features (N, D) and (M, D).

    A point's ball reaches to its k-th other neighbour in its own set: the (k + 1)-th smallest distance, itself
    counted. Precision is the share of samples inside any ball of the reference, recall the share of reference points
    inside any ball of the samples; on the rim is inside. All distances are squared, and made on ``device``, 400 x
    10,000 at a time.

    With ``half``, ADM's rule, every step of a block of 10,000 x 10,000 distances is rounded to float16 (features,
    norms, products and sums; sums are made in float32 here), unless one of them is not finite: then the block is made
    in float32. A ball's radius and a distance that it is held against may so come from blocks of both kinds. The third
    digit differs from float32 throughout.

    Raises:
        ConfigError: one of them has k points or fewer.
    """
    for what, features in (("samples", samples), ("reference images", reference)):
        if len(features) <= k:
            raise ConfigError(f"precision and recall need more than {k} {what}, there are {len(features)}")
    pairs = partial(_distances, half=half, device=device)

    def radii(features: Features) -> Tensor:
        nearest = torch.full((len(features), k + 1), torch.inf, device=device)
        for rows, _, distances in pairs(features, features):
            near = torch.cat([nearest[rows], distances.float()], dim=1)
            nearest[rows] = near.topk(k + 1, dim=1, largest=False).values
        return nearest[:, k].clamp(min=0)  # below 0 is rounding

    reference_radii, sample_radii = radii(reference), radii(samples)
    precise = torch.zeros(len(samples), dtype=torch.bool, device=device)
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=device)
    for rows, columns, distances in pairs(reference, samples):
        precise[columns] |= (distances <= reference_radii[rows, None]).any(dim=0)
        recalled[rows] |= (distances <= sample_radii[columns]).any(dim=1)
    return PrecisionRecall(float(precise.double().mean()), float(recalled.double().mean()))


class _Points(NamedTuple):
    values: Tensor  # (N, D) float32
    norms: Tensor  # (N,) squared; of values that were rounded to float16, float16


def _distances(
    first: Features, second: Features, half: bool, device: torch.device | str
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared distances of all pairs piece by piece, with their rows and columns; rounding may take one below 0."""
    for rows in _slices(len(first), ADM_BLOCK):
        for columns in _slices(len(second), ADM_BLOCK):
            u, v = _points(first[rows], half, device), _points(second[columns], half, device)
            if half and not _is_finite(u, v):
                u, v = _points(first[rows], False, device), _points(second[columns], False, device)
            for piece in _slices(len(u.norms), _ROWS_AT_ONCE):
                yield slice(rows.start + piece.start, rows.start + piece.stop), columns, _piece(u, v, piece)


def _points(features: Features, half: bool, device: torch.device | str) -> _Points:
    values = torch.from_numpy(np.array(features, dtype=np.float32)).to(device)
    if not half:
        return _Points(values, values.square().sum(dim=1))
    values = values.half()
    return _Points(values.float(), values.square().sum(dim=1, dtype=torch.float32).half())


def _piece(u: _Points, v: _Points, rows: slice) -> Tensor:
    """Squared distances (R, N) of some rows of ``u`` from all of ``v``, in the type of their norms."""
    with switches("fp32"):
        products = u.values[rows] @ v.values.T
    return products.to(u.norms.dtype).mul_(-2).add_(u.norms[rows, None]).add_(v.norms)


def _is_finite(u: _Points, v: _Points) -> bool:
    """Whether no distance of the block leaves float16."""
    largest = (float(u.norms.max()) ** 0.5 + float(v.norms.max()) ** 0.5) ** 2  # no distance, nor step to one, is above
    if largest < 0.99 * torch.finfo(torch.float16).max:
        return True
    return all(bool(_piece(u, v, piece).isfinite().all()) for piece in _slices(len(u.norms), _ROWS_AT_ONCE))


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def kernel_distance(
    samples: Features, reference: Features, subsets: int = 100, subset_size: int = 1000, seed: int = SEED
) -> MeanStd:
    """Kernel distance (KID, Binkowski et al. 2018) as torch-fidelity has it, mean and deviation over subsets.

    Of each subset, drawn without putting back, the unbiased squared MMD by the kernel (x . y / D + 1)^3. It may be
    slightly below 0. torch-fidelity computes in the features' float32.
    """
    for what, features in (("samples", samples), ("reference images", reference)):
        if len(features) < subset_size:
            raise ConfigError(
                f"KID compares subsets of {subset_size}, and there are {len(features)} {what}: use a larger sample.num"
                " or leave kid out of evaluate.metrics"
            )
    random, distances = np.random.RandomState(seed), np.empty(subsets)
    for i in range(subsets):
        x, y = (
            features[random.choice(len(features), subset_size, replace=False)].astype(np.float64)
            for features in (samples, reference)
        )
        distances[i] = _squared_mmd(x, y)
    return MeanStd(float(distances.mean()), float(distances.std()))


def _squared_mmd(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Gretton et al. 2012, unbiased: a point is not compared with itself."""
    number, dimensions = x.shape

    def kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        base: NDArray[np.float64] = a @ b.T / dimensions + 1
        return base * base * base

    own = sum(k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y)))
    return float(own / (number * (number - 1)) - 2 * kernel(x, y).mean())


def train_classifier(features: Features, labels: NDArray[np.integer[Any]]) -> "SVC":
    """A support vector classifier of real pictures' pixel features (N, D) with labels (N,): see ``CLASSIFIER``."""
    from sklearn.svm import SVC

    if len(np.unique(labels)) < 2:
        raise ConfigError(
            "label_agreement needs at least two classes in the reference: use evaluate.metrics=[fd_pixel]"
        )
    by_class = np.argsort(labels, kind="stable")  # every n-th of labels that take turns would miss classes
    taken = min(len(labels), CLASSIFIER_ROWS)
    rows = np.sort(by_class[np.arange(taken) * len(labels) // taken])
    return SVC(C=10, gamma="scale").fit(features[rows].astype(np.float64), labels[rows])


def label_agreement(features: Features, labels: NDArray[np.integer[Any]], classifier: "SVC") -> float:
    """Share of pictures, pixel features (N, D), that the classifier puts into the class (N,) that was asked for."""
    agree = [
        classifier.predict(features[rows].astype(np.float64)) == labels[rows] for rows in _slices(len(labels), 4096)
    ]
    return float(np.concatenate(agree).mean())
