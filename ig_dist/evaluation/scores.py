"""Scores of generated images, each with its protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ig_dist.data.index import ShardIndex, read_index
from ig_dist.data.reader import ShardReader
from ig_dist.errors import ConfigError
from ig_dist.evaluation.agreement import CLASSIFIER, label_agreement, train_classifier
from ig_dist.evaluation.features import Moments, pixel_extractor, streamed_moments
from ig_dist.evaluation.generate import Samples, read_units
from ig_dist.evaluation.plan import Plan
from ig_dist.evaluation.sampling import sampling_device
from ig_dist.export import ExportInfo
from ig_dist.latents.tokenizers import index_tokenizer
from ig_dist.run_dir import replace_text

if TYPE_CHECKING:
    from sklearn.svm import SVC

BATCH = 512
BATCH_PIXELS = 2**20  # of the images decoded at once: 16 of 256 x 256


def frechet_distance(first: Moments, second: Moments) -> float:
    """Squared Frechet distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2).

    The symmetric form has a real, non-negative spectrum, so eigenvalues of symmetric matrices suffice and a singular
    covariance (a pixel that is always black) does no harm. Dowson and Landau 1982.
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ second.covariance @ root).clip(min=0)
    mean_term = np.square(first.mean - second.mean).sum()
    return float(mean_term + np.trace(first.covariance) + np.trace(second.covariance) - 2 * np.sqrt(cross).sum())


def index_images(index: ShardIndex, place: str = "") -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int32]]]:
    """The images (B, H, W, C) that the stored latents decode to, and their labels, in index order.

    Of stored moments the mean is decoded. ``place`` is where the tokenizer is if not under its name in the index.
    """
    info = index.info
    tokenizer = index_tokenizer(info.tokenizer, info.latent, place, device=sampling_device())
    reader, channels = ShardReader(index), info.latent.shape[0]
    batch = min(BATCH, max(1, BATCH_PIXELS // info.tokenizer.image_size**2))
    first = 0
    for shard, size in enumerate(index.shard_sizes):
        for start in range(0, size, batch):
            stop = min(start + batch, size)
            stored, _ = reader.read(shard, start, stop)  # a damaged one raises
            # as stored, the latents are the tokenizer's own: normalisation is for the model
            images = tokenizer.decode(torch.from_numpy(stored[:, :channels]).float())
            yield images.numpy(), index.table.label[first + start : first + stop]
        first += size


@dataclass(frozen=True)
class Reference:
    """The real images that samples are held against, as far as the metrics need them."""

    source: str
    moments: Moments
    classifier: SVC | None


def load_reference(url: str, metrics: Sequence[str], tokenizer: str = "") -> Reference:
    """Read the real images of an index; ``tokenizer`` is where its tokenizer is if not under its name there."""
    index = read_index(url)
    moments = streamed_moments((images for images, _ in index_images(index, tokenizer)), pixel_extractor())
    classifier = train_classifier(index_images(index, tokenizer)) if "label_agreement" in metrics else None
    return Reference(index.info.source, moments, classifier)


def evaluate_samples(samples: Samples, reference: Reference, out: Path | None = None) -> dict[str, Any]:
    """Score samples; scores and protocol, also written to ``out``."""
    plan, info, extractor = samples.plan, samples.info, pixel_extractor()
    generated = streamed_moments((unit.images for unit in read_units(plan, samples.url)), extractor)
    if reference.moments.mean.shape != generated.mean.shape:
        raise ConfigError(
            f"the images of {reference.source} have {reference.moments.mean.size} values, the samples"
            f" {generated.mean.size}: give the index that the model was trained on (evaluate.reference)"
        )
    scores = {"fd_pixel": frechet_distance(reference.moments, generated)}
    if reference.classifier is not None:
        scores["label_agreement"] = label_agreement(
            reference.classifier, ((unit.images, unit.labels) for unit in read_units(plan, samples.url))
        )
    result = {
        "scores": scores,
        "protocol": {
            "num": plan.num,
            "labels": plan.labels,
            "seed": plan.seed,
            "solver": plan.solver,
            **_of_the_solver(plan),
            **_work(plan, samples.url),
            "guidance": [term.model_dump(mode="json") for term in plan.guidance],
            "precision": plan.precision,
            "uint8_rule": samples.uint8_rule,
            "tokenizer": info.tokenizer.name,
            "tokenizer_sha256": info.tokenizer.sha256,
            "extractor": extractor.name,
            "extractor_sha256": extractor.sha256,
            "classifier": CLASSIFIER if reference.classifier is not None else None,
            "reference": reference.source,
            "reference_images": reference.moments.count,
            "reference_sha256": reference.moments.sha256,
            "ema": info.ema,
            "step": info.step,
            "images_seen": info.images_seen,
            "checkpoint_sha256": info.checkpoint_sha256,
            "weights_sha256": info.weights_sha256,
            **({} if samples.weak is None else _of_the_weak_model(samples.weak)),
            "plan": plan.digest,
        },
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(out, json.dumps(result, indent=1) + "\n")
    return result


def _of_the_solver(plan: Plan) -> dict[str, Any]:
    if plan.solver == "dopri5":
        return {"rtol": plan.rtol, "atol": plan.atol}
    if plan.solver == "euler_maruyama":
        return {"steps": plan.steps}
    steps = {"steps": plan.steps, "time_shift": plan.time_shift}
    return {**steps, "correct_last_step": plan.correct_last_step} if plan.solver == "heun" else steps


def _work(plan: Plan, url: str) -> dict[str, float]:
    """What an image took, as it was counted: the mean, where dopri5 took another number of steps for another batch."""
    work = np.concatenate([unit.work for unit in read_units(plan, url)]).mean(axis=0)
    names = ["evaluations", "forwards", "weak_forwards"][: 3 if plan.weak_sha256 else 2]
    return {name: float(mean) for name, mean in zip(names, work, strict=False)}


def _of_the_weak_model(weak: ExportInfo) -> dict[str, Any]:
    model = {"depth": weak.model.depth, "hidden_size": weak.model.hidden_size}
    told = {**model, "ema": weak.ema, "step": weak.step, "checkpoint_sha256": weak.checkpoint_sha256}
    return {f"weak_{key}": value for key, value in {**told, "weights_sha256": weak.weights_sha256}.items()}
