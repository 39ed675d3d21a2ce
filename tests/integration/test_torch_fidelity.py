"""Our Inception, FID and KID against torch-fidelity's, which lives in an environment of its own.

torch-fidelity needs torchvision, whose wheel for the CPU is none: it lacks its operators and takes diffusers with it.
So the environment sees this one's packages and adds the two, and their part of the comparison runs in a process there.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["torch-fidelity==0.4.0", "torchvision>=0.26,<0.29"]
SIZES = [32, 64, 256, 299, 350]
DTYPES = {"float32": 1e-4, "float64": 1e-5}  # relative tolerances


def theirs(folder: Path) -> None:
    """Runs over there: features of the pictures by torch-fidelity, and its FID and KID of given ones."""
    library = torch.library.Library("torchvision", "DEF")  # what its Python part expects of its missing C++ part
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    pictures = np.load(folder / "pictures.npz")
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        network = FeatureExtractorInceptionV3(
            "inception",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=str(folder / "weights.pth"),
        )
        network.feature_extractor_internal_dtype = getattr(torch, dtype)  # 0.4.0's own "float64" gives float32
        network.to(getattr(torch, dtype))
        branch: list[torch.Tensor] = []
        network.Mixed_6d.branch1x1.register_forward_hook(lambda *call, branch=branch: branch.append(call[2]))
        for size in pictures:
            pool, logits = network(torch.from_numpy(pictures[size]).permute(0, 3, 1, 2))
            found[f"{dtype} {size} pool"], found[f"{dtype} {size} logits"] = pool, logits
            found[f"{dtype} {size} spatial"] = branch.pop()[:, :7].permute(0, 2, 3, 1).flatten(1)

    features = {name: torch.from_numpy(values) for name, values in np.load(folder / "features.npz").items()}
    statistics = [fid_features_to_statistics(features[name]) for name in ("samples", "reference")]
    found["fid"] = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    kid = kid_features_to_metric(features["samples"], features["reference"], verbose=False)
    found["kid"] = [kid[f"kernel_inception_distance_{what}"] for what in ("mean", "std")]
    np.savez(folder / "theirs.npz", **{name: np.asarray(values) for name, values in found.items()})


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, weights and features, and what torch-fidelity makes of them."""
    from tests.extractors import random_inception

    folder = tmp_path_factory.mktemp("torch-fidelity")
    torch.save(random_inception(), folder / "weights.pth")
    np.savez(folder / "pictures.npz", **pictures())
    np.savez(folder / "features.npz", **features())
    environment = folder / "venv"
    venv.create(environment, with_pip=True)
    packages = next(environment.glob("lib/python*/site-packages"))
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "ours.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in ours))
    python = str(environment / "bin/python")
    for command in (
        [python, "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES],
        [python, "-m", "tests.integration.test_torch_fidelity", str(folder)],
    ):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr
    return folder


def pictures() -> dict[str, np.ndarray]:
    """64 pictures of several sizes: noise, and pieces of photographs."""
    from sklearn.datasets import load_sample_images

    random, photographs = np.random.RandomState(0), load_sample_images().images
    made = {}
    for i, size in enumerate(SIZES):
        noise = random.randint(0, 256, (6, size, size, 3)).astype(np.uint8)
        corners = [random.randint(0, (427 - size, 640 - size)) for _ in range(6 if i else 10)]
        pieces = [photographs[k % 2][y : y + size, x : x + size] for k, (y, x) in enumerate(corners)]
        made[str(size)] = np.concatenate([noise, np.stack(pieces)])
    assert sum(map(len, made.values())) == 64
    return made


def features() -> dict[str, np.ndarray]:
    """Two sets that differ, in 256 dimensions that depend on each other, none below 0, as after a ReLU."""
    random = np.random.RandomState(1)
    mixing = random.standard_normal((256, 256)) / 16
    drawn = {name: random.standard_normal((1500, 256)) @ mixing for name in ("samples", "reference")}
    drawn["samples"] = 1.1 * drawn["samples"] + 0.05
    return {name: np.abs(values) for name, values in drawn.items()}


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", DTYPES)
def test_features(compared: Path, dtype: str) -> None:
    from ig_dist.features.extractors.extractor import get_extractor
    from ig_dist.features.extractors.inception import Inception, preprocess

    expected, weights = np.load(compared / "theirs.npz"), compared / "weights.pth"
    if dtype == "float32":
        network = get_extractor("inception", weights=str(weights), allow_other=True)
    else:
        model = Inception().eval().requires_grad_(False).double()
        model.load_state_dict(torch.load(weights, weights_only=True))

        def network(images: np.ndarray) -> dict[str, torch.Tensor]:
            parts = [model(preprocess(part, torch.float64)) for part in torch.from_numpy(images).split(4)]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    worst: dict[str, float] = {}
    for size, images in np.load(compared / "pictures.npz").items():
        for name, values in network(images).items():
            other = expected[f"{dtype} {size} {name}"]
            assert values.shape == other.shape
            scale = np.maximum(np.abs(other).max(axis=0), other.std())  # each number's own; some are always about 0
            error = (np.abs(values.numpy() - other) / scale).max()
            worst[name] = max(worst.get(name, 0.0), float(error))
    print(dtype, worst)
    assert set(worst) == {"pool", "spatial", "logits"} and max(worst.values()) < DTYPES[dtype], worst


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_fid_and_kid(compared: Path) -> None:
    from ig_dist.evaluation.metrics import frechet_distance, kernel_distance
    from ig_dist.features.features import streamed_moments

    expected, given = np.load(compared / "theirs.npz"), np.load(compared / "features.npz")
    fid = frechet_distance(*(streamed_moments([given[name]]) for name in ("samples", "reference")))
    kid = kernel_distance(given["samples"], given["reference"])
    print("fid", fid, float(expected["fid"]), "kid", kid, expected["kid"])
    assert fid == pytest.approx(float(expected["fid"]), rel=1e-5)
    assert tuple(kid) == pytest.approx(tuple(expected["kid"]), abs=1e-5)
    assert fid > 0.1 and kid[0] > 1e-3


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    theirs(Path(sys.argv[1]))
