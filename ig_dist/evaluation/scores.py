"""Scores of a set of images against a reference, each with its protocol: features in, numbers out."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ig_dist.config.catalogue import METRICS, extractors_of
from ig_dist.errors import ConfigError
from ig_dist.evaluation import metrics as scored
from ig_dist.evaluation.references import KERNEL_IMAGES, MANIFOLD_IMAGES, Feature, Reference
from ig_dist.export import ModelInfo
from ig_dist.features.features import Features, streamed_moments
from ig_dist.plans.plan import Plan
from ig_dist.plans.samples import Samples
from ig_dist.run_dir import replace_text
from ig_dist.terminal import warn

Protocol = Literal["adm", "torch-fidelity"]
INCEPTION_SCORE_IMAGES = 5000
HOW = ("precision", "state", "decode_precision", "compile", "batch_size", "unit_size")  # of a plan
OF_WEIGHTS = ("ema", "step", "images_seen", "checkpoint_sha256", "weights_sha256")


class Scores:
    """Scores of the first ``num`` images of a set (None: of all); what two of them share is computed once.

    ``protocol`` says whose rules hold where evaluators differ, ``device`` where distances between points are made.
    """

    def __init__(
        self,
        features: Features,
        reference: Reference,
        num: int | None = None,
        protocol: Protocol = "adm",
        device: torch.device | None = None,
    ) -> None:
        self.features, self._reference, self._protocol = features, reference, protocol
        self._num = min(num or features.num, features.num)
        self._device = device or torch.device("cpu")
        self._all, self._precision_recall = cache(self._rows), cache(self._manifold)

    def score(self, metrics: Sequence[str]) -> dict[str, Any]:
        """``scores`` by name, ``spread`` of those that are means over subsets, and ``protocol``."""
        kinds: dict[str, Callable[[Feature], Any]] = {
            "frechet": self._frechet,
            "inception_score": self._inception_score,
            "precision": lambda feature: self._precision_recall(feature).precision,
            "recall": lambda feature: self._precision_recall(feature).recall,
            "kernel": self._kernel,
            "agreement": self._agreement,
        }
        scores, spread = dict[str, float](), dict[str, float]()
        for name in metrics:
            metric = METRICS[name]
            value, extractor = kinds[metric.kind](metric[1:]), self.features.extractors[metric.extractor]
            if extractor.name != metric.extractor:  # made with other weights, it does not bear the published name
                name = f"{name}@{extractor.name}"
            if isinstance(value, scored.MeanStd):
                value, spread[name] = value
            scores[name] = value
        protocol = {"num": self._num, **self._described(metrics), **self._reference.protocol(metrics)}
        return {"scores": scores, **({"spread": spread} if spread else {}), "protocol": protocol}

    def _described(self, metrics: Sequence[str]) -> dict[str, Any]:
        adm = self._protocol == "adm"
        half = adm and any(METRICS[name].extractor == "inception" for name in metrics)
        rules = {
            "frechet": "covariances with N - 1",
            "inception_score": "blocks of 5,000 in order" if adm else "10 splits, shuffled by RandomState(2020)",
            "precision": f"k = 3, distances in {'float16 on Inception, as ADM has them' if half else 'float32'}",
            "kernel": "100 subsets of 1,000, RandomState(2020)",
            "agreement": scored.CLASSIFIER,
        }
        kinds = dict.fromkeys(METRICS[name].kind.replace("recall", "precision") for name in metrics)
        extractors = [self.features.extractors[name] for name in extractors_of(metrics)]
        told: dict[str, Any] = {
            "evaluator": self._protocol,
            **{f"{kind}_rule": rules[kind] for kind in kinds},
            "extractor": ", ".join(extractor.name for extractor in extractors),
            "extractor_sha256": ", ".join(extractor.sha256 for extractor in extractors),
            "preprocessing": "; ".join(extractor.preprocessing for extractor in extractors),
        }
        if self.features.unfit:
            told["features_made_again"] = len(self.features.unfit)
        return told

    def _frechet(self, feature: Feature) -> float:
        ours, theirs = streamed_moments(self.features.rows(*feature, self._num)), self._reference.moments(feature)
        check_dimensions(self._reference, feature, ours.mean.size, theirs.mean.size)
        if ours.count <= ours.mean.size:
            warn(
                f"{ours.count} images for {ours.mean.size} {' '.join(feature)} features: their covariance is"
                " singular, and the distance far too large: make more (papers: 50,000), and compare equal numbers"
                " only"
            )
        elif self._protocol == "adm" and feature[0] == "inception":
            return scored.frechet_distance_adm(theirs, ours)
        return scored.frechet_distance(theirs, ours)

    def _inception_score(self, feature: Feature) -> float | scored.MeanStd:
        if self._num < INCEPTION_SCORE_IMAGES:
            warn(f"inception_score of {self._num} images, whose blocks have {INCEPTION_SCORE_IMAGES:,}: make more")
        if self._protocol == "adm":
            return scored.inception_score(self.features.rows(*feature, self._num))
        return scored.inception_score_torch_fidelity(self._all(feature))

    def _manifold(self, feature: Feature) -> scored.PrecisionRecall:
        half = self._protocol == "adm" and feature[0] == "inception"
        return scored.precision_recall(*self._both(feature, MANIFOLD_IMAGES), half=half, device=self._device)

    def _kernel(self, feature: Feature) -> scored.MeanStd:
        return scored.kernel_distance(*self._both(feature, KERNEL_IMAGES))

    def _both(self, feature: Feature, most: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Features of all images, and of so many of the reference at most."""
        theirs, ours = self._reference.rows(feature, most), self._all(feature)
        check_dimensions(self._reference, feature, ours.shape[1], theirs.shape[1])
        return ours, theirs

    def _agreement(self, feature: Feature) -> float:
        classifier, num_classes = self._reference.classifier(feature)
        if not self.features.has(feature[0], "labels"):
            raise ConfigError(f"label_agreement: {self.features.name} does not say which classes were asked for")
        asked = self._rows((feature[0], "labels"))
        outside = asked[(asked < 0) | (asked >= num_classes)]
        if len(outside):
            raise ConfigError(
                f"label_agreement: the samples have class {outside[0]}, the reference 0 to {num_classes - 1}: give the"
                " index that the model was trained on"
            )
        return scored.label_agreement(self._all(feature), asked, classifier)

    def _rows(self, feature: Feature) -> np.ndarray[Any, Any]:
        """The features of all images in memory: 0.4 GB of 50,000 of Inception's."""
        return np.concatenate(list(self.features.rows(*feature, self._num)))


