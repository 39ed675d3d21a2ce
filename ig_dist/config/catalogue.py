"""The scores by name: which features each one is of, and which way is better."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ig_dist.errors import ConfigError, nearest

Row = Mapping[str, Any]
Kind = Literal["frechet", "inception_score", "precision", "recall", "kernel", "agreement"]


class Metric(NamedTuple):
    """What a score is computed from. A score on other features than Inception's has them in its name."""

    kind: Kind
    extractor: str
    feature: str


METRICS: dict[str, Metric] = {
    "fid": Metric("frechet", "inception", "pool"),
    "sfid": Metric("frechet", "inception", "spatial"),
    "inception_score": Metric("inception_score", "inception", "logits"),
    "precision": Metric("precision", "inception", "pool"),
    "recall": Metric("recall", "inception", "pool"),
    "kid": Metric("kernel", "inception", "pool"),
    "fd_dinov2": Metric("frechet", "dinov2", "pool"),
    "precision_dinov2": Metric("precision", "dinov2", "pool"),
    "recall_dinov2": Metric("recall", "dinov2", "pool"),
    "fd_efficientnet": Metric("frechet", "efficientnet_lite0", "pool"),
    "precision_efficientnet": Metric("precision", "efficientnet_lite0", "pool"),
    "recall_efficientnet": Metric("recall", "efficientnet_lite0", "pool"),
    "fd_pixel": Metric("frechet", "pixel", "pool"),
    "label_agreement": Metric("agreement", "pixel", "pool"),
}


def better(name: str) -> int:
    """-1: a lower score of this name is a better one, 1: a higher one is, 0: not known.

    ``fid@inception-0123abcd`` is one by other weights than the published ones.
    """
    metric = METRICS.get(name.partition("@")[0])
    return 0 if metric is None else -1 if metric.kind in ("frechet", "kernel") else 1


def comparable(rows: Sequence[Row]) -> list[Row]:
    """The rows with the most images: their scores are not held against those of fewer."""
    most = max((row.get("num") or 0 for row in rows), default=0)
    return [row for row in rows if (row.get("num") or 0) == most]


def order(row: Row, metric: str) -> float:
    """A key that sorts rows with ``scores`` from the best to the worst."""
    return -better(metric) * float(row["scores"][metric])


def best_row(rows: Sequence[Row], metric: str) -> Row | None:
    """The best of the comparable rows; None where there is none, or it is not known which way is better."""
    return min(comparable(rows), key=lambda row: order(row, metric), default=None) if better(metric) else None


def extractors_of(metrics: Iterable[str]) -> list[str]:
    """Names of the extractors that these scores need, each once."""
    return list(dict.fromkeys(METRICS[name].extractor for name in metrics))


def check_weights(weights: dict[str, str], what: str) -> dict[str, str]:
    """The same; raises ConfigError where one is not of an extractor that has weights."""
    known = [name for name in dict.fromkeys(metric.extractor for metric in METRICS.values()) if name != "pixel"]
    for name in weights:
        if name not in known:
            raise ConfigError(f"{what}: {name!r} is no extractor with weights: use {', '.join(known)}")
    return weights


def check_metrics(metrics: Iterable[str], what: str) -> list[str]:
    """The names, each once."""
    names = list(dict.fromkeys(metrics))
    for name in names:
        if name not in METRICS:
            near = nearest(name, METRICS)[0]
            raise ConfigError(f"{what}: unknown score {name!r}; did you mean {near!r}? There are {', '.join(METRICS)}")
    if not names:
        raise ConfigError(f"{what} is empty: name at least one of {', '.join(METRICS)}")
    return names
