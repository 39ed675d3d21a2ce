"""Scoring what lies somewhere: a plan's samples, an npz of any origin, a folder of pictures, against a reference."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ig_dist.config import Config
from ig_dist.config.catalogue import METRICS, check_weights, extractors_of
from ig_dist.config.sampling import EvaluateConfig
from ig_dist.errors import ConfigError
from ig_dist.evaluation.nearest import nearest_pictures, picture_of
from ig_dist.evaluation.references import Reference, open_reference
from ig_dist.evaluation.scores import Protocol, Scores, check_dimensions, score_plan, write_result
from ig_dist.export import read_info
from ig_dist.features.extractors.extractor import Extractor, get_extractor
from ig_dist.features.features import FeatureFiles, make_features
from ig_dist.features.images import find_images, plan_images
from ig_dist.plans.samples import find_samples, is_run, read_samples, reference_of
from ig_dist.sampling.run import config_extractor
from ig_dist.storage.writable import why_unwritable
from ig_dist.terminal import is_main_process
from ig_dist.this_process import this_device


class Evaluation(NamedTuple):
    """Scores with their protocol, and where they were written."""

    result: dict[str, Any]
    file: Path | None


def evaluate(
    src: str | Path,
    *,
    reference: str | None = None,
    metrics: Sequence[str] = (),
    protocol: Protocol | None = None,
    num: int | None = None,
    weights: Mapping[str, str] | None = None,
    image_size: int | None = None,
    nearest: int | None = None,
) -> Evaluation | None:
    """Score images; under several processes each makes its share of the features, and the first one scores.

    Args:
        src: a run with one plan's samples, the folder of a plan, an npz (``arr_0``), a folder of pictures, or an index.
        reference: what they are held against, see ``open_reference``; None: a plan's own.
        metrics: names of scores; none: a plan's own, or what the reference allows of ADM's five.
        protocol: whose rules hold where evaluators differ; None: a plan's own, or ADM's.
        num: only the first so many images; None: all.
        weights: of extractors, by their names.
        image_size: cut pictures of files to this side as ADM does.
        nearest: draw so many samples above the real pictures that are nearest to each.

    Returns:
        The scores; None from all processes but the first.

    Raises:
        ConfigError: nothing there to score, or nothing to hold it against.
    """
    src, device = str(src), this_device()
    samples = run = None
    asked = EvaluateConfig()
    if found := find_samples(src):
        samples, run, asked = read_samples(found)
        images, side = plan_images(samples), samples.info.tokenizer.image_size
    else:
        images = find_images(src, image_size=image_size)
        side = images.read(range(1)).images.shape[1]
    names = list(metrics) or (asked.metrics if samples else ["fid", "sfid", "inception_score", "precision", "recall"])
    against = reference or asked.reference
    if not against and (nearest or any(METRICS[name].kind != "inception_score" for name in names)):
        raise ConfigError(
            f"{src} does not say what to hold it against: give --reference (an npz of statistics, or an index)"
        )
    places = asked.weights | check_weights(dict(weights or {}), "--weights")
    rules: Protocol = protocol or asked.protocol

    def extractor(name: str) -> Extractor:
        return get_extractor(name, weights=places.get(name, ""), device=device)

    files = FeatureFiles(images, [extractor(name) for name in extractors_of(names)])
    real, place = Reference("none"), samples.tokenizer if samples else ""
    if against:
        shown: dict[str, Any] = {"image_size": image_size, "side": side, "pictures": nearest is not None}
        real = open_reference(against, names, extractor, tokenizer=place, **shown)
    make_features(files, num=num)  # last: what is wrong with the reference is said before
    if not is_main_process():
        return None
    if nearest is not None:
        picture = picture_of(src, samples.plan.digest if samples else None, run)
        nearest_pictures(files, real, nearest, picture, num)
    scores, options = Scores(files, real, num, rules, device), (reference, list(metrics), protocol, num)
    if samples is None or run is None:
        result = scores.score(names)
        told = {"images": src, "images_sha256": files.images_sha256(result["protocol"]["num"])}
        result["protocol"] = {**told, **result["protocol"]}
        name, tag, above = Path(src).stem, repr((src, *options)), Path(src).absolute().parents
        folders = [at / "evaluations" for at in above if "://" not in src and (at / "config.yaml").is_file()][:1]
    else:
        result = score_plan(samples, scores, names)
        name, tag = samples.plan.digest, "" if options == (None, [], None, None) else repr(options)  # as the plan says
        folders = [run / "evaluations"] if is_run(run) else []
        folders += [Path(samples.url)] if "://" not in samples.url else []
    folder = next((folder for folder in folders if not why_unwritable(folder)), None)
    if folder is None:
        return Evaluation(result, None)
    if tag:
        name += f"_{hashlib.sha256(tag.encode()).hexdigest()[:8]}"
    out = folder / f"{name}.json"
    write_result(result, out)
    return Evaluation(result, out)


def refuse_unfit(config: Config, export: Path, metrics: Sequence[str]) -> None:
    """Find out before images are made whether they can be scored; features of the reference are made on the way."""
    info, device = read_info(export), this_device()
    side, channels = info.tokenizer.image_size, info.latent.shape[0] if info.tokenizer.name == "pixel" else 3
    black = np.zeros((1, side, side, channels), np.uint8)
    extractors = {name: config_extractor(config, name, device) for name in extractors_of(metrics)}
    if "pixel" in extractors:
        extractors["pixel"](black)  # for small pictures only
    if all(METRICS[name].kind == "inception_score" for name in metrics):
        return
    if not (against := reference_of(config)):
        raise ConfigError(f"{export} does not say what to hold its samples against: set evaluate.reference")
    place = config.sample.tokenizer
    reference = open_reference(against, metrics, extractors.__getitem__, tokenizer=place, side=side)
    for (extractor, feature), moments in reference.statistics.items():
        ours = extractors[extractor].dimensions[feature] or black.size
        check_dimensions(reference, (extractor, feature), ours, moments.mean.size)
    for name in metrics:
        if METRICS[name].kind == "agreement":
            reference.labels(METRICS[name].extractor)


# --- the public test of an evaluator: ADM's own samples against ADM's references must give the published scores

_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"


CASES = {  # side -> ADM's samples, and what its evaluator prints for them
    256: (
        "admnet_guided_upsampled_imagenet256.npz",
        {"inception_score": 215.8370, "fid": 3.94256, "sfid": 6.14043, "precision": 0.8265, "recall": 0.5309},
    ),
    128: (
        "admnet_guided_imagenet128.npz",
        {"inception_score": 141.477, "fid": 2.973289, "sfid": 5.0946, "precision": 0.78138, "recall": 0.5929},
    ),
}
TOLERANCES = {"inception_score": 0.2, "fid": 0.003, "sfid": 0.002, "precision": 0.001, "recall": 0.001}


class Verdict(NamedTuple):
    """One score of one case."""

    case: str
    score: str
    published: float
    found: float
    passed: bool


def check_against_adm(folder: Path, weights: dict[str, str] | None = None) -> list[Verdict]:
    """Score what lies in a folder of ADM's files; none on processes but the first."""
    pairs = {side: (f"VIRTUAL_imagenet{side}_labeled.npz", samples) for side, (samples, _) in CASES.items()}
    at_hand = [side for side, pair in pairs.items() if all((folder / file).is_file() for file in pair)]
    if not at_hand:
        wanted = (" and ".join(f"{_URL}/{side}/{file}" for file in pair) for side, pair in pairs.items())
        raise ConfigError(f"{folder} holds neither of ADM's pairs of files: download {'; or '.join(wanted)}")
    verdicts = []
    for side in at_hand:
        (reference, samples), scores = pairs[side], CASES[side][1]
        held = str(folder / reference)
        done = evaluate(folder / samples, reference=held, metrics=list(scores), protocol="adm", weights=weights)
        if done is not None:
            for name, published in scores.items():
                found = done.result["scores"].get(name, float("nan"))
                passed = abs(found - published) <= TOLERANCES[name]
                verdicts.append(Verdict(f"{side} x {side}", name, published, found, passed))
    return verdicts
