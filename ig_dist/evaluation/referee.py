"""The public test of an evaluator: ADM's own samples against ADM's references must give the published scores."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ig_dist.errors import ConfigError
from ig_dist.evaluation.evaluate import evaluate

_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"


class Case(NamedTuple):
    """Samples, their reference, and what ADM's evaluator prints for them."""

    size: int
    samples: str
    reference: str
    scores: dict[str, float]


CASES = [
    Case(
        256,
        "admnet_guided_upsampled_imagenet256.npz",
        "VIRTUAL_imagenet256_labeled.npz",
        {"inception_score": 215.8370, "fid": 3.94256, "sfid": 6.14043, "precision": 0.8265, "recall": 0.5309},
    ),
    Case(
        128,
        "admnet_guided_imagenet128.npz",
        "VIRTUAL_imagenet128_labeled.npz",
        {"inception_score": 141.477, "fid": 2.973289, "sfid": 5.0946, "precision": 0.78138, "recall": 0.5929},
    ),
]
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
    at_hand = [case for case in CASES if (folder / case.samples).is_file() and (folder / case.reference).is_file()]
    if not at_hand:
        wanted = "; or ".join(
            " and ".join(f"{_URL}/{case.size}/{file}" for file in (case.reference, case.samples)) for case in CASES
        )
        raise ConfigError(f"{folder} holds neither of ADM's pairs of files: download {wanted}")
    verdicts = []
    for case in at_hand:
        done = evaluate(
            str(folder / case.samples),
            reference=str(folder / case.reference),
            metrics=list(case.scores),
            protocol="adm",
            weights=weights,
        )
        for name, published in case.scores.items() if done else ():
            assert done is not None
            found = done.result["scores"].get(name, float("nan"))
            passed = abs(found - published) <= TOLERANCES[name]
            verdicts.append(Verdict(f"{case.size} x {case.size}", name, published, found, passed))
    return verdicts
