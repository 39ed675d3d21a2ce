"""The scores by name: which features each one is of, and which way is better."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ig_dist.errors import ConfigError, nearest

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
LOWER_IS_BETTER: frozenset[Kind] = frozenset({"frechet", "kernel"})


def lower_is_better(name: str) -> bool:
    """Whether a smaller value of this score is a better one."""
    return METRICS[name].kind in LOWER_IS_BETTER


def order(row: Mapping[str, Any], target: str) -> float:
    """A key that sorts rows with ``scores`` from the best to the worst."""
    return float(row["scores"][target]) * (1 if lower_is_better(target) else -1)


def best_row(rows: Sequence[Mapping[str, Any]], target: str) -> Mapping[str, Any]:
    """The best of the rows with the most images: scores of fewer images are not comparable."""
    most = max(row["num"] for row in rows)
    return min((row for row in rows if row["num"] == most), key=lambda row: order(row, target))


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