def check_dimensions(reference: Reference, feature: Feature, ours: int, theirs: int) -> None:
    """Raise ConfigError where features of samples and reference have other dimensions."""
    if ours != theirs:
        raise ConfigError(
            f"{reference.name} has {theirs} {' '.join(feature)} values an image, the samples {ours}: give a"
            " reference of pictures like those that the model was trained on (evaluate.reference)"
        )


def score_plan(samples: Samples, scores: Scores, metrics: Sequence[str], out: Path | None = None) -> dict[str, Any]:
    """Score a plan's samples: ``scores`` and the whole ``protocol``, also written to ``out``."""
    result, files, weak = scores.score(metrics), scores.features, samples.weak
    protocol = result.pop("protocol")
    num = protocol.pop("num")
    # as it was counted: the mean, where dopri5 took another number of steps for another batch
    work = np.concatenate(list(files.rows(next(iter(files.extractors)), "work", num))).mean(axis=0).tolist()
    result["protocol"] = {
        "num": num,
        **plan_protocol(samples.plan, samples.info, samples.uint8_rule),
        "evaluations": work[0],
        "forwards": work[1],
        **({"weak_forwards": work[2]} if samples.plan.weak_sha256 else {}),
        **protocol,
        **{key: getattr(samples.info, key) for key in OF_WEIGHTS},
    }
    if weak is not None:
        size = {"weak_depth": weak.model.depth, "weak_hidden_size": weak.model.hidden_size}
        told = {f"weak_{key}": getattr(weak, key) for key in OF_WEIGHTS if key != "images_seen"}
        result["protocol"] |= {**size, **told}
    result["protocol"]["plan"] = samples.plan.digest
    if out is not None:
        write_result(result, out)
    return result


def plan_protocol(plan: Plan, info: ModelInfo, uint8_rule: str) -> dict[str, Any]:
    """How the images were made."""
    return {
        "labels": plan.labels,
        "seed": plan.seed,
        "solver": plan.solver,
        **plan.solver_settings,
        "guidance": plan.model_dump(mode="json")["guidance"],
        **{key: getattr(plan, key) for key in HOW},
        "uint8_rule": uint8_rule,
        "tokenizer": info.tokenizer.name,
        "tokenizer_sha256": info.tokenizer.sha256,
    }


def write_result(result: dict[str, Any], out: Path) -> None:
    """Scores and protocol as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, json.dumps(result, indent=1) + "\n")
